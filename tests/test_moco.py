"""MoCo: the loss against NumPy and known values, the queue, the moving average, keys in groups of their own."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moco
from common.pore_model import PoreModel
from moco import Args, Projector, embed, moco_loss, update_average

TAU = 0.2


def reference(q, k, queue, tau):
    """Equation 1 of the paper, its mean over the batch, in float64; and for each query the keys that beat its own."""
    losses, better = [], []
    for row, own in zip(q, k, strict=True):
        row = row / math.sqrt(row @ row)
        positive = row @ own / math.sqrt(own @ own) / tau
        negatives = [row @ key / tau for key in queue]
        losses.append(-math.log(math.exp(positive) / (math.exp(positive) + sum(map(math.exp, negatives)))))
        better.append(sum(negative > positive for negative in negatives))
    return sum(losses) / len(losses), np.array(better)


@pytest.fixture
def arrays():
    """q, k (60, 6) and a queue of 30 keys of length 1."""
    rng = np.random.default_rng(0)
    k, queue = rng.normal(0.5, 3.0, (60, 6)), rng.normal(0.0, 1.0, (30, 6))
    return k + rng.normal(0.0, 3.0, k.shape), k, queue / np.linalg.norm(queue, axis=1, keepdims=True)


@pytest.fixture
def tensors(arrays):
    return [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in arrays]


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_loss_and_the_gradient_of_the_query_alone_equal_float64_numpy(arrays, tensors, tau):
    loss, terms = moco_loss(*tensors, tau)
    assert loss.item() == pytest.approx(reference(*arrays, tau)[0], rel=1e-5)
    assert loss.item() == pytest.approx((terms["alignment"] + terms["uniformity"]).item())
    loss.backward()
    assert tensors[1].grad is None and tensors[2].grad is None
    for row, column in ((0, 0), (5, 3), (59, 5)):
        up, down = arrays[0].copy(), arrays[0].copy()
        up[row, column] += 1e-5
        down[row, column] -= 1e-5
        slope = (reference(up, *arrays[1:], tau)[0] - reference(down, *arrays[1:], tau)[0]) / 2e-5
        assert tensors[0].grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_top1_and_top5_equal_numpy(arrays, tensors):
    better, terms = reference(*arrays, TAU)[1], moco_loss(*tensors, TAU)[1]
    assert {0, 4, 5} <= set(better)  # both sides of the borders are there
    assert terms["top1"].item() == pytest.approx(np.mean(better < 1))
    assert terms["top5"].item() == pytest.approx(np.mean(better < 5))


@pytest.mark.parametrize("copies, top1, top5", [(0, 1.0, 1.0), (1, 0.0, 1.0), (4, 0.0, 1.0), (5, 0.0, 0.0)])
def test_a_tie_is_no_success(copies, top1, top5):
    key = torch.eye(4)[:1]
    terms = moco_loss(key, key, torch.cat([key] * copies + [torch.eye(4)[1:]]), TAU)[1]
    assert (terms["top1"].item(), terms["top5"].item()) == (top1, top5)


def test_equal_similarities_give_ln_of_all_keys():
    loss = moco_loss(torch.ones(8, 4), torch.ones(8, 4), torch.full((8192, 4), 0.5), 0.1)[0].item()
    assert loss == pytest.approx(math.log(8193), rel=1e-6) and loss == pytest.approx(9.011, abs=1e-3)


def test_loss_of_a_key_far_more_similar_than_the_queue_is_not_negative():
    """With the queue alone below the line, as in the thesis, it would be ln 3 - 10 = -8.9 and -18.9 here."""
    key, others = torch.eye(4)[:1], torch.eye(4)[1:]
    assert moco_loss(key, key, others, 0.1)[0].item() == pytest.approx(math.log1p(3 * math.exp(-10)), abs=2e-6)
    assert 0 <= moco_loss(key, key, -key.repeat(3, 1), 0.1)[0].item() < 1e-5


def test_loss_ignores_the_length_of_queries_and_keys_but_not_which_belong_together(tensors):
    q, k, queue = tensors
    torch.manual_seed(0)
    loss = moco_loss(q, k, queue, TAU)[0].item()
    scaled = moco_loss(q * (torch.rand(60, 1) + 0.1), k * (10 * torch.rand(60, 1) + 0.1), queue, TAU)[0].item()
    assert scaled == pytest.approx(loss, rel=1e-5)
    assert moco_loss(q, k.roll(1, 0), queue, TAU)[0].item() > loss + 0.1


def test_loss_is_computed_in_float32_from_bfloat16():
    torch.manual_seed(0)
    (q, k), queue = torch.randn(2, 16, 64, dtype=torch.bfloat16), F.normalize(torch.randn(50, 64), dim=1)
    loss, _ = moco_loss(q, k, queue, TAU)
    assert loss.dtype == torch.float32 and torch.equal(loss, moco_loss(q.float(), k.float(), queue, TAU)[0])


def test_moving_average_is_that_of_all_parameters_and_of_no_buffer():
    """After n steps it is m^n a_0 + (1 - m) sum_i m^(n - 1 - i) b_i."""
    average, model = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double() for _ in range(2))
    expected = [0.9**5 * p.detach() for p in average.parameters()]
    average[1].running_mean.fill_(0.3)
    for i in range(5):
        for p, total in zip(model.parameters(), expected, strict=True):
            nn.init.normal_(p)
            total += (1 - 0.9) * 0.9 ** (4 - i) * p.detach()
        model[1](torch.randn(6, 4, dtype=torch.float64))  # its buffers move, too
        update_average(average, model, 0.9)
    for p, total in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), total, rtol=1e-12, atol=1e-14)
    assert (average[1].running_mean == 0.3).all() and (average[1].running_var == 1).all()
    assert average[1].num_batches_tracked == 0


@pytest.fixture
def network():
    """Pore model and projector without dropout, in float64, their BatchNorm statistics those of no batch."""
    torch.manual_seed(0)
    modules = {"pore_model": PoreModel.of_size("tiny", dropout=0.0), "projector": Projector(128, 80, 16)}
    network = nn.ModuleDict(modules).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return network


@pytest.fixture
def a_view(network):
    """Of 8 chunks, of different lengths."""
    return torch.randn(8, 80).double(), torch.tensor([80, 70, 61, 56, 75, 66, 50, 42])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_one_group_is_the_plain_forward_in_any_order(network, a_view, training, shuffle):
    network.train(training)
    expected = network["projector"](*network["pore_model"](*a_view))
    torch.testing.assert_close(embed(network, a_view, 1, shuffle), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_have_statistics_of_their_own_and_rows_return_in_order(network, a_view, shuffle):
    torch.manual_seed(1)
    order = torch.randperm(8) if shuffle else torch.arange(8)
    torch.manual_seed(1)
    embeddings = embed(network, a_view, 4, shuffle)
    for rows in order.reshape(4, 2):
        expected = network["projector"](*network["pore_model"](*(x[rows] for x in a_view)))
        torch.testing.assert_close(embeddings[rows], expected, rtol=1e-9, atol=1e-10)
    assert (embeddings - embed(network, a_view, 1, shuffle)).abs().max() > 0.01  # the groups matter
    network.eval()  # but not in validation
    torch.testing.assert_close(*(embed(network, a_view, groups, shuffle) for groups in (4, 1)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [6, 3])
def test_a_key_meets_the_queue_before_it_enters_and_its_network_follows(simulated, tmp_path, monkeypatch, size):
    """With momentum 0 all parameters of the key's network are the query's; all their buffers are their own."""
    seen, views, shuffled = [], [], []
    view = moco.view

    def loss(q, k, queue, temperature):
        if q.requires_grad:  # not in validation, after which the queue is as before
            seen.append((F.normalize(k, dim=1), queue.clone()))
            assert not (k.requires_grad or queue.requires_grad)
        return moco_loss(q, k, queue, temperature)

    def spy(network, given, groups, shuffle):
        of_keys = not any(module.p for module in network.modules() if isinstance(module, nn.Dropout))
        assert given is views[-1 if of_keys else -2] and groups == 2 and shuffle == of_keys
        shuffled.append(shuffle)
        return embed(network, given, groups, shuffle)

    monkeypatch.setattr(moco, "moco_loss", loss)
    monkeypatch.setattr(moco, "embed", spy)
    monkeypatch.setattr(moco, "view", lambda *given: views.append(view(*given)) or views[-1])
    small = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 4, "embedding_dim": 8}
    changes = {"queue": size, "momentum": 0.0, "batchnorm_groups": 2, "max_steps": 3}
    run = tmp_path / "run"
    moco.main(Args(data=(simulated,), run_dir=run, **small | changes))
    assert len(views) > 6 and shuffled == [False, True] * (len(views) // 2)  # in validation as well

    (keys, queue), *rest = seen
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(size))
    assert (queue @ queue.T).fill_diagonal_(0).max() < 0.999
    state = torch.load(run / "checkpoint.pt", weights_only=True)["models"]
    for next_keys, found in (*rest, (None, state["queue"])):
        queue = torch.cat([queue, keys])[-size:]
        torch.testing.assert_close(found, queue)
        keys = next_keys
    for name in (name.removeprefix("key.") for name in state if name.startswith("key.") and "num_batches" not in name):
        assert torch.equal(state[f"key.{name}"], state[f"query.{name}"]) != ("running_" in name), name
