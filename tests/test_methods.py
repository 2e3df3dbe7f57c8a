"""What holds for all seven scripts: equal blocks, logged metrics, learning, resume, a loss that is not finite."""

import importlib
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark.plot_runs import read_metrics
from common import InputError
from common.data import Chunks, open_data
from common.pore_model import PoreModel
from common.simulate import write_simulated
from finetune_basecaller import Basecaller
from tests.linear_probe import examples_of, probe_accuracy

TERMS = {
    "cpc": {"accuracy", *(f"accuracy/{k}" for k in range(1, 9))},
    "simclr": {"alignment", "uniformity", "top1"},
    "moco": {"alignment", "uniformity", "top1", "top5"},
    "simsiam": {"cosine1", "cosine2"},
    "byol": {"cosine1", "cosine2"},
    "dino": {"teacher_entropy", "kl"},
    "barlow": {"invariance", "redundancy"},
}
METHODS = list(TERMS)
# so that some seconds of training show: short queues and quick averages
SETTINGS = {
    "cpc": {"future_steps": 8, "chunk_len": 800},
    "moco": {"representation": 64, "queue": 256, "momentum": 0.9},
    "byol": {"representation": 256, "momentum": 0.95},
    "dino": {"representation": 256, "momentum": 0.95, "student_temperature": 0.5, "teacher_temperature": 0.3},
    "barlow": {"representation": 256},
}
# the loss of step 80 is at most this share of that of step 10; measured: 0.79 0.17 0.31 0.31 0.38 0.78 0.45
FALLS_TO = {"cpc": 0.9, "simclr": 0.4, "moco": 0.6, "simsiam": 0.6, "byol": 0.65, "dino": 0.9, "barlow": 0.7}


def script(method):
    return importlib.import_module(method)


def settings(method, data, folder, **changes):
    common = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 32, "lr": 1e-3, "epochs": 100}
    return script(method).Args(data=(data,), run_dir=folder, **common | SETTINGS.get(method, {}) | changes)


def test_marked_blocks_are_equal():
    root = Path(__file__).parents[1]
    marked = re.compile(r"^ *# ([^\n]*): equal in ([^\n]*)\n.*?^ *# End of (\1)\n", re.M | re.S | re.I)
    found = {method: {m[1]: m for m in marked.finditer((root / f"{method}.py").read_text())} for method in METHODS}
    text = {method: {title: m[0] for title, m in blocks.items()} for method, blocks in found.items()}
    for title, block in found["barlow"].items():
        assert block[2] == "all methods"
        assert {text[method].get(title) for method in METHODS} == {block[0]}, title
    for method in METHODS:
        for title, block in found[method].items():
            if block[2] != "all methods":
                holders = {other for other in METHODS if title in text[other]}
                assert holders == set(re.findall(r"(\w+)\.py", block[2])), title
                assert len({text[other][title] for other in holders}) == 1, title
    assert len(found["barlow"]) == 4


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Labelled chunks of reads that no method is trained on."""
    folder = tmp_path_factory.mktemp("probe")
    write_simulated(folder / "probe.hdf5", reads=10, mean_bases=1000, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        (store,) = open_data((folder / "probe.hdf5",))
    return examples_of(store)


@pytest.fixture(scope="module")
def accuracy_of_random_weights(examples):
    """The probe on the weights that all methods start from, their BatchNorm statistics those of the reads."""
    torch.manual_seed(0)
    pore_model = PoreModel.of_size("tiny")
    with torch.no_grad():
        for _ in range(30):
            pore_model(examples[0][torch.randint(len(examples[0]), (32,))])
    return probe_accuracy(pore_model, examples)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method, simulated, tmp_path, examples, accuracy_of_random_weights):
    """The loss falls, and the features tell bases better than those the run started from."""
    run = tmp_path / "run"
    script(method).main(settings(method, simulated, run, max_steps=80))
    steps = [line for line in read_metrics(run) if "loss" in line]
    logged = {"step", "loss", "feature_spread", "effective_rank", "lr", "chunks_per_second"}
    assert steps[0].keys() == logged | TERMS[method]
    assert steps[-1]["loss"] < FALLS_TO[method] * steps[0]["loss"]
    assert steps[-1]["feature_spread"] > 0.2
    pore_model = PoreModel.from_state_dict(torch.load(run / "pore_model.pt", weights_only=True))
    assert probe_accuracy(pore_model, examples) > accuracy_of_random_weights + 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_sigterm_stopped_is_resumed_as_if_never_stopped(method, simulated, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    small = {"batch_size": 14, "chunk_len": 400} | ({} if method == "cpc" else {"representation": 32})
    script(method).main(settings(method, simulated, whole, max_steps=20, **small))
    loss_function, calls = getattr(script(method), f"{method}_loss"), []
    step = random.Random(method).randrange(1, 17)  # before the first validation, which calls the loss, too

    def terminated(*inputs):
        calls.append(inputs)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_function(*inputs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(script(method), f"{method}_loss", terminated)
        script(method).main(settings(method, simulated, stopped, max_steps=20, **small))
    assert stop.value.code == 128 + signal.SIGTERM and not (stopped / "pore_model.pt").exists()
    assert f"stopped after step {step}; go on with --resume {stopped}" in capsys.readouterr().err
    script(method).main(settings(method, simulated, None, max_steps=20, resume=stopped, **small))
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, stopped)]
    for state in saved:
        state["optimizer"] = state["optimizer"]["state"]
        del state["log_bytes"], state["script"]
    torch.testing.assert_close(*saved, rtol=0, atol=0)
    torch.testing.assert_close(saved[0]["pore_model"], torch.load(stopped / "pore_model.pt"), rtol=0, atol=0)
    logs = [[{**line, "chunks_per_second": 0} for line in read_metrics(folder)] for folder in (whole, stopped)]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [10, 17, 20, 20]  # an epoch has 17 steps


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_from_the_weights_of_a_pore_model_or_a_basecaller(method, simulated, tmp_path):
    """Averages of the pore model as well; to resume, it needs them no more."""
    basecaller = Basecaller(PoreModel.of_size("tiny"))
    given, path = basecaller.pore_model.state_dict(), tmp_path / "given.pt"
    small = {"batch_size": 4, "lr": 1e-4, "weights": path} | ({} if method == "cpc" else {"representation": 32})
    for name, state in (("alone", given), ("basecaller", basecaller.state_dict())):
        torch.save(state, path)
        script(method).main(settings(method, simulated, tmp_path / name, max_steps=1, **small))
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for part in (part for part in saved if part.endswith("pore_model")):
            for key, _ in basecaller.pore_model.named_parameters():
                assert (saved[part][key] - given[key]).abs().max() < 1.1e-4, (part, key)  # one step of Adam
        assert not torch.equal(saved["pore_model"]["norm.weight"], given["norm.weight"])
    path.unlink()
    script(method).main(settings(method, simulated, None, max_steps=2, resume=tmp_path / "alone", **small))


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from tests.test_methods import script, settings

torch.set_num_threads(1)  # more do not survive a fork


def start(run, **changes):
    process = os.fork()
    if process == 0:
        try:
            args = settings("moco", Path(sys.argv[1]), Path(run), max_steps=30, checkpoint_every=1, **changes)
            script("moco").main(args)
        finally:
            os._exit(0)
    return process


os.waitpid(start("whole"), 0)
chance, run, kills = random.Random(0), Path("run"), 0
while kills < 20 or not (run / "pore_model.pt").exists():
    if not (run / "checkpoint.pt").exists() or (run / "pore_model.pt").exists():
        shutil.rmtree(run, ignore_errors=True)  # killed before its first checkpoint, or finished too early
    process = start(run, resume=run if run.exists() else None)
    if kills < 20:
        time.sleep(chance.uniform(0.1, 1.5))
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    kills += os.WIFSIGNALED(status)
"""


def test_a_run_killed_twenty_times_is_the_run_never_killed(simulated, tmp_path):
    """Killed at any moment, in the midst of a checkpoint too. MoCo has the most state: keys, queue and its place."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED, simulated], cwd=tmp_path, env=environment, check=True)
    logs, weights = [], []
    for name in ("whole", "run"):
        logs.append([{**line, "chunks_per_second": 0} for line in read_metrics(tmp_path / name)])
        weights.append(torch.load(tmp_path / name / "pore_model.pt", weights_only=True))
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 30
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_models_in_bfloat16_train_and_the_loss_is_nearly_that_of_float32(method, simulated, tmp_path):
    losses = []
    for precision in ("bf16", "fp32"):
        changes = {"batch_size": 8, "max_steps": 10, "precision": precision, "lr": 1e-5}
        script(method).main(settings(method, simulated, tmp_path / precision, **changes))
        losses.append(read_metrics(tmp_path / precision)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_a_run_goes_on_with_its_own_script_and_not_backwards(simulated, tmp_path):
    run = tmp_path / "run"
    script("simsiam").main(settings("simsiam", simulated, run, batch_size=4, max_steps=2))
    log = (run / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"a run of simsiam\.py; go on with that"):
        script("byol").main(settings("byol", simulated, None, batch_size=4, max_steps=3, resume=run))
    with pytest.raises(InputError, match=r"--max-steps 1: the run in .* is at step 2 already"):
        script("simsiam").main(settings("simsiam", simulated, None, batch_size=4, max_steps=1, resume=run))
    assert (run / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_reads(method, simulated, tmp_path, monkeypatch):
    loss_function = getattr(script(method), f"{method}_loss")

    def broken(*inputs):
        loss, terms = loss_function(*inputs)
        return loss * float("nan"), terms

    monkeypatch.setattr(script(method), f"{method}_loss", broken)
    with pytest.raises(InputError, match=r"step 1: the loss is nan \(\w+ [-0-9.]+") as error:
        script(method).main(settings(method, simulated, tmp_path / "run", batch_size=4, chunk_len=400, max_steps=5))
    chunks = Chunks(open_data([simulated]), 400, "training")
    batch = chunks.batch(0, 0, 4)
    assert str(error.value).endswith(f"of this batch: {' '.join(sorted(set(batch.reads)))}")
    for read_id, current in zip(batch.reads, batch.signal.numpy(), strict=True):
        (row,) = chunks.reads[chunks.reads["id"] == read_id.encode()]
        whole = chunks.stores[0].signal[row["start"] :][: row["length"]].astype("float32")
        assert current.tobytes() in whole.tobytes()
