"""Bad input ends with one line that names the file or argument, an exit code, and nothing half-written."""

import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import barlow
import cpc
import dino
import finetune_basecaller
import moco
import prepare_data
from common import InputError
from common.pore_model import PoreModel
from common.run import parse_args

PROJECT = Path(__file__).parents[1]
SCRIPTS = {script.__name__: script for script in (barlow, cpc, dino, moco, finetune_basecaller, prepare_data)}


@pytest.fixture
def refused(tmp_path, cache, monkeypatch, recwarn):
    """Runs a script in this process, sees that it is refused and leaves nothing, and gives the message."""
    monkeypatch.chdir(tmp_path)

    def run(script, *words):
        words = [str(word) for word in words]
        if script == "prepare_data":
            words += ["--out", "run"]
        else:
            run_dir = [] if "--resume" in words else ["--run-dir", "run"]
            words = ["--size", "tiny", "--device", "cpu", "--max-steps", "1", *run_dir, *words]
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(InputError) as error:
            SCRIPTS[script].main(parse_args(SCRIPTS[script].Args))
        message = str(error.value)
        assert "\n" not in message and len(message) < 600
        assert not [w for w in recwarn if w.category is not ResourceWarning]  # they would be printed, too
        # what is prepared, and whole, may stay for the next time
        left = {path for path in set(tmp_path.rglob("*")) - before - {cache, cache.parent} if path.parent != cache}
        assert all((path.parent / "store.json").is_file() for path in left), left
        assert not [path for path in tmp_path.rglob("*") if ".part-" in path.name]
        return message

    return run


def run_script(tmp_path, script, *words, **options):
    """Exit code and the lines on standard error, progress bars apart, of a script in a process of its own."""
    words = [sys.executable, str(PROJECT / f"{script}.py"), *map(str, words)]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, **options)
    lines = [line.split("\r")[-1] for line in done.stderr.splitlines()]
    return done.returncode, [line for line in lines if line.strip() and not re.search(r"\d\d:\d\d.*\] *$", line)]


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
    """The whole way once, through a process of its own; the rest of this file looks at the InputError."""
    path = truncated(simulated, tmp_path / "cut.hdf5")
    code, lines = run_script(tmp_path, "barlow", "--data", path, "--size", "tiny")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith(f"barlow.py: {path}: cannot be read") and "Traceback" not in lines[0]
    assert not list(cache.iterdir()) and not (tmp_path / "runs").exists()


def limit_file_size():
    """What a full disk does: no file grows over 100 000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("data", ["given", "simulated by the script"])
def test_full_disk_while_the_cache_is_written(simulated, tmp_path, cache, data):
    words = ["--data", simulated] if data == "given" else []
    code, lines = run_script(tmp_path, "barlow", "--size", "tiny", *words, preexec_fn=limit_file_size)
    assert code == 1 and len(lines) == 1, (code, lines[:3])
    assert str(cache) in lines[0] and "cannot be written" in lines[0] and "free space" in lines[0]
    assert not list(cache.iterdir()) and not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------------ files


def test_no_such_file(refused, tmp_path):
    for script, words in (("barlow", ["--data"]), ("finetune_basecaller", ["--data"]), ("prepare_data", [])):
        assert refused(script, *words, tmp_path / "none.pod5") == f"{tmp_path}/none.pod5: no such file or folder"


@pytest.mark.parametrize("script", ["barlow", "prepare_data"])
def test_truncated_hdf5(refused, simulated, tmp_path, script):
    path = truncated(simulated, tmp_path / "cut.hdf5")
    message = refused(script, *(["--data"] if script == "barlow" else []), path)
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
    for script, words in (("barlow", ["--data"]), ("prepare_data", [])):
        message = refused(script, *words, tmp_path / "empty")
        assert message.startswith(f"{tmp_path}/empty: no ") and ".pod5" in message


def test_a_folder_of_which_a_file_cannot_be_read(simulated, tmp_path, capsys):
    """The others are kept; the file is named and counted."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(simulated, tmp_path / "in" / "deep" / "whole.hdf5")
    (tmp_path / "in" / "text.pod5").write_text("no")
    (tmp_path / "in" / "a-folder.fast5").mkdir()
    store = prepare_data.open_data([tmp_path / "in"])[0]
    assert store.info["left_out"] == {"in files that cannot be read": 1} and len(store.reads) == 12
    assert f"passed over: {tmp_path}/in/text.pod5" in capsys.readouterr().err


def test_reads_shorter_than_a_chunk(refused, simulated):
    message = refused("barlow", "--data", simulated, "--chunk-len", "30000")
    assert str(simulated.stem) in message and "30000" in message and "--chunk-len" in message
    message = refused("finetune_basecaller", "--data", simulated, "--chunk-len", "30000")
    assert "no labelled training read of at least 30000 samples" in message
    message = refused("prepare_data", simulated, "--chunk-len", "30000")
    assert message.startswith(str(simulated)) and "12 shorter than 30000 samples" in message


@pytest.mark.parametrize("edit, reason", [(no_calibration, "no calibration"), (backwards, "goes backwards")])
def test_no_read_is_usable(refused, simulated, tmp_path, edit, reason):
    path = edited(simulated, tmp_path / "bad.hdf5", edit)
    for script, words in (("barlow", ["--data"]), ("prepare_data", [])):
        message = refused(script, *words, path)
        assert message.startswith(f"{path}: no read can be used (left out: 12 ") and reason in message


def test_a_bad_read_in_a_good_file_is_skipped_and_counted(simulated, tmp_path, capsys):
    """Two are without calibration, and the compressed signal of a third is overwritten."""
    path = edited(simulated, tmp_path / "some.hdf5", no_calibration, reads=2)
    with h5py.File(path) as file:
        chunk = file["Reads/simulated-1-7/Dacs"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 20 : chunk.byte_offset + 200] = bytes(180)
    path.write_bytes(content)
    store = prepare_data.open_data([path])[0]
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
    info = prepare_data.open_data([tmp_path / "hole.pod5"])[0].info
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
    "words",
    [
        "--chunk-len 0",
        "--chunk-len -3600",
        "--lr -1",
        "--lr 0",
        "--lr nan",
        "--noise-factor -1",
        "--drop-chance 0.9 0.1",
        "--drop-chance 0.5 1.0",
        "--drop-chance -0.1 0.2",
        "--batch-size 0",
        "--epochs 0",
        "--max-steps 0",
        "--warmup-steps -1",
        "--checkpoint-every 0",
        "--seed -1",
        "--representation 0",
    ],
)
def test_arguments_that_cannot_be_meant(refused, simulated, words):
    words = words.split()
    message = refused("barlow", "--data", simulated, "--batch-size", "4", *words)
    assert " ".join(words) in message and "should be" in message


@pytest.mark.parametrize("words", ["--label-fraction 0", "--label-fraction 1.5", "--pore-model-lr -1", "--lr -1"])
def test_arguments_of_fine_tuning(refused, simulated, words):
    message = refused("finetune_basecaller", "--data", simulated, *words.split())
    assert words in message and "should be" in message


def test_chunk_len_of_prepare_data(refused, simulated):
    assert "--chunk-len 0" in refused("prepare_data", simulated, "--chunk-len", "0")


def test_a_chunk_too_short_for_the_head(refused, simulated):
    message = refused("barlow", "--data", simulated, "--chunk-len", "20", "--batch-size", "4")
    assert "--chunk-len 20" in message


@pytest.mark.parametrize("script", ["barlow", "finetune_basecaller"])
def test_more_chunks_a_batch_than_there_are(refused, simulated, script):
    assert "--batch-size 5000: more than the" in refused(script, "--data", simulated, "--batch-size", "5000")


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
    for script in ["finetune_basecaller", *methods]:
        message = refused(script, "--data", simulated, "--weights", path, "--batch-size", "2")
        assert str(path) in message and not (tmp_path / "executed").exists()
        if kind == "other size":
            assert "with 4 layers of 256 channels" in message and "this run has 3 layers of 128 channels" in message


def test_a_batch_of_one_chunk_has_no_statistics(refused, simulated):
    assert "--batch-size 1:" in refused("barlow", "--data", simulated, "--chunk-len", "400", "--batch-size", "1")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("cpc", "--future-steps 50"),
        ("cpc", "--future-steps 30 --drop-chance 0.25 0.38"),
        ("moco", "--batchnorm-groups 3"),
        ("moco", "--batchnorm-groups 4"),
        ("moco", "--queue 3"),
        ("moco", "--momentum 1.1"),
        ("dino", "--center-momentum -0.1"),
        ("dino", "--teacher-temperature 0"),
    ],
)
def test_arguments_of_a_method_that_cannot_be_meant(refused, simulated, method, words):
    words = words.split()
    message = refused(method, "--data", simulated, "--chunk-len", "400", "--batch-size", "4", *words)
    assert message.startswith(" ".join(words[:2]))
