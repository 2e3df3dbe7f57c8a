"""SimSiam: the loss against NumPy, its stop-gradient and pairing, the predictor, and what a collapse looks like."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import simsiam
from common.augment import view
from common.data import Chunks, open_data
from common.pore_model import PoreModel, RepresentationHead
from common.run import seed_step
from simsiam import Args, Predictor, main, simsiam_loss


def reference_terms(x1, x2, h1, h2):
    """Mean cosine of x1 and h2 and of x2 and h1, row by row, in float64."""
    cosines = []
    for x, h in ((x1, h2), (x2, h1)):
        total = 0.0
        for a, b in zip(x, h, strict=True):
            dot, aa, bb = (sum(u * v for u, v in zip(p, q, strict=True)) for p, q in ((a, b), (a, a), (b, b)))
            total += dot / np.sqrt(aa * bb)
        cosines.append(total / len(x))
    return cosines


@pytest.fixture
def four():
    """x1, x2, h1, h2 (10, 7), no two of them alike."""
    rng = np.random.default_rng(0)
    x1 = rng.normal(1.0, 2.0, (10, 7))
    return [x1, *(x1 + rng.normal(0.0, scale, x1.shape) for scale in (1.0, 2.0, 3.0))]


def loss_of(*arrays):
    return simsiam_loss(*(torch.as_tensor(array).float() for array in arrays))[0].item()


def test_loss_terms_and_gradient_equal_float64_numpy(four):
    x1, x2, h1, h2 = (torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in four)
    loss, terms = simsiam_loss(x1, x2, h1, h2)
    cosine1, cosine2 = reference_terms(*four)
    assert [terms["cosine1"].item(), terms["cosine2"].item()] == pytest.approx([cosine1, cosine2], rel=1e-5)
    assert loss.item() == pytest.approx(2 - cosine1 - cosine2, rel=1e-5)
    loss.backward()
    for number, h in ((2, h1), (3, h2)):
        for row, column in ((0, 0), (3, 5), (9, 6)):
            up, down = ([array.copy() for array in four] for _ in range(2))
            up[number][row, column] += 1e-5
            down[number][row, column] -= 1e-5
            slope = (sum(reference_terms(*down)) - sum(reference_terms(*up))) / 2e-5
            assert h.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_no_gradient_reaches_the_representations(four):
    x1, x2, h1, h2 = (torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in four)
    simsiam_loss(x1, x2, h1, h2)[0].backward()
    assert x1.grad is None and x2.grad is None
    assert h1.grad.abs().min() > 0 and h2.grad.abs().min() > 0


def test_loss_is_0_for_equal_2_for_orthogonal_and_4_for_opposite_views():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    left, right = torch.eye(8)[:4], torch.eye(8)[4:]
    assert loss_of(x, x, x, x) == pytest.approx(0, abs=1e-6)
    assert loss_of(left, left, right, right) == pytest.approx(2)
    assert loss_of(x, x, -x, -x) == pytest.approx(4)


def test_the_predictor_of_one_view_is_compared_with_the_other_view():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 50)
    assert loss_of(a, b, b, a) == pytest.approx(0, abs=1e-6)
    assert loss_of(a, b, a, b) > 1


def test_loss_ignores_the_length_of_each_row_and_the_order_of_the_batch(four):
    loss = loss_of(*four)
    rng = np.random.default_rng(1)
    assert loss_of(*(array * rng.uniform(0.1, 10, (10, 1)) for array in four)) == pytest.approx(loss, rel=1e-5)
    order = rng.permutation(10)
    assert loss_of(*(array[order] for array in four)) == pytest.approx(loss, rel=1e-5)
    x1, x2, h1, h2 = four
    assert loss_of(x2, x1, h2, h1) == pytest.approx(loss, rel=1e-5)
    assert loss_of(x1[order], x2[order], h1, h2) != pytest.approx(loss, rel=1e-2)


def test_loss_is_computed_in_float32_from_bfloat16(four):
    low = [torch.tensor(array).bfloat16() for array in four]
    assert torch.equal(simsiam_loss(*low)[0], simsiam_loss(*(array.float() for array in low))[0])


def loss_without_stop_gradient(x1, x2, h1, h2):
    cosine1, cosine2 = F.cosine_similarity(x1, h2).mean(), F.cosine_similarity(x2, h1).mean()
    return 2 - cosine1 - cosine2, {"cosine1": cosine1, "cosine2": cosine2}


def test_with_no_predictor_the_stop_gradient_only_halves_the_gradient(four):
    """Why the predictor has to be there: the cosine is symmetric, so each half of the loss gives the same gradient."""
    gradients = []
    for loss in (simsiam_loss, loss_without_stop_gradient):
        x1, x2 = (torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in four[:2])
        loss(x1, x2, x1, x2)[0].backward()
        gradients.append(torch.stack([x1.grad, x2.grad]))
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_predictor_is_shaped_like_the_projection_of_the_head():
    predictor, project = Predictor(48), RepresentationHead(128, 400, 48).project
    assert [type(layer) for layer in predictor] == [type(layer) for layer in project]
    shapes = [[tuple(p.shape) for p in module.parameters()] for module in (predictor, project)]
    assert shapes[0][0] == (48, 48)  # of the head's, the first layer's input is as wide as what it pooled
    assert shapes[0][1:] == shapes[1][1:]


def small_args(data, folder, **changes):
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 200, "batch_size": 32, "representation": 64, "lr": 1e-3}
    return Args(data=(data,), run_dir=folder, **settings | changes)


def test_a_step_predicts_each_view_from_its_own_representation(simulated, tmp_path, monkeypatch):
    calls, of_size = [], PoreModel.of_size
    monkeypatch.setattr(PoreModel, "of_size", lambda size: of_size(size, dropout=0.0))  # what it computes is known then
    monkeypatch.setattr(simsiam, "simsiam_loss", lambda *inputs: calls.append(inputs) or simsiam_loss(*inputs))
    args = small_args(simulated, tmp_path / "run", batch_size=8, max_steps=1)
    main(args)

    torch.manual_seed(args.seed)
    pore_model = PoreModel.of_size("tiny")
    head, predictor = RepresentationHead(pore_model.channels, 200, 64), Predictor(64)
    chunks = Chunks(open_data(args.data), 200, "training")
    seed_step(args.seed, 1)
    batch = chunks.batch(args.seed, 0, 8)
    x1, x2 = (head(*pore_model(*view(batch.signal, batch.lengths))) for _ in range(2))
    for seen, expected in zip(calls[0], (x1, x2, predictor(x1), predictor(x2)), strict=True):
        torch.testing.assert_close(seen, expected)


def test_without_stop_gradient_the_features_collapse_while_the_loss_looks_fine(simulated, tmp_path, monkeypatch):
    """Why feature_spread is logged: it ends near 0.9 with stop-gradient and 0.03 without, at losses of 0.4 and 0.001.

    The learning rate is high, so that 60 steps are enough.
    """
    logs = {}
    for name, loss in (("healthy", simsiam_loss), ("collapsed", loss_without_stop_gradient)):
        monkeypatch.setattr(simsiam, "simsiam_loss", loss)
        main(small_args(simulated, tmp_path / name, max_steps=60, lr=1e-2))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        logs[name] = [line for line in lines if "loss" in line]
    healthy, collapsed = logs["healthy"], logs["collapsed"]
    assert min(line["feature_spread"] for line in healthy) > 0.6
    assert collapsed[-1]["feature_spread"] < min(0.1, 0.5 * collapsed[0]["feature_spread"])
    assert healthy[-1]["effective_rank"] > 5 > collapsed[-1]["effective_rank"]
    assert collapsed[-1]["loss"] < 0.05 < healthy[-1]["loss"] < 1.5  # the better loss is that of the worthless model
