"""Barlow Twins: the loss against NumPy, its invariances and known values; learning rate and view of all methods."""

import numpy as np
import pytest
import torch

import barlow
from barlow import Args, barlow_loss
from common.augment import drop_points, noise
from common.chunks import Batch

LAMBD = 5e-3


def reference_loss(z1, z2, lambd):
    """Equations 1 and 2 of the paper, element by element, in float64."""
    z1, z2 = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (z1, z2))
    n, dimensions = z1.shape
    loss = 0.0
    for i in range(dimensions):
        for j in range(dimensions):
            c = sum(z1[b, i] * z2[b, j] for b in range(n)) / n
            loss += (1 - c) ** 2 if i == j else lambd * c**2
    return loss


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    z1 = rng.normal(2.0, 3.0, (10, 7))
    return z1, z1 + rng.normal(0.0, 1.0, z1.shape)


def test_loss_and_gradient_equal_float64_numpy(pair):
    z1, z2 = (torch.tensor(z, dtype=torch.float32, requires_grad=True) for z in pair)
    loss, terms = barlow_loss(z1, z2, LAMBD)
    assert loss.item() == pytest.approx(reference_loss(*pair, LAMBD), rel=1e-5)
    assert loss.item() == pytest.approx((terms["invariance"] + LAMBD * terms["redundancy"]).item())
    loss.backward()
    for row, column in ((0, 0), (3, 5), (9, 6)):
        up, down = pair[0].copy(), pair[0].copy()
        up[row, column] += 1e-5
        down[row, column] -= 1e-5
        slope = (reference_loss(up, pair[1], LAMBD) - reference_loss(down, pair[1], LAMBD)) / 2e-5
        assert z1.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_loss_ignores_scale_and_shift_of_each_dimension_and_order_of_the_batch(pair):
    z1, z2 = (torch.tensor(z, dtype=torch.float32) for z in pair)
    loss = barlow_loss(z1, z2, LAMBD)[0].item()
    torch.manual_seed(0)
    scale, shift, order = torch.rand(7) + 0.5, torch.randn(7), torch.randperm(10)
    assert barlow_loss(z1 * scale + shift, z2, LAMBD)[0].item() == pytest.approx(loss, rel=1e-4)
    assert barlow_loss(z1[order], z2[order], LAMBD)[0].item() == pytest.approx(loss, rel=1e-5)
    assert barlow_loss(z2, z1, LAMBD)[0].item() == pytest.approx(loss, rel=1e-5)
    assert barlow_loss(z1[order], z2, LAMBD)[0].item() != pytest.approx(loss, rel=1e-2)


def test_loss_of_independent_embeddings_is_about_2400():
    """Each C_ij has mean 0 and variance 1 / N: R (1 + 1 / N) + lambda R (R - 1) / N = 2407."""
    torch.manual_seed(0)
    loss, terms = barlow_loss(torch.randn(64, 2048), torch.randn(64, 2048), LAMBD)
    assert loss.item() == pytest.approx(2407, rel=0.02)
    assert terms["invariance"].item() == pytest.approx(2048 * (1 + 1 / 64), rel=0.02)


def test_equal_views_have_no_invariance_loss_and_collapsed_ones_all_of_it():
    torch.manual_seed(0)
    z = torch.randn(256, 16)
    assert barlow_loss(z, z, LAMBD)[1]["invariance"].item() < 1e-6
    assert barlow_loss(torch.ones(256, 16), torch.ones(256, 16), LAMBD)[0].item() == pytest.approx(16)


def smallest_loss(n, dimensions, lambd):
    """The bound of docs/barlow.md: C has rank n - 1 at most, so its diagonal cannot be 1 with nothing off it."""
    redundancy = lambd * (dimensions**2 / (n - 1) - dimensions)
    return dimensions * redundancy / (dimensions + redundancy)


def test_small_batches_bound_the_loss_from_below_and_the_bound_is_reached():
    assert smallest_loss(64, 2048, LAMBD) == pytest.approx(279, abs=1)
    torch.manual_seed(0)
    z = torch.randn(2, 6, 20, requires_grad=True)
    optimizer = torch.optim.Adam([z], 0.05)
    for _ in range(800):
        loss = barlow_loss(z[0], z[1], 0.5)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bound = smallest_loss(6, 20, 0.5)
    assert 0.999 * bound < loss.item() < 1.02 * bound


def test_loss_is_computed_in_float32_from_bfloat16():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    assert torch.equal(barlow_loss(z1, z2, LAMBD)[0], barlow_loss(z1.float(), z2.float(), LAMBD)[0])


def test_constant_and_scheduled_learning_rates():
    args = Args(lr=2.0)
    assert [barlow.learning_rate(step, args, 100) for step in (1, 50, 100)] == [2.0, 2.0, 2.0]
    args = Args(lr=2.0, warmup_steps=10, cosine=True)
    found = [barlow.learning_rate(step, args, 110) for step in (5, 10, 60, 110)]
    assert found == pytest.approx([1.0, 2.0, 1.0, 0.0])


def test_a_view_is_noise_then_drop_points():
    """In all methods: test_methods.py."""
    args, batch = Args(noise_factor=0.5, drop_chance=(0.1, 0.2)), Batch(torch.randn(6, 100), torch.full((6,), 100))
    torch.manual_seed(0)
    found = barlow.view(batch, args)
    torch.manual_seed(0)
    torch.testing.assert_close(found, drop_points(*noise(batch.signal, batch.lengths, 0.5), 0.1, 0.2))
    assert not torch.equal(found[0], barlow.view(batch, args)[0])
