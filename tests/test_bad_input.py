"""Bad input ends with one line that names the file or argument, an exit code, and nothing half-written."""

import importlib
import itertools
import math
import pickle
import shutil
import subprocess
import sys
import typing
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pod5
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import barlow
import cpc
import dino
import finetune_basecaller
import moco
import prepare_data
from common import InputError
from common.args import parse_args
from common.pore_model import PoreModel
from common.reads import simulate
from tests.forks import full_disk, script, without_bars
from tests.test_store import entries

PROJECT = Path(__file__).parents[1]
SCRIPTS = {script.__name__: script for script in (barlow, cpc, dino, moco, finetune_basecaller, prepare_data)}


@pytest.fixture
def refused(tmp_path, cache, monkeypatch, recwarn):
    """Runs a script in this process, sees that it is refused and leaves nothing, and gives the message."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        words = [str(word) for word in words]
        if name == "prepare_data":
            words += ["--out", "run"]
        else:
            run_dir = [] if "--resume" in words else ["--run-dir", "run"]
            words = ["--size", "tiny", "--device", "cpu", "--max-steps", "1", *run_dir, *words]
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(InputError) as error:
            SCRIPTS[name].main(parse_args(SCRIPTS[name].Args))
        message = str(error.value)
        assert "\n" not in message and len(message) < 600
        assert not [w for w in recwarn if w.category is not ResourceWarning]  # they would be printed, too
        # what is prepared, and whole, may stay for the next time
        left = {path for path in set(tmp_path.rglob("*")) - before - {cache, cache.parent} if path.parent != cache}
        assert all((path.parent / "store.json").is_file() for path in left), left
        assert not [path for path in tmp_path.rglob("*") if ".part-" in path.name]
        return message

    return run


def edited(simulated, path, edit, reads=None):
    """A copy of the simulated reads, `edit` applied to each read, or to the first `reads` of them."""
    shutil.copy(simulated, path)
    with h5py.File(path, "r+") as file:
        for read in list(file["Reads"].values())[:reads]:
            edit(read)
    return path


def no_calibration(read):
    read.attrs["range"] = np.nan


def backwards(read):
    read["Ref_to_signal"][500] = 0


def truncated(simulated, path):
    path.write_bytes(simulated.read_bytes()[: simulated.stat().st_size // 2])
    return path


# ----------------------------------------------------------------------------------------------------- in a process


def test_one_line_and_an_exit_code(simulated, tmp_path, cache):
    """The whole way once, through a process of its own; most of this file looks at the InputError."""
    path = truncated(simulated, tmp_path / "cut.hdf5")
    words = [sys.executable, PROJECT / "barlow.py", "--data", path, "--size", "tiny"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    (line,) = without_bars(done.stderr)
    assert done.returncode == 1 and line.startswith(f"barlow.py: {path}: cannot be read")
    assert not entries(cache) and not (tmp_path / "runs").exists()


def three_reads():
    """A run with no data simulates fewer reads, for time."""
    write = simulate.write_simulated
    simulate.write_simulated = lambda path, reads: write(path, reads // 100)


@pytest.mark.parametrize("data", ["given", "simulated by the script"])
def test_full_disk_while_the_cache_is_written(child, simulated, cache, tmp_path, data):
    words = ["--data", simulated] if data == "given" else []
    done = child(three_reads, partial(full_disk, 100_000), partial(script, "barlow", "--size", "tiny", *words))
    (line,) = done[1]
    assert done[0] == 1 and str(cache) in line and "cannot be written" in line and "free space" in line
    assert not entries(cache) and not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------------ files


def test_no_such_file(refused, tmp_path):
    for name, words in (("barlow", ["--data"]), ("finetune_basecaller", ["--data"]), ("prepare_data", [])):
        assert refused(name, *words, tmp_path / "none.pod5") == f"{tmp_path}/none.pod5: no such file or folder"


@pytest.mark.parametrize("name", ["barlow", "prepare_data"])
def test_truncated_hdf5(refused, simulated, tmp_path, name):
    path = truncated(simulated, tmp_path / "cut.hdf5")
    message = refused(name, *(["--data"] if name == "barlow" else []), path)
    assert message.startswith(f"{path}: cannot be read as hdf5") and "fetch or write it again" in message


@pytest.mark.parametrize("name", ["text.pod5", "text.fast5", "text.hdf5"])
def test_a_text_file_under_a_raw_name(refused, tmp_path, name):
    (tmp_path / name).write_text("these are no reads\n" * 100)
    assert refused("barlow", "--data", tmp_path / name).startswith(f"{tmp_path / name}: cannot be read as")
    (tmp_path / name).write_text("")
    assert refused("barlow", "--data", tmp_path / name).startswith(f"{tmp_path / name}: cannot be read as")


def test_a_name_that_is_not_read(refused, tmp_path):
    (tmp_path / "reads.fastq").write_text("@a\nACGT\n+\n!!!!\n")
    assert ".pod5" in refused("barlow", "--data", tmp_path / "reads.fastq")


def test_an_hdf5_without_reads(refused, tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["numbers"] = np.arange(3)
    assert f"{tmp_path}/other.hdf5: holds neither" in refused("barlow", "--data", tmp_path / "other.hdf5")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, words in (("barlow", ["--data"]), ("prepare_data", [])):
        message = refused(name, *words, tmp_path / "empty")
        assert message.startswith(f"{tmp_path}/empty: no ") and ".pod5" in message


def test_a_folder_of_which_a_file_cannot_be_read(simulated, tmp_path, capsys):
    """The others are kept; the file is named and counted."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(simulated, tmp_path / "in" / "deep" / "whole.hdf5")
    (tmp_path / "in" / "text.pod5").write_text("no")
    (tmp_path / "in" / "a-folder.fast5").mkdir()
    store = prepare_data.open_stores([tmp_path / "in"])[0]
    assert store.info["left_out"] == {"in files that cannot be read": 1} and len(store.reads) == 12
    assert f"passed over: {tmp_path}/in/text.pod5" in capsys.readouterr().err


def test_no_reads_in_a_file(refused, tmp_path):
    path = tmp_path / "none.pod5"
    pod5.Writer(path).close()
    for name, words in (("barlow", ["--data"]), ("finetune_basecaller", ["--data"]), ("prepare_data", [])):
        assert refused(name, *words, path) == f"{path}: no read in it"


def test_reads_shorter_than_a_chunk(refused, simulated):
    message = refused("barlow", "--data", simulated, "--chunk-len", "30000")
    assert str(simulated.stem) in message and "30000" in message and "--chunk-len" in message
    message = refused("finetune_basecaller", "--data", simulated, "--chunk-len", "30000")
    assert "no labelled training read of at least 30000 samples" in message
    message = refused("prepare_data", simulated, "--chunk-len", "30000")
    assert message.startswith(str(simulated)) and "12 shorter than 30000 samples); give a smaller --chunk" in message


@pytest.mark.parametrize("edit, reason", [(no_calibration, "no calibration"), (backwards, "goes backwards")])
def test_no_read_is_usable(refused, simulated, tmp_path, edit, reason):
    path = edited(simulated, tmp_path / "bad.hdf5", edit)
    for name, words in (("barlow", ["--data"]), ("prepare_data", [])):
        message = refused(name, *words, path)
        assert message.startswith(f"{path}: no read can be used (left out: 12 ") and reason in message


def test_a_bad_read_in_a_good_file_is_skipped_and_counted(simulated, tmp_path, capsys):
    """Two are without calibration, and the compressed signal of a third is overwritten."""
    path = edited(simulated, tmp_path / "some.hdf5", no_calibration, reads=2)
    with h5py.File(path) as file:
        chunk = file["Reads/simulated-1-7/Dacs"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 20 : chunk.byte_offset + 200] = bytes(180)
    path.write_bytes(content)
    store = prepare_data.open_stores([path])[0]
    left_out = {reason.split(":")[0]: count for reason, count in store.info["left_out"].items()}
    assert left_out == {"no calibration": 2, "corrupt": 1} and store.info["kept"] == {"labelled": 9}
    assert "2 no calibration, 1 corrupt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, array",
    [
        ("chunks", np.zeros((20, 50, 1), np.float16)),
        ("references", np.ones((19, 9), np.uint8)),
        ("reference_lengths", np.full((20, 1), 5)),
        ("reference_lengths", np.full(20, -3)),
        ("reference_lengths", np.full(20, 5.0)),
        ("chunks", np.zeros((20, 50), "S3")),
        ("reference_lengths", np.full(20, 10)),  # over the width of references
        ("references", np.full((20, 9), 5, np.uint8)),
        ("references", np.ones((20, 0), np.uint8)),
        ("references", None),
        ("reference_lengths", np.array([{}] * 20)),  # would need unpickling
    ],
)
def test_bonito_arrays_that_do_not_fit(refused, tmp_path, name, array):
    folder = tmp_path / "arrays"
    folder.mkdir()
    arrays = {"chunks": np.random.default_rng(0).standard_normal((20, 50)).astype(np.float16)}
    arrays |= {"references": np.ones((20, 9), np.uint8), "reference_lengths": np.full(20, 5)} | {name: array}
    for key, value in arrays.items():
        if value is not None:
            np.save(folder / f"{key}.npy", value)
    message = refused("finetune_basecaller", "--data", folder, "--chunk-len", "50", "--batch-size", "4")
    assert message.startswith(f"{folder}: ")


def test_truncated_pod5(refused, shared_data, tmp_path):
    content = (shared_data / "formats/same_reads_as_multi_read_gzip.pod5").read_bytes()
    (tmp_path / "cut.pod5").write_bytes(content[:-1000])
    assert refused("barlow", "--data", tmp_path / "cut.pod5").startswith(f"{tmp_path}/cut.pod5: cannot be read as pod5")


def test_a_corrupt_read_in_a_good_pod5(shared_data, tmp_path):
    content = bytearray((shared_data / "formats/same_reads_as_multi_read_gzip.pod5").read_bytes())
    content[100_000:100_300] = bytes(300)  # in the compressed signal of one read
    (tmp_path / "hole.pod5").write_bytes(content)
    info = prepare_data.open_stores([tmp_path / "hole.pod5"])[0].info
    ((reason, count),) = info["left_out"].items()
    assert info["kept"] == {"unlabelled": 9} and reason.startswith("corrupt: ") and count == 1


@pytest.mark.parametrize("data", ["given", "simulated by the script"])
def test_a_cache_that_cannot_be_made(refused, simulated, tmp_path, monkeypatch, data):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    words = ["--data", simulated] if data == "given" else []
    message = refused("barlow", *words)
    assert f"{tmp_path}/file/poressl" in message and "cannot be written" in message


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("barlow", "--chunk-len 24", "--chunk-len 24: should be greater than or equal to 25"),
        ("barlow", "--batch-size 1", "--batch-size 1: should be greater than or equal to 2"),
        ("barlow", "--lr -1", "--lr -1.0: should be greater than 0"),
        ("barlow", "--lr nan", "--lr nan: should be a finite number"),
        ("barlow", "--drop-chance 0.9 0.1", "--drop-chance 0.9 0.1: should be LOW HIGH, with LOW at most HIGH"),
        ("barlow", "--drop-chance 0.5 1.0", "--drop-chance 1.0: should be less than 1"),
        ("barlow", "--dropout 1", "--dropout 1.0: should be less than 1"),
        ("finetune_basecaller", "--label-fraction 1.5", "--label-fraction 1.5: should be less than or equal to 1"),
        ("moco", "--momentum 1.1", "--momentum 1.1: should be less than or equal to 1"),
        ("dino", "--teacher-temperature 0", "--teacher-temperature 0.0: should be greater than 0"),
        ("prepare_data", "--min-identity 70", "--min-identity 70.0: should be less than or equal to 1"),
        ("cpc", "--future-steps 50", "--future-steps 50: chunks may have only 50 frames; give fewer, "),
        ("cpc", "--future-steps 30 --drop-chance 0.25 0.38", "--future-steps 30: chunks may have only 25 frames; "),
        ("moco", "--batchnorm-groups 3", "--batchnorm-groups: should cut --batch-size into equal groups of 2 or more"),
        ("moco", "--batchnorm-groups 4", "--batchnorm-groups: should cut --batch-size into equal groups of 2 or more"),
        ("barlow", "--batch-size 5000", "--batch-size 5000: more than the 243 training chunks there are; give a sma"),
        ("finetune_basecaller", "--batch-size 5000", "--batch-size 5000: more than the 243 training chunks there are"),
    ],
)
def test_arguments_that_cannot_be_meant(refused, simulated, name, words, message):
    settings = [] if name == "prepare_data" else ["--chunk-len", "400", "--batch-size", "4", "--data"]
    assert refused(name, *settings, simulated, *words.split()).startswith(message)


@pytest.mark.parametrize("name", [*SCRIPTS, "basecall", "byol", "masked", "simclr", "simsiam"])
def test_no_number_may_be_anything(name, monkeypatch):
    """Each argument that is a number, or two, has a constraint beside it, by which none may be negative or nan."""
    args = importlib.import_module(name).Args
    needed = {"basecall": ["weights.pt", "a.pod5", "-o", "-"], "prepare_data": ["a.pod5", "-o", "out"]}.get(
        name, ["--seed", "0"]
    )
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *needed])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    given, check, numbers = vars(parse_args(args)), TypeAdapter(args).validate_python, 0
    check(given)
    for argument, kind in typing.get_type_hints(args).items():
        kinds = {kind, *typing.get_args(kind), *itertools.chain(*map(typing.get_args, typing.get_args(kind)))}
        for value in (-1, math.nan) if float in kinds else (-1,) if int in kinds else ():
            numbers += 1
            with pytest.raises(ValidationError, match=argument):
                check(given | {argument: (value, value) if argument == "drop_chance" else value})
    assert numbers > 2


def test_a_run_folder_that_exists(refused, simulated, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    words = ["--data", simulated, "--batch-size", "2", "--run-dir", tmp_path / "mine"]
    message = refused("finetune_basecaller", *words)
    assert message.startswith(f"{tmp_path}/mine: exists") and "--run-dir" in message
    assert (tmp_path / "mine" / "notes").read_text() == "keep"


@pytest.mark.parametrize("args", [None, "not json", "[]", "{}", '{"unheard_of": 1}', '{"data": []}'])
def test_resume_of_what_is_no_run(refused, simulated, tmp_path, args):
    folder = tmp_path / "folder"
    folder.mkdir()
    if args is not None:
        (folder / "args.json").write_text(args)
    message = refused("barlow", "--resume", folder, "--data", simulated, "--chunk-len", "400", "--batch-size", "4")
    assert str(folder) in message


# ---------------------------------------------------------------------------------------------------------- weights


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_weights(kind, tmp_path):
    path = tmp_path / "pore_model.pt"
    state = PoreModel.of_size("tiny").state_dict()
    if kind == "text":
        path.write_text("no weights")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    elif kind == "pickle in torch's format":
        torch.save({"encoder.blocks.3.conv.weight": Bomb(tmp_path / "executed")}, path)
    elif kind == "cut off":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "other size":
        torch.save(PoreModel.of_size("small").state_dict(), path)
    elif kind == "one tensor missing":
        state.pop("layers.1.feed_forward.0.bias")
        torch.save(state, path)
    elif kind == "one tensor of another shape":
        torch.save(state | {"layers.1.feed_forward.0.bias": torch.zeros(3)}, path)
    elif kind == "another thing":
        torch.save([torch.zeros(2)], path)
    elif kind == "half a basecaller":
        torch.save({"head.weight": torch.zeros(10, 128)}, path)
    elif kind == "basecaller of other bases":
        state = {f"pore_model.{key}": value for key, value in state.items()}
        torch.save(state | {"head.weight": torch.zeros(14, 128), "head.bias": torch.zeros(14)}, path)
    elif kind == "checkpoint":
        torch.save({"pore_model": state, "step": 3}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "missing", "text", "folder", "pickle", "pickle in torch's format", "cut off", "other size",
        "one tensor missing", "one tensor of another shape", "another thing", "checkpoint",
        "half a basecaller", "basecaller of other bases",
    ],
)  # fmt: skip
def test_weights_that_are_none(refused, simulated, tmp_path, kind):
    path = bad_weights(kind, tmp_path)
    methods = [] if kind == "basecaller of other bases" else ["barlow"]  # its pore model is all that they take
    for name in ["finetune_basecaller", *methods]:
        message = refused(name, "--data", simulated, "--weights", path, "--batch-size", "2")
        assert str(path) in message and not (tmp_path / "executed").exists()
        if kind == "other size":
            assert "with 4 layers of 256 channels" in message and "this run has 3 layers of 128 channels" in message
