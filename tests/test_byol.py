"""BYOL: the loss and the paper's, what online and target network see, and the target that follows the online one."""

import numpy as np
import pytest
import torch
from torch import nn

import byol
from byol import Args, Predictor, Projector, byol_loss, forward, main, view
from common.chunks import Batch
from common.pore_model import PoreModel


def test_loss_is_half_of_the_papers():
    """Equation 2 of the paper, ||q - z||^2 of unit vectors, and its mirror image."""
    four = np.random.default_rng(0).normal(0.5, 1.0, (4, 10, 7))
    online1, online2, target1, target2 = four / np.linalg.norm(four, axis=2, keepdims=True)
    paper = (np.square(online1 - target2).sum(1) + np.square(online2 - target1).sum(1)).mean()
    assert byol_loss(*torch.tensor(four))[0].item() == pytest.approx(paper / 2, rel=1e-5)


def network():
    return nn.ModuleDict({"pore_model": PoreModel.of_size("tiny", dropout=0.0), "projector": Projector(128, 200, 16)})


def test_both_networks_see_both_views_and_the_target_has_no_predictor(monkeypatch):
    calls, args = [], Args()
    monkeypatch.setattr(byol, "byol_loss", lambda *inputs: calls.append(inputs) or byol_loss(*inputs))
    torch.manual_seed(0)
    models = nn.ModuleDict({"online": network(), "predictor": Predictor(16), "target": network()})
    batch = Batch(torch.randn(8, 200), torch.full((8,), 200))
    torch.manual_seed(1)
    loss, terms, embeddings = forward(models, batch, args)
    torch.manual_seed(1)
    view1, view2 = view(batch, args), view(batch, args)
    z1, z2, target1, target2 = (
        models[name]["projector"](*models[name]["pore_model"](*x))
        for name in ("online", "target")
        for x in (view1, view2)
    )
    expected = models["predictor"](z1), models["predictor"](z2), target1, target2
    torch.testing.assert_close(calls, [expected])
    torch.testing.assert_close((loss, terms, embeddings), (*byol_loss(*expected), z1))
    assert not any(target.requires_grad for target in calls[0][2:])
    loss.backward()
    assert all(p.grad is not None for name in ("online", "predictor") for p in models[name].parameters())


@pytest.mark.parametrize(("momentum", "steps"), [(0.0, 2), (1.0, 2), (0.9, 1)])
def test_target_parameters_move_by_1_minus_m_of_the_way_and_its_statistics_are_its_own(
    simulated, tmp_path, momentum, steps
):
    """With m = 0 the target is the online network, with m = 1 what it was at first; buffers never follow."""
    small = {"size": "tiny", "device": "cpu", "chunk_len": 200, "batch_size": 8, "embedding_dim": 32, "lr": 1e-3}
    args = Args(data=(simulated,), run_dir=tmp_path / "run", max_steps=steps, momentum=momentum, **small)
    main(args)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["models"]
    torch.manual_seed(args.seed)  # the online network as main makes it; the target begins equal to it
    begun = nn.ModuleDict({"pore_model": PoreModel.of_size("tiny"), "projector": Projector(128, 200, 32)})

    moved = {key: (saved[f"online.{key}"] - old, saved[f"target.{key}"] - old) for key, old in begun.named_parameters()}
    assert max(by.abs().max() for by, _ in moved.values()) > 0.9 * args.lr
    for by, target_by in moved.values():
        exact = momentum in (0.0, 1.0)
        torch.testing.assert_close(target_by, (1 - momentum) * by, rtol=0, atol=0 if exact else 1e-6)
    for key, old in begun.named_buffers():
        target = saved[f"target.{key}"]
        if key.endswith("num_batches_tracked"):
            assert target == 2 * steps  # both views
        else:
            assert not torch.equal(target, old)
            if "projector" in key:  # below dropout, both gather the same as long as their weights are the same
                assert not torch.equal(target, saved[f"online.{key}"])
    for name, path in (("online", "pore_model.pt"), ("target", "target_pore_model.pt")):
        weights = torch.load(tmp_path / "run" / path, weights_only=True)
        assert all(torch.equal(value, saved[f"{name}.pore_model.{key}"]) for key, value in weights.items())
        PoreModel.from_state_dict(weights)
