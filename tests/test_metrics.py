"""Feature spread and effective rank of cases whose value is known beforehand."""

import math

import pytest
import torch

from common.metrics import effective_rank, feature_spread


def test_feature_spread_is_one_for_directions_spread_evenly():
    axes = torch.eye(32)
    assert feature_spread(torch.cat([axes, -axes])) == pytest.approx(1.0, abs=1e-6)
    torch.manual_seed(0)
    assert feature_spread(torch.randn(4096, 64)) == pytest.approx(1.0, abs=0.01)


def test_feature_spread_is_zero_when_collapsed_whatever_the_lengths():
    direction = torch.linspace(-1, 2, 64)
    assert feature_spread(direction.repeat(100, 1)) == pytest.approx(0.0, abs=1e-5)
    assert feature_spread(torch.linspace(0.1, 50, 100)[:, None] * direction) == pytest.approx(0.0, abs=1e-5)


def test_feature_spread_of_known_directions():
    """Two opposite directions: sd 1 in one of four dimensions, so 1/4 * sqrt(4)."""
    r = torch.tensor([[3.0, 0, 0, 0], [-7.0, 0, 0, 0]])
    assert feature_spread(r) == pytest.approx(0.5, abs=1e-6)


def with_spectrum(values, rows=100, dimensions=40):
    """Centred embeddings (rows, dimensions) with these singular values, moved away from the origin."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(0))[0]
    right = torch.linalg.qr(torch.randn(dimensions, len(values), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T + torch.ones(dimensions)


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_effective_rank_of_k_equal_singular_values_is_k(k):
    assert effective_rank(with_spectrum([5.0] * k)) == pytest.approx(k, rel=1e-3)


def test_effective_rank_is_the_exponential_of_the_entropy():
    """Singular values 6, 3, 1: p = 0.6, 0.3, 0.1 (not their squares)."""
    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1))
    assert effective_rank(with_spectrum([6.0, 3.0, 1.0])) == pytest.approx(math.exp(entropy), rel=1e-3)
    assert effective_rank(1e-3 * with_spectrum([6.0, 3.0, 1.0])) == pytest.approx(math.exp(entropy), rel=1e-3)


@pytest.mark.parametrize("shape", [(512, 600), (600, 512)])
def test_effective_rank_of_a_large_batch_is_that_of_an_svd_in_float64(shape):
    torch.manual_seed(0)
    embeddings = torch.randn(shape) * torch.logspace(-3, 0, shape[1]) + 3
    centred = embeddings.double() - embeddings.double().mean(0)
    p = torch.linalg.svdvals(centred) / torch.linalg.svdvals(centred).sum()
    assert effective_rank(embeddings) == pytest.approx(math.exp(-(p * p.clamp(min=1e-300).log()).sum()), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_effective_rank_is_zero_when_all_are_equal(scale):
    assert effective_rank(scale * torch.linspace(-1, 2, 64).repeat(100, 1)) == 0


@pytest.mark.parametrize("metric", [feature_spread, effective_rank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_are_floats_and_leave_no_graph(metric, dtype):
    r = torch.randn(8, 4, dtype=dtype, requires_grad=True)
    assert isinstance(metric(r), float)
    assert r.grad is None
