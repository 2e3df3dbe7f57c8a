"""SimSiam: the loss against NumPy, its stop-gradient and pairing, the predictor, and what a collapse looks like."""

import pytest
import torch

import simsiam
from benchmark.collapse import collapse_args, loss_without_stop_gradient
from benchmark.plot_runs import read_metrics
from common.augment import view
from common.data import Chunks, open_data
from common.pore_model import PoreModel, RepresentationHead
from common.run import seed_step
from simsiam import Args, Predictor, main, simsiam_loss


@pytest.fixture
def four():
    """x1, x2, h1, h2 (10, 7)."""
    return torch.randn(4, 10, 7, generator=torch.Generator().manual_seed(0)).numpy()


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
    """Why feature_spread is logged: it ends near 0.9 with stop-gradient and 0.03 without, losses 0.4 and 0.001."""
    logs = {}
    for name, loss in (("healthy", simsiam_loss), ("collapsed", loss_without_stop_gradient)):
        monkeypatch.setattr(simsiam, "simsiam_loss", loss)
        main(collapse_args(simulated, tmp_path / name))
        logs[name] = [line for line in read_metrics(tmp_path / name) if "loss" in line]
    healthy, collapsed = logs["healthy"], logs["collapsed"]
    assert min(line["feature_spread"] for line in healthy) > 0.6
    assert collapsed[-1]["feature_spread"] < min(0.1, 0.5 * collapsed[0]["feature_spread"])
    assert healthy[-1]["effective_rank"] > 5 > collapsed[-1]["effective_rank"]
    assert collapsed[-1]["loss"] < 0.05 < healthy[-1]["loss"] < 1.5  # the better loss is that of the worthless model
