"""SimCLR: the loss against NumPy, its invariances and known values."""

import math

import numpy as np
import pytest
import torch

import simclr
from common.pore_model import PoreModel
from simclr import Args, simclr_loss

TAU = 0.2


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def reference_loss(r1, r2, tau):
    """Equation 1 of the paper and its mean (algorithm 1), with views 2k and 2k + 1 of chunk k, in float64; and top1."""
    z = [row for pair in zip(r1, r2, strict=True) for row in pair]

    def pair_loss(i, j):
        others = [k for k in range(len(z)) if k != i]
        return -math.log(math.exp(cosine(z[i], z[j]) / tau) / sum(math.exp(cosine(z[i], z[k]) / tau) for k in others))

    def found(i, j):
        return all(cosine(z[i], z[j]) >= cosine(z[i], z[k]) for k in range(len(z)) if k != i)

    pairs = [pair for k in range(len(r1)) for pair in ((2 * k, 2 * k + 1), (2 * k + 1, 2 * k))]
    return sum(pair_loss(i, j) for i, j in pairs) / len(z), sum(found(i, j) for i, j in pairs) / len(z)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    r1 = rng.normal(0.5, 3.0, (9, 7))
    return r1, r1 + rng.normal(0.0, 3.0, r1.shape)


@pytest.fixture
def tensors(pair):
    return [torch.tensor(r, dtype=torch.float32) for r in pair]


def loss_of(r1, r2, tau=TAU):
    return simclr_loss(r1, r2, tau)[0].item()


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_loss_and_gradient_equal_float64_numpy(pair, tau):
    tensors = [torch.tensor(r, dtype=torch.float32, requires_grad=True) for r in pair]
    loss, _ = simclr_loss(*tensors, tau)
    assert loss.item() == pytest.approx(reference_loss(*pair, tau)[0], rel=1e-5)
    loss.backward()
    for side, row, column in ((0, 0, 0), (0, 4, 5), (1, 4, 2), (1, 8, 6)):
        slope = 0.0
        for step in (1e-5, -1e-5):
            moved = [r.copy() for r in pair]
            moved[side][row, column] += step
            slope += reference_loss(*moved, tau)[0] / (2 * step)
        assert tensors[side].grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_terms_add_up_to_the_loss_and_alignment_is_that_of_the_two_views(pair, tensors):
    loss, terms = simclr_loss(*tensors, TAU)
    assert terms.keys() == {"alignment", "uniformity", "top1"}
    assert loss.item() == pytest.approx((terms["alignment"] + terms["uniformity"]).item())
    alignment = -np.mean([cosine(a, b) for a, b in zip(*pair, strict=True)]) / TAU
    assert terms["alignment"].item() == pytest.approx(alignment, rel=1e-5)


def test_top1_equals_numpy(pair, tensors):
    share = reference_loss(*pair, TAU)[1]
    assert 0.2 < share < 0.8
    assert simclr_loss(*tensors, TAU)[1]["top1"].item() == pytest.approx(share)


def test_equal_similarities_give_ln_of_the_others():
    loss = loss_of(torch.ones(32, 16), torch.ones(32, 16))
    assert loss == pytest.approx(math.log(63), rel=1e-6) and loss == pytest.approx(4.143, abs=1e-3)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_clusters_at_right_angles_give_the_closed_form(tau):
    """Views of a chunk agree, all others are at right angles; nothing is left of it as tau falls."""
    loss, terms = simclr_loss(torch.eye(8), torch.eye(8), tau)
    assert loss.item() == pytest.approx(-1 / tau + math.log(math.exp(1 / tau) + 14), rel=1e-5, abs=2e-6)
    assert terms["top1"].item() == 1.0


def test_loss_ignores_length_order_and_direction(tensors):
    r1, r2 = tensors
    torch.manual_seed(0)
    scale1, scale2, order = torch.rand(9, 1) + 0.1, 10 * torch.rand(9, 1) + 0.1, torch.randperm(9)
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    loss = pytest.approx(loss_of(r1, r2), rel=1e-5)
    assert loss_of(scale1 * r1, scale2 * r2) == loss
    assert loss_of(r1[order], r2[order]) == loss
    assert loss_of(r2, r1) == loss
    assert loss_of(r1 @ rotation, r2 @ rotation) == loss


def test_loss_depends_on_which_views_belong_together(tensors):
    r1, r2 = tensors
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    assert loss_of(r1.roll(1, 0), r2) > loss_of(r1, r2) + 0.1
    assert loss_of(r1 @ rotation, r2) > loss_of(r1, r2) + 0.1


def test_loss_is_computed_in_float32_from_bfloat16():
    torch.manual_seed(0)
    r1, r2 = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    loss, terms = simclr_loss(r1, r2, TAU)
    assert loss.dtype == torch.float32
    expected, expected_terms = simclr_loss(r1.float(), r2.float(), TAU)
    assert torch.equal(loss, expected) and terms == expected_terms


def test_each_of_the_two_views_goes_through_the_model(simulated, tmp_path, monkeypatch):
    """In training and in validation; one view twice, told apart by dropout alone, would train as well."""
    views, inputs = [], []
    view, forward = simclr.view, PoreModel.forward
    monkeypatch.setattr(simclr, "view", lambda *options: views.append(view(*options)) or views[-1])
    monkeypatch.setattr(PoreModel, "forward", lambda self, *x: inputs.append(x[0]) or forward(self, *x))
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 4, "max_steps": 2}
    simclr.main(Args(data=(simulated,), run_dir=tmp_path / "run", **settings))
    assert len(views) > 4 and all(x is v.signal for x, v in zip(inputs, views, strict=True))
