"""Whatever stops a run - a signal, a full disk, a folder that is not to be written in, a damaged checkpoint - one line
says so, what was whole stays whole, and the run goes on as if it had never been stopped."""

import contextlib
import os
import pickle
import random
import re
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import barlow
import basecall
import finetune_basecaller
from benchmark.plot_runs import read_metrics
from common import InputError
from common.pore_model import PoreModel
from common.run import Run, save_whole
from tests.forks import full_disk, killed, script
from tests.test_bad_input import Bomb
from tests.test_finetune_basecaller import lines_but_speed

SMALL = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 10}  # an epoch has 4 steps
METHOD = {
    "barlow": {"embedding_dim": 32},
    "finetune_basecaller": {"warmup_steps": 2, "lr": 3e-3, "dropout": 0.1, "freeze_steps": 7},
}
LAST = 11  # a line is logged after the checkpoint there, which --resume cuts off again


def run_script(name, data, **options):
    finetune_basecaller.VALIDATE_EVERY = 1  # each epoch, short as it is
    script(name, "--data", data, **options)


def train(name, data, **options):
    return partial(run_script, name, data, **SMALL | METHOD[name] | options)


def nobody():
    """For root, no folder is without permission to write."""
    if os.getuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)


def refusal(done, path):
    """The one line of a process that ended with code 1, which names `path`."""
    code, lines = done
    assert code == 1 and len(lines) == 1 and str(path) in lines[0], (code, lines)
    return lines[0]


@pytest.fixture(scope="module")
def whole(server, few, tmp_path_factory):
    """The folder of runs that nothing stopped, by the names of their scripts."""
    folder = tmp_path_factory.mktemp("whole")
    for name in METHOD:
        assert server(folder, train(name, few, run_dir=name, max_steps=LAST)) == (0, [])
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def same_runs(*folders):
    """Whether two runs have the same log, the speed apart, and the same files of the same values, bit for bit."""
    assert lines_but_speed(folders[0]) == lines_but_speed(folders[1])
    assert files(folders[0]).keys() == files(folders[1]).keys()
    for path in folders[0].glob("*.pt"):
        saved = [torch.load(folder / path.name, weights_only=True) for folder in folders]
        groups = [state.get("optimizer", {}).pop("param_groups", None) for state in saved]
        for state in saved:
            state.pop("script", None), state.pop("log_bytes", None)  # the speed's digits count there
        assert groups[0] == groups[1]
        torch.testing.assert_close(*saved, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- signals


def sigterm_at(step):
    loss_function, calls = finetune_basecaller.ctc_loss, []

    def terminated(*inputs):
        calls.append(inputs)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_function(*inputs)

    finetune_basecaller.ctc_loss = terminated


@pytest.mark.parametrize(("first", "end"), [(4, 8), (8, LAST)], ids=["frozen", "free"])
def test_fine_tuning_that_sigterm_stopped_is_resumed_as_if_never_stopped(child, whole, few, tmp_path, first, end):
    """Stopped while the pore model is frozen, or after; between two validations."""
    run, step = tmp_path / "run", random.Random(first).randrange(first, end)
    tune = partial(train, "finetune_basecaller", few, max_steps=LAST)
    stopped = child(partial(sigterm_at, step), tune(run_dir=run))
    assert stopped == (128 + signal.SIGTERM, [f"stopped after step {step}; go on with --resume {run}"])
    assert not (run / "basecaller_last.pt").exists() and (run / "basecaller.pt").exists()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["step"] == step and (len(state["optimizer"]["state"]) == 2) == (end == 8)  # the head's alone
    assert child(tune(resume=run)) == (0, [])
    same_runs(whole / "finetune_basecaller", run)
    assert [line["step"] for line in read_metrics(run)] == [4, 8, 10, LAST]


# --------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize(
    ("name", "limit", "lost"),
    [
        ("barlow", 100_000, "checkpoint.pt"),
        ("finetune_basecaller", None, "checkpoint.pt"),
        ("finetune_basecaller", 100_000, "basecaller.pt"),
        ("finetune_basecaller", 50, "metrics.jsonl"),
    ],
)
def test_a_disk_that_was_full_for_a_while(child, whole, few, tmp_path, name, limit, lost):
    """From the fourth step on, which ends an epoch: what is logged and saved there, in this order."""
    run = tmp_path / "run"
    assert child(train(name, few, run_dir=run, max_steps=3)) == (0, [])
    before = files(run)
    limit = limit or len(before["basecaller.pt"])  # which fits, the checkpoint after it does not
    again = train(name, few, resume=run, max_steps=LAST, checkpoint_minutes=0)
    assert re.search(r"File too large.*free space", refusal(child(partial(full_disk, limit), again), run / lost))
    after, log = files(run), lines_but_speed(run)
    assert after["checkpoint.pt"] == before["checkpoint.pt"] and after.keys() == before.keys()
    assert lost == "metrics.jsonl" or after[lost] == before[lost]
    assert log == lines_but_speed(whole / name)[: len(log)]  # and no half line after them
    assert child(again) == (0, [])
    same_runs(whole / name, run)


@pytest.mark.parametrize("words", [(), ("--bonito",)])
def test_full_disk_while_data_are_prepared(child, simulated, few, tmp_path, words):
    out = tmp_path / "out"
    prepared = partial(script, "prepare_data", few if words else simulated, "-o", out, *words, chunk_len=400)
    assert re.search(r"File too large.*free space", refusal(child(partial(full_disk, 20_000), prepared), out))
    assert not list(tmp_path.iterdir())
    assert child(prepared) == (0, [])


@pytest.mark.parametrize("end", [full_disk, killed])
def test_args_json_is_whole_or_not_there(child, few, tmp_path, end):
    run = tmp_path / "run"
    done = child(partial(end, 100), train("barlow", few, run_dir=run, max_steps=1))
    if end is killed:
        assert done[0] == -signal.SIGXFSZ and not (run / "args.json").exists()
    else:
        assert re.search(r"File too large.*free space", refusal(done, run))
        assert not run.exists()  # so that it is free for the next try
        assert child(train("barlow", few, run_dir=run, max_steps=1)) == (0, [])


def draw(points, **folder):
    figure = Figure()
    figure.subplots().plot(range(points))
    Run(barlow.Args(**folder), "barlow.py").picture("calls", figure)


@pytest.mark.parametrize("end", [full_disk, killed])
@pytest.mark.parametrize("old", [True, False])
def test_a_picture_is_the_old_one_or_the_new_or_none(child, tmp_path, end, old):
    run = tmp_path / "run"
    assert child(partial(draw, 3, run_dir=run)) == (0, [])
    if not old:
        (run / "calls.png").unlink()
    before = files(run)
    done = child(partial(end, 3000), partial(draw, 5, resume=run))
    after = files(run)
    assert after.get("calls.png") == before.get("calls.png")
    if end is killed:
        assert done[0] == -signal.SIGXFSZ
    else:
        assert "File too large" in done[1][-1] and str(run / "calls.png") in done[1][-1] and after == before
    assert child(partial(draw, 5, resume=run)) == (0, []) and files(run)["calls.png"] != before.get("calls.png")


# ------------------------------------------------------------------------------------------------- no right to write


@pytest.fixture
def place():
    """A folder that others may enter, and in it `open`, where they may write, and `shut`, where not even its owner."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        folder = Path(folder)
        folder.chmod(0o755)
        for name, mode in (("open", 0o777), ("shut", 0o555)):
            (folder / name).mkdir()
            (folder / name).chmod(mode)
        yield folder


def denied(done, path):
    """The line names what cannot be written, and says more than that it cannot."""
    line = refusal(done, path)
    assert "ermission denied" in line and re.search("another place|--run-dir|writable|XDG_CACHE_HOME", line), line


@pytest.mark.parametrize("given", [True, False])
def test_a_run_folder_that_cannot_be_made(child, few, place, given):
    data = shutil.copytree(few, place / "store")
    options = {"run_dir": place / "shut" / "run"} if given else {}
    done = child(nobody, partial(os.chdir, place / "shut"), train("barlow", data, max_steps=1, **options))
    denied(done, place / "shut" / "run" if given else "runs/barlow__0__")
    assert not list((place / "shut").iterdir())


def shut_after(checkpoints, folder):
    """Takes the right to write in the folder from its owner, as soon as it has so many checkpoints."""
    write, written = Run.checkpoint, []

    def checkpoint(*args):
        write(*args)
        written.append(args)
        if len(written) == checkpoints:
            folder.chmod(0o555)

    Run.checkpoint = checkpoint


def test_a_run_folder_that_is_shut_while_training(child, few, place):
    data, run = shutil.copytree(few, place / "store"), place / "open" / "run"
    options = {"max_steps": 4, "checkpoint_minutes": 0}
    done = child(nobody, partial(shut_after, 2, run), train("barlow", data, run_dir=run, **options))
    denied(done, run / "checkpoint.pt")
    assert files(run).keys() == {".lock", "args.json", "checkpoint.pt"}
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 2
    run.chmod(0o755)
    assert child(nobody, train("barlow", data, resume=run, **options)) == (0, [])
    assert child(nobody, train("barlow", data, run_dir=place / "open" / "whole", **options)) == (0, [])
    same_runs(place / "open" / "whole", run)


def test_a_log_that_cannot_be_begun(child, few, place):
    data, run = shutil.copytree(few, place / "store"), place / "open" / "run"
    options = {"max_steps": 4, "checkpoint_minutes": 0, "run_dir": run}
    denied(child(nobody, partial(shut_after, 3, run), train("barlow", data, **options)), run / "metrics.jsonl")


def test_a_run_of_someone_else_is_not_resumed(child, few, place):
    data, run = shutil.copytree(few, place / "store"), place / "open" / "run"
    assert child(train("barlow", data, run_dir=run, max_steps=1)) == (0, [])
    before = files(run)
    for path in (*run.iterdir(), run):
        path.chmod(0o555 if path == run else 0o444)
    denied(child(nobody, train("barlow", data, resume=run, max_steps=2)), run)
    assert files(run) == before


@pytest.mark.parametrize("data", ["given", "simulated by the script"])
def test_a_cache_that_cannot_be_written(child, simulated, place, monkeypatch, data):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "shut"))
    shutil.copy(simulated, place / "reads.hdf5")
    given = ("--data", place / "reads.hdf5") if data == "given" else ()
    denied(child(nobody, partial(script, "barlow", *given, "--size", "tiny")), place / "shut" / "poressl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "open"))
    (place / "open" / "poressl").mkdir(mode=0o555)
    denied(child(nobody, partial(script, "barlow", *given, "--size", "tiny")), place / "open" / "poressl")


@pytest.mark.parametrize("out", ["calls.fastq", "calls.fastq.gz", "calls.bam", "store", "arrays"])
def test_output_into_a_folder_without_the_right_to_write(child, simulated, few, place, out):
    model = finetune_basecaller.Basecaller(PoreModel.of_size("tiny"))
    torch.save(model.state_dict(), place / "basecaller.pt")
    shutil.copy(simulated, place / "reads.hdf5")
    words = ["prepare_data", place / "reads.hdf5"]
    if out == "arrays":
        words = ["prepare_data", shutil.copytree(few, place / "prepared"), "--bonito"]
    elif "." in out:
        words = ["basecall", place / "basecaller.pt", place / "reads.hdf5"]
    for folder in (place / "shut", place / "shut" / "deep"):
        denied(child(nobody, partial(script, *words, "-o", folder / out)), folder / out)
    assert not list((place / "shut").iterdir())


# ------------------------------------------------------------------------------------------------ damaged checkpoints


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def damage(kind, path, executed):
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    weights = "model" if "model" in state else "models"
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind in BYTES:
        path.write_bytes(BYTES[kind](content))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(executed)))
    elif kind.startswith("pickle in torch's"):
        state["step"] = Bomb(executed)
        torch.save(state, path, _use_new_zipfile_serialization="old" not in kind)
    elif kind.startswith("no "):
        del state[kind.removeprefix("no ")]
        torch.save(state, path)
    elif kind == "another size":
        other = {f"pore_model.{key}": value for key, value in PoreModel.of_size("small").state_dict().items()}
        torch.save(state | {weights: state[weights] | other}, path)
    else:
        torch.save(VALUES[kind](state, state[weights]), path)


BYTES = {
    "cut in half": lambda content: content[: len(content) // 2],
    "cut off by a byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"no checkpoint\n" * 100,
    "a bit of a weight flipped": lambda content: flipped(content, len(content) // 2),
    "a bit of the index flipped": lambda content: flipped(content, content.index(b"data.pkl") + 200),
}
VALUES = {
    "plain weights": lambda state, weights: weights,
    "a list": lambda state, weights: [state],
    "a tensor": lambda state, weights: torch.zeros(3),
    "a number": lambda state, weights: 3,
    "a step that is none": lambda state, weights: state | {"step": "three"},
    "a place in the log that is none": lambda state, weights: state | {"log_bytes": None},
    "an optimizer that is none": lambda state, weights: state | {"optimizer": weights},
    "weights that are none": lambda state, weights: state | {"models": [1, 2]},
}
PICKLES = ["pickle", "pickle in torch's format", "pickle in torch's old format"]
MISSING = ["no step", "no script", "no log_bytes", "no world_size", "no optimizer", "no models"]
DAMAGES = [("barlow", kind) for kind in ["folder", *BYTES, *VALUES, *PICKLES, *MISSING, "another size"]]
DAMAGES += [("finetune_basecaller", kind) for kind in ("plain weights", "another size", "no best", "no model")]


def resume(name, few, run):
    module = {"barlow": barlow, "finetune_basecaller": finetune_basecaller}[name]
    module.main(module.Args(data=(few,), resume=run, max_steps=LAST + 1, **SMALL | METHOD[name]))


@pytest.mark.parametrize(("name", "kind"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_run_left_as_it_is(whole, few, tmp_path, name, kind):
    run, executed = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(whole / name, run)
    damage(kind, run / "checkpoint.pt", executed)
    before = files(run)
    with pytest.raises(InputError) as error:
        resume(name, few, run)
    message = str(error.value)
    assert str(run / "checkpoint.pt") in message and "\n" not in message and len(message) < 600
    assert files(run) == before and not executed.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_basecaller_that_would_run_code(simulated, tmp_path, kind):
    path, executed = tmp_path / "basecaller.pt", tmp_path / "executed"
    torch.save({"model": {}}, path)
    damage(kind, path, executed)
    with pytest.raises(InputError, match=f"^{path}: not a PyTorch file"):
        basecall.main(basecall.Args(path, (simulated,), tmp_path / "calls.fastq"))
    assert [file.name for file in tmp_path.iterdir()] == ["basecaller.pt"]
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert executed.exists()  # so it would have


def test_a_folder_in_the_place_of_a_file_to_save(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(InputError, match=f"^{tmp_path}/checkpoint.pt: cannot be written"):
        save_whole({}, tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("removed", [True, False])
def test_a_log_shorter_than_at_the_checkpoint_is_gone_on_with(whole, few, tmp_path, removed):
    """Removed, or cut off by a loss of power; what is missing is not filled with zeros."""
    run = tmp_path / "run"
    shutil.copytree(whole / "barlow", run)
    log = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(log[: log.index(b"\n") + 20])
    if removed:
        (run / "metrics.jsonl").unlink()
    resume("barlow", few, run)
    assert [line["step"] for line in read_metrics(run)] == ([] if removed else [4]) + [LAST + 1]
