"""DINO: the loss, its terms and gradient against NumPy, what forward() compares, the centre and the teacher."""

import numpy as np
import pytest
import torch
from torch import nn

import dino
from common.chunks import Batch
from common.pore_model import PoreModel
from dino import Args, Projector, dino_loss, forward, main, view

TEMPERATURES = (0.1, 0.06)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def reference_loss(student1, student2, teacher1, teacher2, centre, student_temperature, teacher_temperature):
    """Equation 3 of the paper and the teacher's entropy, element by element, in float64."""
    loss = entropy = 0.0
    for students, teachers in ((student2, teacher1), (student1, teacher2)):
        for student, teacher in zip(students, teachers, strict=True):
            p_t, p_s = softmax((teacher - centre) / teacher_temperature), softmax(student / student_temperature)
            for d in range(len(centre)):
                loss -= p_t[d] * np.log(p_s[d]) / (2 * len(students))
                entropy -= p_t[d] * np.log(p_t[d]) / (2 * len(students))
    return loss, entropy


@pytest.fixture
def five():
    """Outputs s1, s2 of the student and t1, t2 of the teacher (10, 7), and a centre (7,), no two of them alike."""
    rng = np.random.default_rng(0)
    return [*rng.normal(0.0, 0.1, (4, 10, 7)), rng.normal(0.0, 0.1, 7)]


def loss_of(*arrays, temperatures=TEMPERATURES):
    loss, terms = dino_loss(*(torch.as_tensor(array).float() for array in arrays), *temperatures)
    return loss.item(), terms["teacher_entropy"].item(), terms["kl"].item()


@pytest.mark.parametrize("temperatures", [TEMPERATURES, (0.2, 0.5)])
def test_loss_entropy_and_divergence_equal_float64_numpy(five, temperatures):
    loss, entropy = reference_loss(*five, *temperatures)
    assert loss_of(*five, temperatures=temperatures) == pytest.approx((loss, entropy, loss - entropy), rel=1e-4)


def test_gradient_is_closed_form_for_the_student_and_none_for_the_teacher(five):
    s1, s2, t1, t2 = (torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in five[:4])
    centre = torch.tensor(five[4], dtype=torch.float32, requires_grad=True)
    dino_loss(s1, s2, t1, t2, centre, *TEMPERATURES)[0].backward()
    assert t1.grad is None and t2.grad is None
    tau_s, tau_t = TEMPERATURES
    for s, other in ((0, 3), (1, 2)):
        for row in range(10):
            p = softmax((five[other][row] - five[4]) / tau_t)
            expected = (softmax(five[s][row] / tau_s) - p) / (2 * 10 * tau_s)
            np.testing.assert_allclose((s1, s2)[s].grad[row].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_loss_of_uniform_outputs_is_the_logarithm_of_the_number_of_classes():
    same = torch.full((4, 2048), 3.0)
    loss, entropy, kl = loss_of(same, same, same, same, torch.zeros(2048))
    assert (loss, entropy) == pytest.approx((np.log(2048), np.log(2048)), rel=1e-5)
    assert kl == pytest.approx(0, abs=1e-5)


def test_divergence_is_0_where_the_student_says_of_one_view_what_the_teacher_says_of_the_other_and_else_above(five):
    a, b, zero = five[0], five[1], np.zeros(7)
    loss, entropy, kl = loss_of(a, b, b, a, zero, temperatures=(0.1, 0.1))
    assert kl == pytest.approx(0, abs=1e-5) and loss == pytest.approx(entropy) and entropy > 0.1
    assert loss_of(a, b, a, b, zero, temperatures=(0.1, 0.1))[2] > 0.1
    assert loss_of(a, b, b, a, zero)[2] > 0.01  # temperatures differ
    assert loss_of(a, b, b, a, five[4], temperatures=(0.1, 0.1))[2] > 0.1


def test_loss_ignores_a_constant_and_the_order_of_the_batch_and_what_the_centre_takes_off(five):
    s1, s2, t1, t2, centre = five
    expected = pytest.approx(loss_of(*five), rel=1e-4)
    assert loss_of(s1 + 0.5, s2 + 0.5, t1, t2, centre) == expected
    assert loss_of(s1, s2, t1 - 0.5, t2 - 0.5, centre) == expected
    c = np.random.default_rng(1).normal(0.0, 0.5, 7)
    assert loss_of(s1, s2, t1 + c, t2 + c, centre + c) == expected
    assert loss_of(s1, s2, t1 + c, t2 + c, centre) != expected
    order = np.random.default_rng(2).permutation(10)
    assert loss_of(s1[order], s2[order], t1[order], t2[order], centre) == expected
    assert loss_of(s2, s1, t2, t1, centre) == expected
    assert loss_of(s1[order], s2[order], t1, t2, centre) != expected


def test_loss_is_computed_in_float32_from_bfloat16(five):
    low, centre = [torch.tensor(array).bfloat16() for array in five[:4]], torch.tensor(five[4]).float()
    loss = dino_loss(*low, centre, *TEMPERATURES)[0]
    assert torch.equal(loss, dino_loss(*(x.float() for x in low), centre, *TEMPERATURES)[0])


def network():
    return nn.ModuleDict({"pore_model": PoreModel.of_size("tiny", dropout=0.0), "projector": Projector(128, 200, 16)})


def test_student_and_teacher_see_both_views(monkeypatch):
    calls, args = [], Args(student_temperature=0.2, teacher_temperature=0.05)
    monkeypatch.setattr(dino, "dino_loss", lambda *inputs: calls.append(inputs) or dino_loss(*inputs))
    torch.manual_seed(0)
    models = nn.ModuleDict({"student": network(), "teacher": network()})
    models.register_buffer("centre", torch.randn(16))
    batch = Batch(torch.randn(8, 200), torch.full((8,), 200))
    torch.manual_seed(1)
    loss, terms, embeddings, teacher_outputs = forward(models, batch, args)
    torch.manual_seed(1)
    view1, view2 = view(batch, args), view(batch, args)
    student1, student2, teacher1, teacher2 = (
        models[name]["projector"](*models[name]["pore_model"](*x))
        for name in ("student", "teacher")
        for x in (view1, view2)
    )
    expected = student1, student2, teacher1, teacher2, models.centre
    torch.testing.assert_close(calls, [(*expected, 0.2, 0.05)])
    torch.testing.assert_close((loss, terms, embeddings), (*dino_loss(*expected, 0.2, 0.05), student1))
    torch.testing.assert_close(teacher_outputs, torch.cat([teacher1, teacher2]))
    assert not any(outputs.requires_grad for outputs in (*calls[0][2:4], teacher_outputs))
    loss.backward()
    assert all(p.grad is not None for p in models["student"].parameters())


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_after_each_step_centre_and_teacher_move(simulated, tmp_path, monkeypatch, momentum):
    """The centre, from 0, by 0.3 of the way to the mean of the teacher's outputs for both views; validation moves none.

    With m_t = 0 the teacher is the student, with m_t = 1 what it was at first.
    """
    calls = []

    def spy(*inputs):
        if inputs[0].requires_grad:  # not in validation
            calls.append([x.clone() for x in inputs[2:5]])
        return dino_loss(*inputs)

    monkeypatch.setattr(dino, "dino_loss", spy)
    small = {"size": "tiny", "device": "cpu", "chunk_len": 200, "batch_size": 8, "embedding_dim": 32, "lr": 1e-3}
    changes = {"max_steps": 3, "momentum": momentum, "centre_momentum": 0.7, "seed": 3}
    main(Args(data=(simulated,), run_dir=tmp_path / "run", **small | changes))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["models"]
    expected = torch.zeros(32)
    for teacher1, teacher2, centre in calls:
        torch.testing.assert_close(centre, expected)
        assert not centre.requires_grad
        expected = 0.7 * expected + 0.3 * torch.cat([teacher1, teacher2]).mean(0)
    torch.testing.assert_close(saved["centre"], expected)
    assert len(calls) == 3 and expected.abs().min() > 1e-4

    torch.manual_seed(3)  # the student as main makes it
    begun = nn.ModuleDict({"pore_model": PoreModel.of_size("tiny"), "projector": Projector(128, 200, 32)})
    for key, old in begun.named_parameters():
        assert torch.equal(saved[f"teacher.{key}"], old if momentum == 1 else saved[f"student.{key}"])
