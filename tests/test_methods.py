"""What holds for all eight scripts: equal parts, logged metrics, learning, resume, a loss that is not finite."""

import ast
import importlib
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

from benchmark.plot_runs import read_metrics
from common import InputError
from common.chunks import Chunks, in_validation, open_data
from common.pore_model import PoreModel
from common.reads.simulate import write_simulated
from finetune_basecaller import Basecaller
from tests.linear_probe import examples_of, probe_accuracy

ROOT = Path(__file__).parents[1]
TERMS = {
    "cpc": {"accuracy", *(f"accuracy/{k}" for k in range(1, 9))},
    "simclr": {"alignment", "uniformity", "top1"},
    "moco": {"alignment", "uniformity", "top1", "top5"},
    "simsiam": {"cosine1", "cosine2"},
    "byol": {"cosine1", "cosine2"},
    "dino": {"teacher_entropy", "kl"},
    "barlow": {"invariance", "redundancy"},
    "masked": {"cross_entropy", "gained", "floor", "within_a_bin", "hidden_share", "events_per_chunk"},
}
METHODS = list(TERMS)
all_methods = pytest.mark.parametrize("method", METHODS)
# so that few steps show: short queues and quick averages
SETTINGS = {
    "cpc": {"future_steps": 8},
    "moco": {"queue": 64, "momentum": 0.9},
    "byol": {"momentum": 0.95},
    "dino": {"momentum": 0.95, "student_temperature": 0.5, "teacher_temperature": 0.3},
}
LEARNS_WITH = {"cpc": {"batch_size": 32, "lr": 4e-3, "max_steps": 60}, "moco": {"embedding_dim": 64}}
LEARNS_WITH |= {"masked": {"batch_size": 32, "lr": 2e-3, "max_steps": 60, "chunk_len": 400, "gap": 1}}
# the loss of the last five steps is at most this share of that of the first five; measured: 0.73 0.14 0.51 0.31 0.37
# 0.91 0.35 0.95; masked starts above ln 32, and 0.97 would be to know nothing
FALLS_TO = {"cpc": 0.87, "simclr": 0.4, "moco": 0.75, "simsiam": 0.65, "byol": 0.65, "dino": 0.96, "barlow": 0.65}
FALLS_TO |= {"masked": 0.96}
TRAINED = {"moco": "query.", "byol": "online.", "dino": "student."}  # where models has the pore model that is trained


def script(method):
    return importlib.import_module(method)


def settings(method, data, folder, **changes):
    """Arguments of a small and quick run."""
    Args = script(method).Args
    common = {"size": "tiny", "device": "cpu", "chunk_len": 200, "batch_size": 8, "lr": 1e-3, "epochs": 100}
    width = {"embedding_dim": 32} if hasattr(Args, "embedding_dim") else {}
    return Args(data=(data,), run_dir=folder, **common | width | SETTINGS.get(method, {}) | changes)


# ------------------------------------------------------------------------------------------------ how they are written


def source(method):
    return (ROOT / f"{method}.py").read_text()


def marked_blocks(text):
    """The blocks that are equal in all methods, by title: to the next blank line, or two of them if not indented."""
    blocks = re.finditer(r"^(?P<indent> *)# ([^\n]*): equal in all methods\n.*?\n(?(indent)\n|\n\n)", text, re.M | re.S)
    return {block[2]: block[0] for block in blocks}


def definitions(text):
    """The text of each function and method, from its decorators on, without its docstring, by name."""
    found, lines = {}, text.splitlines()
    for parent in ast.walk(ast.parse(text)):
        for node in ast.iter_child_nodes(parent) if isinstance(parent, ast.Module | ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef):
                name = f"{parent.name}.{node.name}" if isinstance(parent, ast.ClassDef) else node.name
                first = min(line.lineno for line in (node, *node.decorator_list)) - 1
                body = node.body[1:] if ast.get_docstring(node) else node.body
                head = lines[first : node.body[0].lineno - 1]
                found[name] = "\n".join(head + lines[body[0].lineno - 1 : node.end_lineno])
    return found


def calls_in(text, name):
    """How often this text calls the function of this name, and where: the functions that do."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return [
        function.name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_marked_blocks_are_equal():
    blocks = {method: marked_blocks(source(method)) for method in METHODS}
    assert len(blocks["barlow"]) == 4
    for method in METHODS:
        assert source(method).count(": equal in") == 4
        assert blocks[method] == blocks["barlow"], method


def test_what_has_one_name_is_one_thing():
    """So that the diff of two scripts shows the methods."""
    definitions_of = {method: definitions(source(method)) for method in METHODS}
    for name in {name for found in definitions_of.values() for name in found} - {"main", "forward", "embed"}:
        assert len({found[name] for found in definitions_of.values() if name in found}) == 1, name
    holders = {"Projector.forward": 6, "Predictor.__init__": 2, "update_average": 3, "view": 7, "validate": 8}
    for name, number in holders.items():
        assert sum(name in found for found in definitions_of.values()) >= number, name
    for equal in (("barlow", "simclr", "simsiam"), ("byol", "dino")):
        assert len({definitions_of[method]["embed"] for method in equal}) == 1


@all_methods
def test_the_layout_of_a_script(method):
    text, loss = source(method), f"{method}_loss"
    assert 150 <= text.count("\n") <= 260
    assert "https://arxiv.org/abs/" in ast.get_docstring(ast.parse(text))
    own, shared = text.index("# Arguments of the method\n"), text.index("# Shared arguments: equal in all methods\n")
    names = list(script(method).Args.__dataclass_fields__)
    assert own < text.index(f"    {names[0]}: ") < text.index("    dropout: ") < shared < text.index("    data: ")
    assert [name for name in names if f"    {name}: " in text[shared:]] == names[names.index("data") :]
    assert {*calls_in(text, "forward")} == {"main", "validate"} and calls_in(text, loss) == ["forward"]
    (main,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "main")
    (loop,) = (node for node in ast.walk(main) if isinstance(node, ast.For) and "run.steps" in ast.unparse(node.iter))
    assert "forward(models, batch, args)" in ast.unparse(loop)


# --------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("method", [name for name in METHODS if "view1, view2" in source(name) and name != "moco"])
def test_both_views_go_through_each_pore_model(method, few, tmp_path, monkeypatch):
    """In training and in validation; one view twice, told apart by dropout alone, would train as well.

    MoCo, where each network has one of them, has a test of its own.
    """
    views, inputs = [], []
    view, forward = script(method).view, PoreModel.forward
    monkeypatch.setattr(script(method), "view", lambda *given: views.append(view(*given)) or views[-1])
    monkeypatch.setattr(PoreModel, "forward", lambda self, *x: inputs.append(x[0]) or forward(self, *x))
    script(method).main(settings(method, few, tmp_path / "run", max_steps=2))
    assert len(views) > 4
    networks = 2 if method in TRAINED else 1
    expected = [signal for pair in zip(views[::2], views[1::2], strict=True) for signal, _ in pair * networks]
    assert all(x is signal for x, signal in zip(inputs, expected, strict=True))


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


@all_methods
def test_it_learns(method, simulated, tmp_path, monkeypatch, examples, accuracy_of_random_weights):
    """The loss falls, and the features tell bases better than those the run started from."""
    monkeypatch.setattr(script(method), "LOG_EVERY", 1)
    common = {"batch_size": 16, "lr": 2e-3, "max_steps": 40}
    changes = common | LEARNS_WITH.get(method, {"embedding_dim": 256})
    run = tmp_path / "run"
    script(method).main(settings(method, simulated, run, **changes))
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    logged = {"step", "loss", "feature_spread", "effective_rank", "lr", "chunks_per_second"}
    assert steps[0].keys() == logged | TERMS[method] and len(steps) == changes["max_steps"]
    assert lines[-1].keys() == {"step", *(f"validation/{name}" for name in {"loss"} | TERMS[method])}
    first, last = (sum(line["loss"] for line in part) for part in (steps[:5], steps[-5:]))
    assert last < FALLS_TO[method] * first
    assert steps[-1]["feature_spread"] > 0.2
    pore_model = PoreModel.from_state_dict(torch.load(run / "pore_model.pt", weights_only=True))
    assert probe_accuracy(pore_model, examples) > accuracy_of_random_weights + 1


@all_methods
def test_models_in_bfloat16_train_and_the_loss_is_nearly_that_of_float32(method, few, tmp_path, monkeypatch):
    monkeypatch.setattr(script(method), "LOG_EVERY", 3)
    losses = []
    for precision in ("bf16", "fp32"):
        changes = {"max_steps": 3, "precision": precision, "lr": 1e-5}
        script(method).main(settings(method, few, tmp_path / precision, **changes))
        losses.append(read_metrics(tmp_path / precision)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


# ---------------------------------------------------------------------------------------------------- stop and go on


@all_methods
def test_a_run_that_sigterm_stopped_is_resumed_as_if_never_stopped(method, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script(method), "LOG_EVERY", 2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = Chunks(open_data([few]), 200, "training").steps_per_epoch(8)
    script(method).main(settings(method, few, whole, max_steps=steps + 2))
    loss_function, calls = getattr(script(method), f"{method}_loss"), []
    step = random.Random(method).randrange(1, steps)  # before the first validation, which calls the loss, too

    def terminated(*inputs):
        calls.append(inputs)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_function(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(script(method), f"{method}_loss", terminated)
        code = script(method).main(settings(method, few, stopped, max_steps=steps + 2))
    assert code == 128 + signal.SIGTERM and not (stopped / "pore_model.pt").exists()
    assert f"stopped after step {step}; go on with --resume {stopped}" in capsys.readouterr().err
    assert not script(method).main(settings(method, few, None, max_steps=steps + 2, resume=stopped))
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, stopped)]
    for state in saved:
        state["optimizer"] = state["optimizer"]["state"]
        assert state.pop("log_bytes") and state.pop("script") == method
    torch.testing.assert_close(*saved, rtol=0, atol=0)
    prefix = f"{TRAINED.get(method, '')}pore_model."
    trained = {k.removeprefix(prefix): x for k, x in saved[0]["models"].items() if k.startswith(prefix)}
    torch.testing.assert_close(trained, dict(torch.load(stopped / "pore_model.pt")), rtol=0, atol=0)
    logs = [[{**line, "chunks_per_second": 0} for line in read_metrics(folder)] for folder in (whole, stopped)]
    assert logs[0] == logs[1]
    expected = sorted([*range(2, steps + 3, 2), steps, steps + 2])  # a validation each epoch and at the end
    assert [line["step"] for line in logs[0]] == expected


@all_methods
def test_without_validation_reads_it_trains_and_resumes(method, few, simulated, tmp_path, monkeypatch, capsys):
    """Its weights are those of a run that is validated, with the same training reads."""
    monkeypatch.setattr(script(method), "LOG_EVERY", 2)
    with h5py.File(simulated) as every, h5py.File(tmp_path / "two.hdf5", "w") as file:
        for name in training_reads(few):
            every.copy(f"Reads/{name}", file.require_group("Reads"))
    steps = Chunks(open_data([few]), 200, "training").steps_per_epoch(8)
    script(method).main(settings(method, few, tmp_path / "validated", max_steps=steps + 2))
    assert "without validation" not in capsys.readouterr().out
    run = tmp_path / "run"
    script(method).main(settings(method, tmp_path / "two.hdf5", run, max_steps=steps))
    assert "no validation read among" in capsys.readouterr().out
    script(method).main(settings(method, tmp_path / "two.hdf5", None, max_steps=steps + 2, resume=run))
    logs, weights = [], []
    for folder in (tmp_path / "validated", run):
        logs.append([{**line, "chunks_per_second": 0} for line in read_metrics(folder) if "loss" in line])
        weights.append(torch.load(folder / "pore_model.pt", weights_only=True))
    assert logs[0] == logs[1] and len(logs[1]) == len(read_metrics(run)) == (steps + 2) // 2
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def training_reads(store):
    """The names of the reads of a store that are not for validation."""
    (store,) = open_data([store])
    return [read_id.decode() for read_id in store.reads["id"][~in_validation(store.reads)]]


KILLED = """
import os, random, shutil, signal, sys, time, traceback
from pathlib import Path
import torch, torch._dynamo  # which the first optimizer would import, in each process
from tests.test_methods import script, settings

torch.set_num_threads(1)  # more do not survive a fork
script("moco").LOG_EVERY = 1


def start(run, **changes):
    process = os.fork()
    if process:
        return process
    try:
        script("moco").main(settings("moco", Path(sys.argv[1]), run, max_steps=40, **changes))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait_for(steps):
    seen = None
    while steps and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
        now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        seen, steps = now, steps - (seen is not None and now != seen)


assert os.waitpid(start(Path("whole")), 0)[1] == 0
chance, run, kills = random.Random(0), Path("run"), 0
checkpoint, weights = run / "checkpoint.pt", run / "pore_model.pt"
while kills < 20 or not weights.exists():
    if not checkpoint.exists() or weights.exists():
        shutil.rmtree(run, ignore_errors=True)  # killed before its first checkpoint, or finished too early
        kills = 0
    process = start(run, checkpoint_minutes=0, resume=run if run.exists() else None)
    if kills < 20:
        wait_for(chance.randrange(3))
        time.sleep(chance.uniform(0, 0.1))  # within the next steps; or, if none was waited for, while it starts
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or status == 0
    kills += os.WIFSIGNALED(status)
"""


def test_a_run_killed_twenty_times_is_the_run_never_killed(few, tmp_path):
    """Killed at any moment, in the midst of a checkpoint too. MoCo has the most state: keys, queue and its place."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", KILLED, few], cwd=tmp_path, env=environment, check=True)
    logs, weights = [], []
    for name in ("whole", "run"):
        logs.append([{**line, "chunks_per_second": 0} for line in read_metrics(tmp_path / name)])
        weights.append(torch.load(tmp_path / name / "pore_model.pt", weights_only=True))
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 40
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@all_methods
def test_it_starts_from_the_weights_of_a_pore_model_or_a_basecaller(method, few, tmp_path):
    """Averages of the pore model as well; to resume, it needs them no more."""
    basecaller = Basecaller(PoreModel.of_size("tiny"))
    given, path = basecaller.pore_model.state_dict(), tmp_path / "given.pt"
    small = {"lr": 1e-4, "weights": path}
    for name, state in (("alone", given), ("basecaller", basecaller.state_dict())):
        torch.save(state, path)
        script(method).main(settings(method, few, tmp_path / name, max_steps=1, **small))
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["models"]
        prefixes = {key.partition("pore_model.")[0] for key in saved if "pore_model." in key}
        assert len(prefixes) == (2 if method in TRAINED else 1)
        for prefix in prefixes:
            for key, _ in basecaller.pore_model.named_parameters():
                moved = (saved[f"{prefix}pore_model.{key}"] - given[key]).abs().max()
                assert moved < 1.1e-4, (prefix, key)  # one step of Adam
        trained = saved[f"{TRAINED.get(method, '')}pore_model.norm.weight"]
        assert not torch.equal(trained, given["norm.weight"])
    path.unlink()
    script(method).main(settings(method, few, None, max_steps=2, resume=tmp_path / "alone", **small))


def test_a_run_goes_on_with_its_own_script_and_not_backwards(few, tmp_path):
    run = tmp_path / "run"
    script("simsiam").main(settings("simsiam", few, run, max_steps=2))
    log = (run / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"a run of simsiam\.py; go on with that"):
        script("byol").main(settings("byol", few, None, max_steps=3, resume=run))
    with pytest.raises(InputError, match=r"--max-steps 1: the run in .* is at step 2 already"):
        script("simsiam").main(settings("simsiam", few, None, max_steps=1, resume=run))
    assert (run / "metrics.jsonl").read_text() == log


@all_methods
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_reads(method, few, tmp_path, monkeypatch):
    loss_function = getattr(script(method), f"{method}_loss")

    def broken(*inputs):
        loss, terms = loss_function(*inputs)
        return loss * float("nan"), terms

    monkeypatch.setattr(script(method), f"{method}_loss", broken)
    with pytest.raises(InputError, match=r"step 1: the loss is nan \(\w+ [-0-9.]+") as error:
        script(method).main(settings(method, few, tmp_path / "run", batch_size=4, max_steps=5))
    chunks = Chunks(open_data([few]), 200, "training")
    batch = chunks.batch(0, 0, 4)
    assert str(error.value).endswith(f"of this batch: {' '.join(sorted(set(batch.reads)))}")
    for read_id, current in zip(batch.reads, batch.signal.numpy(), strict=True):
        (row,) = chunks.reads[chunks.reads["id"] == read_id.encode()]
        whole = chunks.stores[0].signal[row["start"] :][: row["length"]].astype("float32")
        assert current.tobytes() in whole.tobytes()
