"""DINO: the loss, its terms and gradient against NumPy, the centre, and the teacher that follows the student."""

import numpy as np
import pytest
import torch

import dino
from common.augment import view
from common.data import Chunks, open_data
from common.pore_model import PoreModel, RepresentationHead
from common.run import seed_step
from dino import Args, Center, dino_loss, main

TEMPERATURES = (0.1, 0.06)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def reference_loss(s1, s2, t1, t2, center, student_temperature, teacher_temperature):
    """Equation 3 of the paper and the teacher's entropy, element by element, in float64."""
    loss = entropy = 0.0
    for s, t in ((s2, t1), (s1, t2)):
        for student, teacher in zip(s, t, strict=True):
            p, q = softmax((teacher - center) / teacher_temperature), softmax(student / student_temperature)
            for d in range(len(center)):
                loss -= p[d] * np.log(q[d]) / (2 * len(s))
                entropy -= p[d] * np.log(p[d]) / (2 * len(s))
    return loss, entropy


@pytest.fixture
def five():
    """s1, s2, t1, t2 (10, 7) and a center (7,), no two of them alike."""
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
    center = torch.tensor(five[4], dtype=torch.float32, requires_grad=True)
    dino_loss(s1, s2, t1, t2, center, *TEMPERATURES)[0].backward()
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


def test_loss_ignores_a_constant_and_the_order_of_the_batch_and_what_the_center_takes_off(five):
    s1, s2, t1, t2, center = five
    expected = pytest.approx(loss_of(*five), rel=1e-4)
    assert loss_of(s1 + 0.5, s2 + 0.5, t1, t2, center) == expected
    assert loss_of(s1, s2, t1 - 0.5, t2 - 0.5, center) == expected
    c = np.random.default_rng(1).normal(0.0, 0.5, 7)
    assert loss_of(s1, s2, t1 + c, t2 + c, center + c) == expected
    assert loss_of(s1, s2, t1 + c, t2 + c, center) != expected
    order = np.random.default_rng(2).permutation(10)
    assert loss_of(s1[order], s2[order], t1[order], t2[order], center) == expected
    assert loss_of(s2, s1, t2, t1, center) == expected
    assert loss_of(s1[order], s2[order], t1, t2, center) != expected


def test_loss_and_center_are_float32_whatever_the_outputs_are(five):
    low = [torch.tensor(array).bfloat16() for array in five[:4]]
    center = torch.tensor(five[4]).float()
    loss = dino_loss(*low, center, *TEMPERATURES)[0]
    assert torch.equal(loss, dino_loss(*(x.float() for x in low), center, *TEMPERATURES)[0])
    center = Center(7)
    center.update(*low[2:], 0.5)
    assert center.value.dtype == torch.float32
    mean = torch.cat(low[2:]).double().mean(0)
    torch.testing.assert_close(center.value.double(), 0.5 * mean, rtol=1e-5, atol=1e-8)


def test_center_starts_at_0_is_the_running_mean_over_both_views_and_is_saved():
    torch.manual_seed(0)
    center = Center(7)
    assert torch.equal(center.value, torch.zeros(7))
    outputs = torch.randn(5, 2, 10, 7) + torch.tensor([1.0, 3.0])[:, None, None]  # the two views differ
    for t1, t2 in outputs.clone().requires_grad_():
        center.update(t1, t2, 0.7)
    assert not center.value.requires_grad
    # 0.3 of the last mean, 0.3 * 0.7 of the one before, ...
    expected = sum(0.3 * 0.7 ** (4 - n) * outputs[n].double().mean((0, 1)) for n in range(5))
    torch.testing.assert_close(center.value.double(), expected, rtol=1e-5, atol=1e-6)
    other = Center(7)
    other.load_state_dict(center.state_dict())
    assert torch.equal(other.value, center.value)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_run_centres_the_teachers_outputs_after_each_step(simulated, tmp_path, monkeypatch, momentum):
    """With m_t = 1 the teacher stays as it began and what it says of each step's views is known."""
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 200, "batch_size": 8, "representation": 32, "lr": 1e-3}
    args = Args((simulated,), run_dir=tmp_path / "run", max_steps=3, momentum=momentum, center_momentum=0.7, **settings)
    calls, of_size = [], PoreModel.of_size
    monkeypatch.setattr(PoreModel, "of_size", lambda size: of_size(size, dropout=0.0))  # so is what the student says
    monkeypatch.setattr(
        dino,
        "dino_loss",
        lambda *inputs: calls.append([torch.as_tensor(x).clone() for x in inputs]) or dino_loss(*inputs),
    )
    main(args)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)

    torch.manual_seed(args.seed)
    pore_model = PoreModel.of_size("tiny")
    head = RepresentationHead(pore_model.channels, 200, 32)
    chunks = Chunks(open_data(args.data), 200, "training")
    expected_center = torch.zeros(32)
    for step, (s1, s2, t1, t2, center, *temperatures) in enumerate(calls[:3], start=1):
        seed_step(args.seed, step)
        batch = chunks.batch(args.seed, step - 1, 8)
        r1, r2 = (head(*pore_model(*view(batch.signal, batch.lengths))).detach() for _ in range(2))
        if step == 1:  # afterwards the student has moved
            torch.testing.assert_close((s1.detach(), s2.detach()), (r1, r2))
        if step == 1 or momentum == 1:
            torch.testing.assert_close((t1, t2), (r1, r2))
        torch.testing.assert_close(center, expected_center)
        assert temperatures == pytest.approx(TEMPERATURES)
        expected_center = 0.7 * expected_center + 0.3 * torch.cat([t1, t2]).mean(0)
    torch.testing.assert_close(saved["center"]["value"], expected_center)
    for name, begun in (("pore_model", pore_model), ("head", head)):
        for key, old in begun.named_parameters():
            assert torch.equal(saved[f"teacher_{name}"][key], old if momentum == 1 else saved[name][key])
