"""The basecaller: CTC against enumeration, its head and schedule, and runs that learn, freeze and resume."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import finetune_basecaller
from benchmark.plot_runs import read_metrics
from common import InputError
from common.args import parse_args
from common.augment import time_warp
from common.chunks import Chunks, open_data
from common.ctc import best_path, ctc_steps_needed, identity
from common.pore_model import PoreModel
from common.reads.simulate import write_simulated
from finetune_basecaller import Args, Basecaller, ctc_loss, learning_rate, main, validate

pytestmark = pytest.mark.usefixtures("no_picture")


def load(path):
    return torch.load(path, weights_only=True)


def enumerated_loss(log_probs, target):
    """-log of the summed probability of every path that spells `target`, by trying all of them, a base."""
    steps, symbols = log_probs.shape
    total = 0.0
    for path in itertools.product(range(symbols), repeat=steps):
        spelled = [symbol for symbol, _ in itertools.groupby(path) if symbol]
        if spelled == target:
            total += np.exp(sum(log_probs[step, symbol] for step, symbol in enumerate(path)))
    return -np.log(total) / len(target)


def test_ctc_loss_equals_the_sum_over_all_paths():
    torch.manual_seed(0)
    log_probs = torch.randn(2, 6, 5).log_softmax(-1)
    targets, lengths = torch.tensor([[1, 3, 3], [4, 2, 0]]), torch.tensor([3, 2])
    expected = [enumerated_loss(log_probs[0].double().numpy(), [1, 3, 3])]
    expected += [enumerated_loss(log_probs[1, :5].double().numpy(), [4, 2])]
    loss, terms = ctc_loss(log_probs, torch.tensor([6, 5]), targets, lengths)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert terms["infeasible"].item() == 0


def test_infeasible_chunks_are_counted_and_do_not_count():
    torch.manual_seed(0)
    log_probs = torch.randn(2, 4, 5).log_softmax(-1).requires_grad_()
    targets, target_lengths = torch.tensor([[1, 1, 1], [1, 2, 3]]), torch.tensor([3, 3])  # AAA needs 5 steps, ACG 3
    loss, terms = ctc_loss(log_probs, torch.tensor([4, 4]), targets, target_lengths)
    alone, _ = ctc_loss(log_probs[1:], torch.tensor([4]), targets[1:], target_lengths[1:])
    assert terms["infeasible"].item() == 0.5
    assert loss.item() == pytest.approx(alone.item())
    loss.backward()
    assert log_probs.grad.isfinite().all() and not log_probs.grad[0].any() and log_probs.grad[1].any()


def test_ctc_steps_needed_is_where_ctc_becomes_possible():
    """Against torch's CTC: infinite with one time step fewer. Half of the references have equal neighbours."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(1, 4, (40, 9), generator=generator)
    lengths = torch.randint(1, 10, (40,), generator=generator)
    needed = ctc_steps_needed(targets, lengths)
    assert (needed > lengths).any() and (needed == lengths).any()
    log_probs = torch.zeros(20, 40, 5).log_softmax(-1)

    def possible(steps):
        loss = torch.nn.functional.ctc_loss(log_probs, targets, steps, lengths, reduction="none")
        return loss.isfinite()

    assert possible(needed).all() and not possible(needed - 1).any()


@pytest.mark.parametrize("width", [0, 1, 3])
def test_ctc_steps_needed_of_chunks_without_bases(width):
    assert ctc_steps_needed(torch.zeros(2, width, dtype=torch.long), torch.tensor([0, 0])).tolist() == [0, 0]


def test_two_time_steps_a_frame_that_sum_to_one():
    model = Basecaller(PoreModel.of_size("tiny")).eval()
    log_probs, lengths = model(torch.randn(2, 400))
    assert log_probs.shape == (2, 100, 5) and lengths.tolist() == [100, 100]
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 100), atol=1e-5)


def test_a_state_dict_rebuilds_the_basecaller():
    model = Basecaller(PoreModel.of_size("tiny")).eval()
    again = Basecaller.from_state_dict(model.state_dict()).eval()
    signal = torch.randn(1, 400)
    assert torch.equal(model(signal)[0], again(signal)[0])
    for rubbish in (
        {},
        model.pore_model.state_dict(),
        {k: v for k, v in model.state_dict().items() if "head" not in k},
    ):
        with pytest.raises(ValueError):
            Basecaller.from_state_dict(rubbish)


def test_the_best_path_merges_repeats_and_drops_blanks():
    path = [0, 1, 1, 0, 1, 3, 3, 4, 0, 2]
    log_probs = torch.full((len(path), 5), -10.0)
    log_probs[range(len(path)), path] = -0.01
    sequence, starts = best_path(log_probs)
    assert sequence == "AAGTC" and starts.tolist() == [1, 4, 5, 7, 9]


def test_learning_rate_rises_and_falls():
    values = [learning_rate(step, 10, 110) for step in (1, 10, 60, 110)]
    assert values == pytest.approx([0.1, 1.0, 0.5, 0.0])


def small_args(data, folder, **changes):
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 10, "warmup_steps": 5, "epochs": 4}
    return Args(data=(data,), run_dir=folder, **settings | changes)


def lines_but_speed(folder):
    """What a run logged, without how fast it was."""
    return [{key: x for key, x in line.items() if key != "chunks_per_second"} for line in read_metrics(folder)]


@pytest.fixture
def no_picture(monkeypatch):
    """The picture at the end takes longer than a short run."""
    monkeypatch.setattr(finetune_basecaller, "draw_calls", lambda *_: Figure())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that learned an easy pore, and its reads."""
    folder = tmp_path_factory.mktemp("trained")
    write_simulated(folder / "reads.hdf5", reads=12, mean_bases=1000, seed=1, easy=True)
    settings = {"chunk_len": 200, "batch_size": 16, "lr": 4e-3, "epochs": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        main(small_args(folder / "reads.hdf5", folder / "run", **settings))
    return folder / "run", folder / "reads.hdf5"


def test_a_short_run_learns_and_writes_best_and_last(trained):
    run, _ = trained
    validated = [line for line in read_metrics(run) if "validation/loss" in line]
    assert validated[-1]["validation/loss"] < 1 < np.log(4)  # ln 4 a base: all that is known without the signal
    assert validated[-1]["validation/identity_mean"] > 60
    assert {"validation/identity_mean", "validation/identity_median", "validation/infeasible"} < validated[0].keys()
    for name in ("basecaller.pt", "basecaller_last.pt"):
        Basecaller.from_state_dict(load(run / name))
    assert (run / "calls.png").read_bytes().startswith(b"\x89PNG")


def test_identities_of_a_validation_are_those_of_its_chunks_one_by_one(trained):
    run, reads = trained
    model = Basecaller.from_state_dict(load(run / "basecaller_last.pt")).eval()
    chunks, expected = Chunks(open_data([reads]), 400, "validation", labelled=True), []
    for batch in chunks.tiles(8):
        for log_probs, bases in zip(model(batch.signal)[0].detach(), batch.targets, strict=True):
            reference = "".join("ACGT"[base - 1] for base in bases[bases > 0])
            if reference:
                expected.append(identity(best_path(log_probs)[0], reference))
    found = validate(model, chunks, 8, torch.device("cpu"), "fp32")
    assert len(expected) > 20 and np.std(expected) > 0
    assert found["validation/identity_mean"] == np.mean(expected)
    assert found["validation/identity_median"] == np.median(expected)


def test_a_run_resumed_before_it_was_ever_validated_is_the_run_never_stopped(few, tmp_path):
    """tests/test_nothing_lost.py has those that were."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main(small_args(few, whole, max_steps=11))
    main(small_args(few, stopped, max_steps=5))
    main(small_args(few, None, max_steps=11, resume=stopped))
    for name in ("basecaller.pt", "basecaller_last.pt"):
        weights = [load(folder / name) for folder in (whole, stopped)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert lines_but_speed(whole) == lines_but_speed(stopped)


def test_without_validation_reads_the_best_is_the_last(one_read, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(finetune_basecaller, "draw_calls", lambda _, chunks, *rest: drawn.append(chunks) or Figure())
    run = tmp_path / "run"
    main(small_args(one_read, run, steps=12, max_steps=5))
    assert not (run / "metrics.jsonl").exists()
    main(small_args(one_read, None, steps=12, resume=run))
    assert [len(chunks) > 0 for chunks in drawn] == [True, True]
    printed = capsys.readouterr().out
    assert (
        "no labelled validation read among 1; give more reads" in printed
        and "basecaller, of the last step: " in printed
    )
    assert [line["step"] for line in read_metrics(run)] == [10] and (run / "calls.png").exists()
    best, last = load(run / "basecaller.pt"), load(run / "basecaller_last.pt")
    assert all(torch.equal(best[key], last[key]) for key in last)
    with pytest.raises(InputError, match="no labelled training read for finetuning among 1; give more reads"):
        main(small_args(one_read, tmp_path / "tuned", tune=True))


def test_steps_end_the_cosine_and_are_validated_every_so_often_and_at_the_end(few, tmp_path, monkeypatch):
    """An epoch of all reads has several steps, one of a tenth of them a single one."""
    monkeypatch.setattr(finetune_basecaller, "VALIDATE_EVERY", 4)
    settings = {"batch_size": 4, "chunk_len": 1200, "label_fraction": 0.1, "warmup_steps": 0}
    main(small_args(few, tmp_path / "run", steps=10, **settings))
    log = read_metrics(tmp_path / "run")
    assert [line["step"] for line in log if "validation/loss" in line] == [4, 8, 10]
    assert [line["lr"] for line in log if "lr" in line] == [pytest.approx(0, abs=1e-12)]
    best = min(line["validation/loss"] for line in log if "validation/loss" in line)
    assert load(tmp_path / "run" / "checkpoint.pt")["best"] == {"loss": best}
    main(small_args(few, tmp_path / "early", steps=10, max_steps=7, **settings))
    validated = [line["step"] for line in read_metrics(tmp_path / "early") if "validation/loss" in line]
    assert validated == [4, 7]
    assert load(tmp_path / "early" / "checkpoint.pt")["step"] == 7


def test_tune_validates_on_reads_that_neither_training_nor_the_validation_split_has(simulated, tmp_path, monkeypatch):
    made = []

    class Spy(Chunks):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(set(self.read_of.tolist()))

    monkeypatch.setattr(finetune_basecaller, "Chunks", Spy)
    main(small_args(simulated, tmp_path / "tuned", steps=1, tune=True))
    training, tuning = made[0], made[-1]
    main(small_args(simulated, tmp_path / "run", steps=1))
    every, validation = made[-2:]
    assert training and tuning and not training & tuning and training | tuning == every
    assert validation and not tuning & validation
    with pytest.raises(InputError, match=r"--tune: .* --shared-data"):
        main(small_args(simulated, tmp_path / "both", tune=True, shared_data=True))


@pytest.mark.parametrize("changes", [{}, {"tune": True, "label_fraction": 0.2}])
def test_validation_reads_of_the_place_of_training_reads_are_said(one_place, simulated, tmp_path, capsys, changes):
    main(small_args(one_place, tmp_path / "one", steps=1, **changes))
    said = "training reads hold 100.0% of validation reads' 21-mers (same strand): identity is also a test of memory"
    assert capsys.readouterr().out.count(said) == 1
    main(small_args(simulated, tmp_path / "run", steps=1, **changes))
    assert "21-mers" not in capsys.readouterr().out


def test_what_is_saved_is_the_average_of_the_weights(few, tmp_path, monkeypatch):
    """Against the recursion in float64; with momentum 0 it is the weights themselves."""
    states, update = [], finetune_basecaller.update_average

    def spy(average, model, momentum):
        for network in (average, model):
            states.append({name: value.double().clone() for name, value in network.state_dict().items()})
        update(average, model, momentum)

    monkeypatch.setattr(finetune_basecaller, "update_average", spy)
    for ema in (0.3, 0.0):
        states.clear()
        main(small_args(few, tmp_path / str(ema), ema=ema, max_steps=6, lr=1e-2))
        expected = states[0]
        for weights, momentum in zip(states[1::2], (1 / 11, 2 / 12, 3 / 13, 4 / 14, 5 / 15, 6 / 16), strict=True):
            old = min(momentum, ema)
            expected = {name: old * expected[name] + (1 - old) * value for name, value in weights.items()}
        saved, checkpoint = (load(tmp_path / str(ema) / name) for name in ("basecaller_last.pt", "checkpoint.pt"))
        del saved["chemistry"]
        for name, value in saved.items():
            if value.is_floating_point():
                assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6), name
            assert torch.equal(value, checkpoint["average"][name])
            assert torch.equal(value, checkpoint["model"][name]) or ema


def test_events_are_hidden_in_a_share_of_the_chunks(few):
    batch = Chunks(open_data([few]), 400, "training", labelled=True).batch(0, 0, 40)
    for chance in (0.0, 0.4, 1.0):
        torch.manual_seed(0)
        args = Args(mask_chance=chance, gain_jitter=0, offset_jitter=0, time_warp=0)
        changed = finetune_basecaller.augment(batch, args) != batch.signal
        assert changed.any(1).float().mean() == pytest.approx(chance, abs=0.2 * (0 < chance < 1))
        assert changed[changed.any(1)].float().mean() == pytest.approx(0.25, abs=0.1) or chance == 0


def test_speeds_change_by_the_strength_asked_for(few):
    """The current of the first sample and the last stay; between them the samples run ahead or fall behind."""
    batch = Chunks(open_data([few]), 400, "training", labelled=True).batch(0, 0, 40)
    torch.manual_seed(0)
    args = Args(mask_chance=0, gain_jitter=0, offset_jitter=0)
    warped = finetune_basecaller.augment(batch, args)
    torch.manual_seed(0)
    for size in ((40, 1), (40, 1), batch.signal.shape):  # gain, offset, noise
        torch.randn(size)
    expected, _ = time_warp(batch.signal, batch.lengths, 0.2)
    assert torch.equal(warped, expected) and not torch.equal(warped, batch.signal)
    assert torch.equal(warped[:, [0, -1]], batch.signal[:, [0, -1]])


@pytest.mark.parametrize(("asked", "steps"), [({}, 1000), ({"epochs": 4}, 16), ({"epochs": 4, "steps": 7}, 7)])
def test_few_reads_are_trained_on_for_1000_steps_if_nothing_else_is_asked_for(few, tmp_path, no_picture, asked, steps):
    main(small_args(few, tmp_path / "run", max_steps=1, **{"epochs": None} | asked))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["steps"] == steps


@pytest.mark.parametrize("words", ["--tune", "--steps 9"])
def test_steps_and_tune_stay_on_resume(few, tmp_path, monkeypatch, words):
    main(small_args(few, tmp_path / "run", steps=2))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["finetune_basecaller.py", "--resume", str(tmp_path / "run"), *words.split()])
    with pytest.raises(InputError, match=f"{words.split()[0]}: the run in .* keeps it"):
        parse_args(Args)


def test_frozen_pore_model_keeps_its_weights_and_statistics_while_the_head_learns(few, tmp_path):
    pretrained = PoreModel.of_size("tiny")
    torch.save(pretrained.state_dict(), tmp_path / "pore_model.pt")
    args = small_args(few, tmp_path / "run", weights=tmp_path / "pore_model.pt", freeze_steps=6, max_steps=6)
    main(args)
    trained = load(tmp_path / "run" / "basecaller_last.pt")
    assert all(torch.equal(value, trained[f"pore_model.{key}"]) for key, value in pretrained.state_dict().items())
    torch.manual_seed(args.seed)
    assert not torch.equal(trained["head.weight"], Basecaller(PoreModel.of_size("tiny")).head.weight)


def test_after_the_freeze_the_pore_model_warms_up(few, tmp_path):
    pretrained = PoreModel.of_size("tiny")
    torch.save(pretrained.state_dict(), tmp_path / "pore_model.pt")
    settings = {"weights": tmp_path / "pore_model.pt", "freeze_steps": 12, "warmup_steps": 10, "lr": 1e-2, "ema": 0}
    main(small_args(few, tmp_path / "run", max_steps=13, **settings))
    trained = load(tmp_path / "run" / "basecaller_last.pt")
    moved = [(trained[f"pore_model.{key}"] - value).abs().max() for key, value in pretrained.named_parameters()]
    assert 5e-4 < max(moved) < 1.1e-3  # one step of AdamW at a tenth of the learning rate


def test_pore_model_lr_of_its_own_reaches_only_the_pore_model(few, tmp_path):
    pretrained = PoreModel.of_size("tiny")
    torch.save(pretrained.state_dict(), tmp_path / "pore_model.pt")
    settings = {"weights": tmp_path / "pore_model.pt", "max_steps": 3, "lr": 1e-2, "warmup_steps": 0}
    main(small_args(few, tmp_path / "run", pore_model_lr=1e-9, **settings))
    trained = load(tmp_path / "run" / "basecaller_last.pt")
    moved = [(trained[f"pore_model.{key}"] - value).abs().max() for key, value in pretrained.named_parameters()]
    assert max(moved) < 1e-7


def test_a_basecaller_is_gone_on_with_head_and_all(few, tmp_path):
    first = Basecaller(PoreModel.of_size("tiny"))
    torch.save(first.state_dict(), tmp_path / "basecaller.pt")
    settings = {"weights": tmp_path / "basecaller.pt", "lr": 1e-4, "warmup_steps": 0, "steps": 100}
    main(small_args(few, tmp_path / "run", max_steps=1, **settings))
    trained = load(tmp_path / "run" / "basecaller_last.pt")
    moved = {name: (trained[name] - value).abs().max() for name, value in first.named_parameters()}
    assert all(0 < by < 2e-4 for by in moved.values()) and "head.weight" in moved  # one step of AdamW


def test_of_a_basecaller_the_pore_model_alone_is_gone_on_with(few, tmp_path):
    first = Basecaller(PoreModel.of_size("tiny"))
    torch.save(first.state_dict(), tmp_path / "basecaller.pt")
    torch.save(first.pore_model.state_dict(), tmp_path / "pore_model.pt")
    states = []
    for name, new_head in (("basecaller", True), ("pore_model", False)):
        settings = {"weights": tmp_path / f"{name}.pt", "new_head": new_head, "warmup_steps": 0, "max_steps": 1}
        main(small_args(few, tmp_path / name, **settings))
        states.append(load(tmp_path / name / "basecaller_last.pt"))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_thin_weights_are_trained_and_resumed_with_the_thin_encoder(few, tmp_path, monkeypatch):
    """--resume needs no --encoder, and basecaller.pt tells that it is thin."""
    pretrained, run = PoreModel.of_size("tiny", encoder="thin"), tmp_path / "run"
    torch.save(pretrained.state_dict(), tmp_path / "pore_model.pt")
    settings = {"weights": tmp_path / "pore_model.pt", "encoder": "thin", "lr": 1e-3, "warmup_steps": 0}
    main(small_args(few, run, max_steps=1, **settings))
    trained = Basecaller.from_state_dict(load(run / "basecaller_last.pt")).pore_model
    for (name, first), now in zip(pretrained.named_parameters(), trained.parameters(), strict=True):
        assert 1e-4 < (now - first).abs().max() < 2e-3, name  # so it started from the weights

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which parse_args changes
    monkeypatch.setattr(sys, "argv", ["finetune_basecaller.py", "--resume", str(run), "--max-steps", "2"])
    main(parse_args(Args))
    resumed = load(run / "basecaller_last.pt")
    main(small_args(few, tmp_path / "whole", max_steps=2, **settings))
    whole = load(tmp_path / "whole" / "basecaller_last.pt")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    signal = torch.randn(2, 395)
    log_probs, lengths = Basecaller.from_state_dict(resumed).eval()(signal)
    assert log_probs.shape == (2, 100, 5) and lengths.tolist() == [100, 100]


@pytest.mark.parametrize(("weights", "asked"), [("thin", "wide"), ("wide", "thin")])
def test_weights_of_the_other_encoder_are_refused(few, tmp_path, weights, asked):
    path, pore_model = tmp_path / "pore_model.pt", PoreModel.of_size("tiny", encoder=weights)
    for state in (pore_model, Basecaller(pore_model)):
        torch.save(state.state_dict(), path)
        with pytest.raises(
            InputError, match=f"{path}.* the {weights} encoder, where this run .* the {asked} encoder: .* --encoder"
        ):
            main(small_args(few, tmp_path / "run", weights=path, encoder=asked))
    assert not (tmp_path / "run").exists()
