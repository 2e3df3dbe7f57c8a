"""SimSiam: what the stop-gradient does, the predictor, what forward() compares, and what a collapse looks like."""

from dataclasses import replace

import torch
from torch import nn

import simsiam
from benchmark.collapse import collapse_args, loss_without_stop_gradient
from benchmark.plot_runs import read_metrics
from common.chunks import Batch
from common.pore_model import PoreModel
from simsiam import Args, Predictor, Projector, forward, main, simsiam_loss, view


def test_with_no_predictor_the_stop_gradient_only_halves_the_gradient():
    """Why the predictor has to be there: the cosine is symmetric, so each half of the loss gives the same gradient."""
    torch.manual_seed(0)
    given, gradients = torch.randn(2, 10, 7), []
    for loss in (simsiam_loss, loss_without_stop_gradient):
        z = given.clone().requires_grad_()
        loss(*z, *z)[0].backward()
        gradients.append(z.grad)
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_predictor_is_shaped_like_the_mlp_of_the_projector():
    predictor, mlp = Predictor(48), Projector(128, 400, 48).mlp
    assert [type(layer) for layer in predictor] == [type(layer) for layer in mlp]
    shapes = [[tuple(p.shape) for p in module.parameters()] for module in (predictor, mlp)]
    assert shapes[0][0] == (48, 48)  # of the projector's, the first layer's input is as wide as what it pooled
    assert shapes[0][1:] == shapes[1][1:]


def test_each_view_is_predicted_from_the_embedding_of_the_other(monkeypatch):
    calls, args = [], Args()
    monkeypatch.setattr(simsiam, "simsiam_loss", lambda *inputs: calls.append(inputs) or simsiam_loss(*inputs))
    torch.manual_seed(0)
    pore_model, projector = PoreModel.of_size("tiny", dropout=0.0), Projector(128, 200, 16)
    models = nn.ModuleDict({"pore_model": pore_model, "projector": projector, "predictor": Predictor(16)})
    batch = Batch(torch.randn(8, 200), torch.full((8,), 200))
    torch.manual_seed(1)
    loss, terms, embeddings = forward(models, batch, args)
    torch.manual_seed(1)
    z1, z2 = (projector(*pore_model(*view(batch, args))) for _ in range(2))
    expected = z1, z2, models["predictor"](z1), models["predictor"](z2)
    torch.testing.assert_close(calls, [expected])
    torch.testing.assert_close((loss, terms, embeddings), (*simsiam_loss(*expected), z1))


def test_without_stop_gradient_the_features_collapse_while_the_loss_looks_fine(simulated, tmp_path, monkeypatch):
    """Why feature_spread is logged: it ends near 0.9 with stop-gradient and 0.05 without, losses 0.4 and 0.004."""
    logs = {}
    for name, loss in (("healthy", simsiam_loss), ("collapsed", loss_without_stop_gradient)):
        monkeypatch.setattr(simsiam, "simsiam_loss", loss)
        main(replace(collapse_args(simulated, tmp_path / name), batch_size=16, max_steps=40))
        logs[name] = [line for line in read_metrics(tmp_path / name) if "loss" in line]
    healthy, collapsed = logs["healthy"], logs["collapsed"]
    assert min(line["feature_spread"] for line in healthy) > 0.6
    assert collapsed[-1]["feature_spread"] < min(0.1, 0.5 * collapsed[0]["feature_spread"])
    assert healthy[-1]["effective_rank"] > 5 > collapsed[-1]["effective_rank"]
    assert collapsed[-1]["loss"] < 0.05 < healthy[-1]["loss"] < 1.5  # the better loss is that of the worthless model
