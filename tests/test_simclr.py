"""SimCLR: the loss against NumPy, its invariances and known values."""

import math

import numpy as np
import pytest
import torch

from simclr import simclr_loss

TAU = 0.2


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def reference_loss(z1, z2, tau):
    """Equation 1 of the paper and its mean (algorithm 1), with views 2k and 2k + 1 of chunk k, in float64; and top1."""
    z = [row for pair in zip(z1, z2, strict=True) for row in pair]

    def pair_loss(i, j):
        others = [k for k in range(len(z)) if k != i]
        return -math.log(math.exp(cosine(z[i], z[j]) / tau) / sum(math.exp(cosine(z[i], z[k]) / tau) for k in others))

    def found(i, j):
        return all(cosine(z[i], z[j]) >= cosine(z[i], z[k]) for k in range(len(z)) if k != i)

    pairs = [pair for k in range(len(z1)) for pair in ((2 * k, 2 * k + 1), (2 * k + 1, 2 * k))]
    return sum(pair_loss(i, j) for i, j in pairs) / len(z), sum(found(i, j) for i, j in pairs) / len(z)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    z1 = rng.normal(0.5, 3.0, (9, 7))
    return z1, z1 + rng.normal(0.0, 3.0, z1.shape)


@pytest.fixture
def tensors(pair):
    return [torch.tensor(z, dtype=torch.float32) for z in pair]


def loss_of(z1, z2, tau=TAU):
    return simclr_loss(z1, z2, tau)[0].item()


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_loss_and_gradient_equal_float64_numpy(pair, tau):
    tensors = [torch.tensor(z, dtype=torch.float32, requires_grad=True) for z in pair]
    loss, _ = simclr_loss(*tensors, tau)
    assert loss.item() == pytest.approx(reference_loss(*pair, tau)[0], rel=1e-5)
    loss.backward()
    for side, row, column in ((0, 0, 0), (0, 4, 5), (1, 4, 2), (1, 8, 6)):
        slope = 0.0
        for step in (1e-5, -1e-5):
            moved = [z.copy() for z in pair]
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
    z1, z2 = tensors
    torch.manual_seed(0)
    scale1, scale2, order = torch.rand(9, 1) + 0.1, 10 * torch.rand(9, 1) + 0.1, torch.randperm(9)
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    loss = pytest.approx(loss_of(z1, z2), rel=1e-5)
    assert loss_of(scale1 * z1, scale2 * z2) == loss
    assert loss_of(z1[order], z2[order]) == loss
    assert loss_of(z2, z1) == loss
    assert loss_of(z1 @ rotation, z2 @ rotation) == loss


def test_loss_depends_on_which_views_belong_together(tensors):
    z1, z2 = tensors
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    assert loss_of(z1.roll(1, 0), z2) > loss_of(z1, z2) + 0.1
    assert loss_of(z1 @ rotation, z2) > loss_of(z1, z2) + 0.1


def test_loss_is_computed_in_float32_from_bfloat16():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    loss, terms = simclr_loss(z1, z2, TAU)
    assert loss.dtype == torch.float32
    expected, expected_terms = simclr_loss(z1.float(), z2.float(), TAU)
    assert torch.equal(loss, expected) and terms == expected_terms
