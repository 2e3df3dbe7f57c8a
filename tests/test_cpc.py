"""CPC: the loss against NumPy, contexts that see no future, the present frame, and the defaults of a run."""

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

import cpc
from benchmark.plot_runs import read_metrics
from common.chunks import Batch, Chunks, open_data
from common.pore_model import PoreModel, valid_positions
from cpc import Args, Prediction, cpc_loss, draw_accuracy, future_and_context, main, random_present, validate

STEPS = {"wide": 35, "thin": 7}  # P by default
SEEN = {"wide": (-15, 15), "thin": (0, 7)}  # first and last sample that frame t sees, from 8 t on
both_encoders = pytest.mark.parametrize("encoder", ["wide", "thin"])


# --------------------------------------------------------------------------------------------------------- the loss


def reference_loss(z, c, W):
    """Equations 3 and 4 of the paper, score by score, in float64; and the accuracy of each step."""
    n, steps, channels = z.shape
    losses, right = np.zeros((steps, n)), np.zeros((steps, n))
    for k in range(steps):
        for i in range(n):
            scores = np.zeros(n)
            for j in range(n):
                for a in range(channels):
                    scores[j] += z[j, k, a] * sum(W[k, a, b] * c[i, b] for b in range(channels))
            losses[k, i] = -np.log(np.exp(scores[i]) / np.exp(scores).sum())
            right[k, i] = scores.argmax() == i
    return losses.mean(), right.mean(1)


@pytest.fixture
def inputs():
    """z (6, 3, 4), c (6, 4) and W (3, 4, 4); the later the step, the better it can be predicted."""
    rng = np.random.default_rng(1)
    c, W = rng.normal(0, 1, (6, 4)), rng.normal(0, 0.7, (3, 4, 4))
    z = np.einsum("kab,ib,k->ika", W, c, [0, 0.3, 2]) + rng.normal(0, 0.5, (6, 3, 4))
    return z, c, W


def tensors(inputs):
    return [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in inputs]


def test_loss_gradients_and_accuracies_equal_float64_numpy(inputs):
    given = tensors(inputs)
    loss, terms = cpc_loss(*given)
    expected, accuracy = reference_loss(*inputs)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert [terms.pop(f"accuracy/{k}").item() for k in (1, 2, 3)] == pytest.approx(accuracy)
    assert len(set(accuracy)) == 3  # or the order of the steps would not show
    assert terms.pop("accuracy").item() == pytest.approx(accuracy.mean()) and not terms

    loss.backward()
    for number, tensor in enumerate(given):
        slopes = np.zeros(tensor.shape)
        for place in np.ndindex(*tensor.shape):
            up, down = ([x.copy() for x in inputs] for _ in range(2))
            up[number][place] += 1e-5
            down[number][place] -= 1e-5
            slopes[place] = (reference_loss(*up)[0] - reference_loss(*down)[0]) / 2e-5
        assert np.abs(slopes).min() > 0
        np.testing.assert_allclose(tensor.grad, slopes, rtol=1e-3, atol=1e-5)


def test_equal_scores_cost_ln_32():
    torch.manual_seed(0)
    z, c = torch.randn(32, 35, 8), torch.randn(32, 8)
    loss, terms = cpc_loss(z, c, torch.zeros(35, 8, 8))
    assert loss.item() == pytest.approx(3.466, abs=1e-3)
    assert terms["accuracy"].item() == pytest.approx(1 / 32)


def test_each_context_chooses_among_frames_not_each_frame_among_contexts(inputs):
    """Nothing tells equal frames apart, whatever the contexts; equal contexts still have frames that suit them more."""
    z, c, W = (torch.tensor(x, dtype=torch.float32) for x in inputs)
    assert cpc_loss(z[:1].expand_as(z), c, W)[0].item() == pytest.approx(np.log(6), rel=1e-6)
    assert cpc_loss(z, c[:1].expand_as(c), W)[0].item() > np.log(6) + 0.1


def test_perfect_predictions_cost_nothing_and_those_of_other_steps_or_of_w_transposed_do():
    torch.manual_seed(0)
    c = torch.eye(16)[:8]
    W = torch.stack([torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(5)])
    z = 20 * torch.einsum("kab,ib->ika", W, c)  # so the scores are 20 where i = j and 0 elsewhere
    loss, terms = cpc_loss(z, c, W)
    assert loss.item() < 1e-6 and set(map(float, terms.values())) == {1.0}
    for changed in (cpc_loss(z.roll(1, 1), c, W), cpc_loss(z, c, W.mT)):
        assert changed[0].item() > 1 and changed[1]["accuracy"].item() < 0.5


def test_order_of_the_batch_does_not_matter_but_which_frame_follows_which_context_does(inputs):
    z, c, W = (torch.tensor(x, dtype=torch.float32) for x in inputs)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    loss, terms = cpc_loss(z, c, W)
    shuffled, shuffled_terms = cpc_loss(z[order], c[order], W)
    assert shuffled.item() == pytest.approx(loss.item(), rel=1e-5)
    assert {k: v.item() for k, v in shuffled_terms.items()} == pytest.approx({k: v.item() for k, v in terms.items()})
    for changed in (cpc_loss(z[order], c, W), cpc_loss(z, c[order], W)):
        assert changed[0].item() > loss.item() + 0.5


def test_loss_is_computed_in_float32_from_bfloat16():
    torch.manual_seed(0)
    z, c, W = torch.randn(8, 5, 16), torch.randn(8, 16), torch.randn(5, 16, 16)
    z, c = z.bfloat16(), c.bfloat16()
    loss, terms = cpc_loss(z, c, W)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cpc_loss(z.float(), c.float(), W)[0])
    assert torch.equal(terms["accuracy"], cpc_loss(z.float(), c.float(), W)[1]["accuracy"])


def test_a_new_prediction_holds_all_frames_about_equal():
    torch.manual_seed(0)
    W = Prediction(35, 128).W
    assert W.shape == (35, 128, 128) and W.requires_grad
    model = PoreModel.of_size("tiny")
    z, c = future_and_context(model, torch.randn(32, 400), torch.full((32,), 400), 5, 35)
    scores = c @ W.mT @ z.permute(1, 2, 0)
    assert 0.1 < scores.std() < 1
    assert cpc_loss(z, c, W)[0].item() == pytest.approx(np.log(32), abs=0.3)


# ---------------------------------------------------------------------------------------------- future and context


def pore_model(encoder, training=False):
    """A tiny pore model with nothing random but its weights, and BatchNorms that do not leave zero as it is."""
    torch.manual_seed(0)
    model = PoreModel.of_size("tiny", dropout=0.0, encoder=encoder)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    return model.train(training)


def chunk_batch(n=3, width=200):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1)), torch.full((n,), width)


@both_encoders
@pytest.mark.parametrize("t", [0, 1, 10, 19])
def test_z_is_the_frames_after_t_and_c_the_context_of_what_ends_with_t(encoder, t):
    model = pore_model(encoder)
    signal, lengths = chunk_batch()
    z, c = future_and_context(model, signal, lengths, t, 5)
    frames = model.encoder(signal)[0]
    assert z.shape == (3, 5, 128) and c.shape == (3, 128)
    for k in (1, 2, 3, 4, 5):
        torch.testing.assert_close(z[:, k - 1], frames[:, t + k])
    past = signal[:, : 8 * t + SEEN[encoder][1] + 1]  # all that frames 0 to t see, whatever the encoder
    torch.testing.assert_close(c, model.contextualise(model.encoder(past)[0][:, : t + 1])[:, t])
    if encoder == "thin":  # frames that see nothing beyond their own samples: the pore model of the signal cut there
        torch.testing.assert_close(c, model(past)[0][:, -1])


@both_encoders
@pytest.mark.parametrize("t", [0, 10])
@torch.no_grad()
def test_context_does_not_see_what_only_later_frames_see(encoder, t):
    model = pore_model(encoder)
    signal, lengths = chunk_batch()
    last = 8 * t + SEEN[encoder][1]
    z, c = future_and_context(model, signal, lengths, t, 5)
    for sample in (last + 1, last):
        changed = signal.clone()
        changed[:, sample:] = 7.0
        changed_z, changed_c = future_and_context(model, changed, lengths, t, 5)
        assert not torch.equal(changed_z[:, -1], z[:, -1])
        assert torch.equal(changed_c, c) == (sample > last)
    signal[:, last] += 1.0
    assert not torch.isclose(future_and_context(model, signal, lengths, t, 5)[1], c).all(1).any()


@both_encoders
def test_gradients_of_c_and_z_reach_the_samples_their_frames_see_and_no_others(encoder):
    model, t, steps = pore_model(encoder), 6, 3
    signal, lengths = chunk_batch()
    signal.requires_grad_()
    before, after = SEEN[encoder]
    z, c = future_and_context(model, signal, lengths, t, steps)
    (grad,) = torch.autograd.grad((c * torch.randn_like(c)).sum(), signal, retain_graph=True)
    assert (grad != 0).any(0).nonzero().flatten().tolist() == list(range(8 * t + after + 1))
    (grad,) = torch.autograd.grad((z * torch.randn_like(z)).sum(), signal)
    seen = range(8 * (t + 1) + before, 8 * (t + steps) + after + 1)
    assert (grad != 0).any(0).nonzero().flatten().tolist() == list(seen)


@both_encoders
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_padding_changes_neither_z_nor_c(encoder, training):
    """As with --drop-chance: rows of different lengths, here with the last predicted frame at the shortest's end."""
    lengths = torch.tensor([200, 131, 164])
    t, steps = 11, 5  # 131 samples are 17 frames
    found = []
    for garbage in (0.0, 1e6, float("nan")):
        model = pore_model(encoder, training)
        signal = chunk_batch()[0].masked_fill(~valid_positions(lengths, 200), garbage)
        found.append(future_and_context(model, signal, lengths, t, steps))
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))
    if not training:
        for row, length in enumerate(lengths):
            alone = future_and_context(model, signal[row : row + 1, :length], length[None], t, steps)
            for a, b in zip(alone, found[0], strict=True):
                torch.testing.assert_close(a[0], b[row])


# ----------------------------------------------------------------------------------------------- the present frame


@pytest.mark.parametrize("lengths", [[64, 100, 80], [200, 57, 64], [400, 400, 58]])
def test_the_present_frame_leaves_all_future_steps_in_the_shortest_row_and_can_be_any_such(lengths):
    torch.manual_seed(0)
    drawn = [random_present(torch.tensor(lengths), 5) for _ in range(300)]  # the shortest row has 8 frames
    assert set(drawn) == {0, 1, 2}
    assert min(drawn.count(t) for t in (0, 1, 2)) > 60


# ------------------------------------------------------------------------------------------------------- validation


class Tiles:
    """Validation chunks of batches of these sizes."""

    def __init__(self, *sizes):
        generator = torch.Generator().manual_seed(2)
        self.batches = [Batch(torch.randn(n, 200, generator=generator), torch.full((n,), 200)) for n in sizes]

    def tiles(self, batch_size, equal):
        return iter(self.batches)


def test_validation_repeats_itself_and_averages_over_batches():
    args = Args(batch_size=8, future_steps=5, device="cpu")
    models = nn.ModuleDict({"pore_model": PoreModel.of_size("tiny"), "prediction": Prediction(5, 128)})

    def losses(*sizes):
        found = validate(models, Tiles(*sizes), args, torch.device("cpu"))
        assert models["pore_model"].training
        return found

    both = losses(8, 8)
    assert losses(8, 8) == both != losses(8)
    assert both.keys() == {f"validation/{x}" for x in ("loss", "accuracy", *(f"accuracy/{k}" for k in range(1, 6)))}
    assert both["validation/loss"] == pytest.approx(np.log(8), abs=0.2)
    assert losses(3)["validation/loss"] == pytest.approx(np.log(3), abs=0.2)  # all there is


def test_accuracies_are_drawn_as_a_bar_for_each_step():
    accuracy = [0.9, 0.25, 0.5]
    figure = draw_accuracy({f"validation/accuracy/{k}": a for k, a in enumerate(accuracy, 1)}, 3, 1 / 8)
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([90, 25, 50])
    assert [bar.get_center()[0] for bar in axes.patches] == pytest.approx([1, 2, 3])
    (chance,) = axes.lines
    assert list(chance.get_ydata()) == [12.5, 12.5] and "12.5 %" in chance.get_label()


# --------------------------------------------------------------------------------------------------------- the run


def small_args(data, folder, **changes):
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 8, "max_steps": 1}
    return Args(data=(data,), run_dir=folder, **settings | changes)


@both_encoders
def test_a_run_predicts_35_wide_or_7_thin_frames_trains_all_and_draws_the_accuracies(simulated, tmp_path, encoder):
    args = small_args(simulated, tmp_path / "run", encoder=encoder)
    main(args)
    metrics = read_metrics(tmp_path / "run")[-1]
    steps = STEPS[encoder]
    names = {"loss", "accuracy", *(f"accuracy/{k}" for k in range(1, steps + 1))}
    assert {key for key in metrics if key.startswith("validation/")} == {f"validation/{name}" for name in names}
    with open(tmp_path / "run" / "accuracy.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    picture = matplotlib.image.imread(tmp_path / "run" / "accuracy.png")
    assert min(picture.shape[:2]) > 300 and picture[:, :, :3].std() > 0.05

    torch.manual_seed(args.seed)
    first = {"pore_model": PoreModel.of_size("tiny", encoder=encoder), "prediction": Prediction(steps, 128)}
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["models"]
    for key, weight in nn.ModuleDict(first).named_parameters():
        assert 0.1 * args.lr < (state[key] - weight).abs().max().item() < 2 * args.lr, key
    rebuilt = PoreModel.from_state_dict(torch.load(tmp_path / "run" / "pore_model.pt", weights_only=True))
    assert rebuilt.encoder.kind == encoder


def test_future_steps_given_are_kept_and_chance_is_one_in_a_batch(simulated, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cpc, "draw_accuracy", lambda *given: calls.append(given) or draw_accuracy(*given))
    main(small_args(simulated, tmp_path / "run", future_steps=4))
    ((metrics, steps, chance),) = calls
    assert steps == 4 and chance == 1 / 8
    assert {key.split("/")[-1] for key in metrics} == {"loss", "accuracy", "1", "2", "3", "4"}


def test_by_default_chunks_are_seen_as_they_are(simulated, tmp_path, monkeypatch):
    seen = []

    def spy(model, signal, lengths, t, steps):
        seen.append((signal, lengths))
        return future_and_context(model, signal, lengths, t, steps)

    monkeypatch.setattr(cpc, "future_and_context", spy)
    main(small_args(simulated, tmp_path / "run"))
    stores = open_data((simulated,))
    batches = [Chunks(stores, 400, "training").batch(0, 0, 8), *Chunks(stores, 400, "validation").tiles(8)]
    assert len(seen) > 2
    for (signal, lengths), batch in zip(seen, batches, strict=False):
        assert torch.equal(signal, batch.signal) and torch.equal(lengths, batch.lengths)
