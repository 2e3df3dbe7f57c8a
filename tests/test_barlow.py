"""Barlow Twins: the loss against NumPy, its invariances and known values; the learning rate of all methods."""

import numpy as np
import pytest
import torch

import barlow
from barlow import Args, barlow_loss

LAMBD = 5e-3


def reference_loss(r1, r2, lambd):
    """Equations 1 and 2 of the paper, element by element, in float64."""
    z1, z2 = ((r - r.mean(0)) / np.sqrt(r.var(0) + 1e-5) for r in (r1, r2))
    n, dimensions = r1.shape
    loss = 0.0
    for i in range(dimensions):
        for j in range(dimensions):
            c = sum(z1[b, i] * z2[b, j] for b in range(n)) / n
            loss += (1 - c) ** 2 if i == j else lambd * c**2
    return loss


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    r1 = rng.normal(2.0, 3.0, (10, 7))
    return r1, r1 + rng.normal(0.0, 1.0, r1.shape)


def test_loss_and_gradient_equal_float64_numpy(pair):
    r1, r2 = (torch.tensor(r, dtype=torch.float32, requires_grad=True) for r in pair)
    loss, terms = barlow_loss(r1, r2, LAMBD)
    assert loss.item() == pytest.approx(reference_loss(*pair, LAMBD), rel=1e-5)
    assert loss.item() == pytest.approx((terms["invariance"] + LAMBD * terms["redundancy"]).item())
    loss.backward()
    for row, column in ((0, 0), (3, 5), (9, 6)):
        up, down = pair[0].copy(), pair[0].copy()
        up[row, column] += 1e-5
        down[row, column] -= 1e-5
        slope = (reference_loss(up, pair[1], LAMBD) - reference_loss(down, pair[1], LAMBD)) / 2e-5
        assert r1.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_loss_ignores_scale_and_shift_of_each_dimension_and_order_of_the_batch(pair):
    r1, r2 = (torch.tensor(r, dtype=torch.float32) for r in pair)
    loss = barlow_loss(r1, r2, LAMBD)[0].item()
    scale, shift = torch.rand(7) + 0.5, torch.randn(7)
    assert barlow_loss(r1 * scale + shift, r2, LAMBD)[0].item() == pytest.approx(loss, rel=1e-4)
    order = torch.randperm(10)
    assert barlow_loss(r1[order], r2[order], LAMBD)[0].item() == pytest.approx(loss, rel=1e-5)
    assert barlow_loss(r2, r1, LAMBD)[0].item() == pytest.approx(loss, rel=1e-5)
    assert barlow_loss(r1[order], r2, LAMBD)[0].item() != pytest.approx(loss, rel=1e-2)


def test_loss_of_independent_representations_is_about_2400():
    """Each C_ij has mean 0 and variance 1 / N: R (1 + 1 / N) + lambda R (R - 1) / N = 2407."""
    torch.manual_seed(0)
    loss, terms = barlow_loss(torch.randn(64, 2048), torch.randn(64, 2048), LAMBD)
    assert loss.item() == pytest.approx(2407, rel=0.02)
    assert terms["invariance"].item() == pytest.approx(2048 * (1 + 1 / 64), rel=0.02)


def test_equal_views_have_no_invariance_loss_and_collapsed_ones_all_of_it():
    torch.manual_seed(0)
    r = torch.randn(256, 16)
    assert barlow_loss(r, r, LAMBD)[1]["invariance"].item() < 1e-6
    assert barlow_loss(torch.ones(256, 16), torch.ones(256, 16), LAMBD)[0].item() == pytest.approx(16)


def smallest_loss(n, dimensions, lambd):
    """The bound of docs/barlow.md: C has rank n - 1 at most, so its diagonal cannot be 1 with nothing off it."""
    redundancy = lambd * (dimensions**2 / (n - 1) - dimensions)
    return dimensions * redundancy / (dimensions + redundancy)


def test_small_batches_bound_the_loss_from_below_and_the_bound_is_reached():
    assert smallest_loss(64, 2048, LAMBD) == pytest.approx(279, abs=1)
    torch.manual_seed(0)
    r = torch.randn(2, 6, 20, requires_grad=True)
    optimizer = torch.optim.Adam([r], 0.05)
    for _ in range(800):
        loss = barlow_loss(r[0], r[1], 0.5)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bound = smallest_loss(6, 20, 0.5)
    assert 0.999 * bound < loss.item() < 1.02 * bound


def test_loss_is_computed_in_float32_from_bfloat16():
    torch.manual_seed(0)
    r1, r2 = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    assert torch.equal(barlow_loss(r1, r2, LAMBD)[0], barlow_loss(r1.float(), r2.float(), LAMBD)[0])


def test_constant_and_scheduled_learning_rates():
    args = Args(lr=2.0)
    assert [barlow.learning_rate(step, args, 100) for step in (1, 50, 100)] == [2.0, 2.0, 2.0]
    args = Args(lr=2.0, warmup_steps=10, cosine=True)
    rates = [barlow.learning_rate(step, args, 110) for step in (5, 10, 60, 110)]
    assert rates == pytest.approx([1.0, 2.0, 1.0, 0.0])
