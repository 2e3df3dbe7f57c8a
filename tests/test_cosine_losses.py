"""The loss that SimSiam and BYOL share: against NumPy, its stop-gradient, pairing, closed forms and invariances."""

import numpy as np
import pytest
import torch

from byol import byol_loss
from simsiam import simsiam_loss

LOSSES = {"simsiam": simsiam_loss, "byol": lambda z1, z2, p1, p2: byol_loss(p1, p2, z1, z2)}


@pytest.fixture(params=LOSSES)
def loss_function(request):
    """The loss of embeddings z1, z2, into which no gradient goes, and predictions p1, p2."""
    return LOSSES[request.param]


def reference_terms(z1, z2, p1, p2):
    """Mean cosine of z1 and p2 and of z2 and p1, row by row, in float64."""
    cosines = []
    for one, other in ((z1, p2), (z2, p1)):
        total = 0.0
        for a, b in zip(one, other, strict=True):
            dot, aa, bb = (sum(x * y for x, y in zip(v, w, strict=True)) for v, w in ((a, b), (a, a), (b, b)))
            total += dot / np.sqrt(aa * bb)
        cosines.append(total / len(one))
    return cosines


@pytest.fixture
def four():
    """z1, z2, p1, p2 (10, 7), no two of them alike."""
    rng = np.random.default_rng(0)
    z1 = rng.normal(1.0, 2.0, (10, 7))
    return [z1, *(z1 + rng.normal(0.0, scale, z1.shape) for scale in (1.0, 2.0, 3.0))]


@pytest.fixture
def loss_of(loss_function):
    return lambda *arrays: loss_function(*(torch.as_tensor(array).float() for array in arrays))[0].item()


def test_loss_terms_and_gradient_equal_float64_numpy(loss_function, four):
    z1, z2, p1, p2 = (torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in four)
    loss, terms = loss_function(z1, z2, p1, p2)
    cosine1, cosine2 = reference_terms(*four)
    assert [terms["cosine1"].item(), terms["cosine2"].item()] == pytest.approx([cosine1, cosine2], rel=1e-5)
    assert loss.item() == pytest.approx(2 - cosine1 - cosine2, rel=1e-5)
    loss.backward()
    for number, p in ((2, p1), (3, p2)):
        for row, column in ((0, 0), (3, 5), (9, 6)):
            up, down = ([array.copy() for array in four] for _ in range(2))
            up[number][row, column] += 1e-5
            down[number][row, column] -= 1e-5
            slope = (sum(reference_terms(*down)) - sum(reference_terms(*up))) / 2e-5
            assert p.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_no_gradient_reaches_the_embeddings(loss_function, four):
    z1, z2, p1, p2 = (torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in four)
    loss_function(z1, z2, p1, p2)[0].backward()
    assert z1.grad is None and z2.grad is None
    assert p1.grad.abs().min() > 0 and p2.grad.abs().min() > 0


def test_loss_is_0_for_equal_2_for_orthogonal_and_4_for_opposite_views(loss_of):
    torch.manual_seed(0)
    z = torch.randn(6, 4)
    left, right = torch.eye(8)[:4], torch.eye(8)[4:]
    assert loss_of(z, z, z, z) == pytest.approx(0, abs=1e-6)
    assert loss_of(left, left, right, right) == pytest.approx(2)
    assert loss_of(z, z, -z, -z) == pytest.approx(4)


def test_the_prediction_from_one_view_is_compared_with_the_other_view(loss_of):
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 50)
    assert loss_of(a, b, b, a) == pytest.approx(0, abs=1e-6)
    assert loss_of(a, b, a, b) > 1


def test_loss_ignores_the_length_of_each_row_and_the_order_of_the_batch(loss_of, four):
    loss = loss_of(*four)
    rng = np.random.default_rng(1)
    assert loss_of(*(array * rng.uniform(0.1, 10, (10, 1)) for array in four)) == pytest.approx(loss, rel=1e-5)
    order = rng.permutation(10)
    assert loss_of(*(array[order] for array in four)) == pytest.approx(loss, rel=1e-5)
    z1, z2, p1, p2 = four
    assert loss_of(z2, z1, p2, p1) == pytest.approx(loss, rel=1e-5)
    assert loss_of(z1[order], z2[order], p1, p2) != pytest.approx(loss, rel=1e-2)


def test_loss_is_computed_in_float32_from_bfloat16(loss_function, four):
    low = [torch.tensor(array).bfloat16() for array in four]
    assert torch.equal(loss_function(*low)[0], loss_function(*(array.float() for array in low))[0])
