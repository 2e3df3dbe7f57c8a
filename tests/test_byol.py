"""BYOL: the loss against NumPy, its stop-gradient and pairing, and the target network that follows the online one."""

import numpy as np
import pytest
import torch

import byol
from byol import Args, Predictor, byol_loss, main
from common.augment import view
from common.data import Chunks, open_data
from common.pore_model import PoreModel, RepresentationHead
from common.run import seed_step


def test_loss_is_half_of_the_papers():
    """Equation 2 of the paper, ||h - r||^2 of unit vectors, and its mirror image."""
    four = np.random.default_rng(0).normal(0.5, 1.0, (4, 10, 7))
    h1, h2, r1, r2 = four / np.linalg.norm(four, axis=2, keepdims=True)
    paper = (np.square(h1 - r2).sum(1) + np.square(h2 - r1).sum(1)).mean()
    assert byol_loss(*torch.tensor(four))[0].item() == pytest.approx(paper / 2, rel=1e-5)


def small_args(data, folder, **changes):
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 200, "batch_size": 8, "representation": 32, "lr": 1e-3}
    return Args(data=(data,), run_dir=folder, **settings | changes)


def initial_models(args):
    """The online networks as main makes them, before its first step; those of the target are equal to them."""
    torch.manual_seed(args.seed)
    pore_model = PoreModel.of_size(args.size)
    head = RepresentationHead(pore_model.channels, args.chunk_len, args.representation)
    return pore_model, head, Predictor(args.representation)


@pytest.mark.parametrize(("momentum", "steps"), [(0.0, 3), (1.0, 3), (0.9, 1)])
def test_target_parameters_move_by_1_minus_m_of_the_way_and_its_statistics_are_its_own(
    simulated, tmp_path, momentum, steps
):
    """With m = 0 the target is the online network, with m = 1 what it was at first; buffers never follow."""
    args = small_args(simulated, tmp_path / "run", max_steps=steps, momentum=momentum)
    main(args)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name, begun in zip(("pore_model", "head"), initial_models(args)[:2], strict=True):
        online, target = saved[name], saved[f"target_{name}"]
        moved = {key: (online[key] - old, target[key] - old) for key, old in begun.named_parameters()}
        assert max(by.abs().max() for by, _ in moved.values()) > 0.9 * args.lr
        for by, target_by in moved.values():
            exact = momentum in (0.0, 1.0)
            torch.testing.assert_close(target_by, (1 - momentum) * by, rtol=0, atol=0 if exact else 1e-6)
        for key, old in begun.named_buffers():
            if key.endswith("num_batches_tracked"):
                assert target[key] == 2 * steps  # both views
            else:
                assert not torch.equal(target[key], old)
                if name == "head":  # below dropout, both gather the same as long as their weights are the same
                    assert not torch.equal(target[key], online[key])
    for name in ("pore_model", "target_pore_model"):
        weights = torch.load(tmp_path / "run" / f"{name}.pt", weights_only=True)
        assert all(torch.equal(weights[key], saved[name][key]) for key in saved[name])
        PoreModel.from_state_dict(weights)


def test_target_sees_the_augmented_views_and_not_the_online_output(simulated, tmp_path, monkeypatch):
    """With m = 1 the target stays as it began, so that what it says of the second step's views is known."""
    calls, of_size = [], PoreModel.of_size
    monkeypatch.setattr(PoreModel, "of_size", lambda size: of_size(size, dropout=0.0))  # so is what the online one says
    monkeypatch.setattr(byol, "byol_loss", lambda *inputs: calls.append(inputs) or byol_loss(*inputs))
    args = small_args(simulated, tmp_path / "run", max_steps=2, momentum=1.0)
    main(args)

    pore_model, head, predictor = initial_models(args)
    chunks = Chunks(open_data(args.data), args.chunk_len, "training")
    for step in (1, 2):
        seed_step(args.seed, step)
        batch = chunks.batch(args.seed, step - 1, args.batch_size)
        r1, r2 = (head(*pore_model(*view(batch.signal, batch.lengths))) for _ in range(2))
        h1, h2, t1, t2 = calls[step - 1]
        torch.testing.assert_close((t1, t2), (r1.detach(), r2.detach()))
        if step == 1:  # afterwards the online networks have moved
            torch.testing.assert_close((h1, h2), (predictor(r1), predictor(r2)))
