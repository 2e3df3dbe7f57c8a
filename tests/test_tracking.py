"""--track: what wandb writes without an account, read back from its files; and that nothing of it is there without."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from benchmark.plot_runs import read_metrics

PROJECT = Path(__file__).parents[1]
SMALL = ["--size", "tiny", "--chunk-len", "400", "--batch-size", "14", "--device", "cpu", "--run-dir", "run"]


class Place:
    """A folder to run scripts in, with a home of its own: nobody is logged in, and nothing reaches the user's."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "run"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC", "XDG_"))}
        for name in ("HOME", "TMPDIR"):
            self.environment[name] = str(folder / name)
            (folder / name).mkdir(exist_ok=True)
        self.environment |= {"WANDB_MODE": "offline", "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}

    def command(self, script, *words):
        return [str(word) for word in (sys.executable, PROJECT / f"{script}.py", *words)]

    def do(self, *command, code=0, **environment):
        """Runs a command to its end, and gives what it printed: (stdout, stderr)."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def records(path):
    """The records of a run-ID.wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32768 bytes."""
    content, at, record = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little of the block is left for the head of a piece
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


class Tracked:
    """What one wandb folder holds: `id`, `name`, `config`, `exit_code`, and of each step `history` and `pictures`."""

    def __init__(self, folder):
        (path,) = folder.glob("run-*.wandb")
        self.history, self.pictures = {}, {}  # {step: {name: value}}
        for record in records(path):
            if record.HasField("run"):
                self.id, self.name = record.run.run_id, record.run.display_name
                self.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {tuple(i.nested_key) or (i.key,): json.loads(i.value_json) for i in record.history.item}
                step = row[("_step",)]
                assert step not in self.history
                self.history[step] = {key[0]: x for key, x in row.items() if len(key) == 1 and key[0][0] != "_"}
                files = {key[0]: folder / "files" / x for key, x in row.items() if key[1:] == ("path",)}
                assert all(row[name, "_type"] == "image-file" for name in files)
                self.pictures[step] = {name: path.read_bytes() for name, path in files.items()}
            elif record.HasField("exit"):
                self.exit_code = record.exit.exit_code
        del self.config["_wandb"]


def tracked(run):
    """All wandb folders of a run, in the order of time."""
    return [Tracked(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]


def rows(lines):
    """Lines of metrics.jsonl as {step: {name: value}}; lines of one step, which share no name, are one row."""
    lines, rows = list(lines), {}
    for line in lines:
        rows.setdefault(line["step"], {}).update({name: value for name, value in line.items() if name != "step"})
    assert sum(len(line) - 1 for line in lines) == sum(map(len, rows.values()))
    return rows


def test_config_metrics_and_picture_of_a_run(place, simulated):
    place.do(*place.command("cpc", "--data", simulated, *SMALL, "--max-steps", 20, "--track"))
    (found,) = tracked(place.run)
    assert found.name == "run" and found.exit_code == 0
    assert found.config == json.loads((place.run / "args.json").read_text())
    assert found.config["batch_size"] == 14 and found.config["future_steps"] == 35

    assert found.history == rows(read_metrics(place.run))
    assert list(found.history) == [10, 17, 20]  # an epoch has 17 steps
    assert "accuracy" in found.history[20]  # the metric, beside the picture of that name
    image = (place.run / "accuracy.png").read_bytes()
    assert image.startswith(b"\x89PNG") and found.pictures == {10: {}, 17: {}, 20: {"pictures/accuracy": image}}


def test_a_resumed_run_goes_on_with_its_wandb_run(place, simulated):
    place.do(*place.command("finetune_basecaller", "--data", simulated, *SMALL, "--max-steps", 12, "--track"))
    assert tracked(place.run)[0].history == rows(read_metrics(place.run))
    place.do(*place.command("finetune_basecaller", "--resume", "run", "--max-steps", 20, "--track"))
    before, after = tracked(place.run)
    assert before.id == after.id and before.exit_code == after.exit_code == 0
    assert after.config == before.config | {"max_steps": 20, "resume": "run"}
    assert list(after.history) == [20]  # epochs of 17 steps are not validated each
    assert after.history == rows(line for line in read_metrics(place.run) if line["step"] > 12)


UNUSUAL = """
import os
import shutil
from pathlib import Path
import wandb
from matplotlib.figure import Figure
import barlow
from common.run import Run

run = Run(barlow.Args(run_dir=Path("run"), track=True), "barlow.py")
run.picture("early", Figure())
run.log(0, x=1)
run.log(3, x=2)
run.picture("x", Figure())
run.log(3, y=3)
run.log(5, y=4)
run.tracker.finish()
wandb.teardown()  # which waits until the file is written
del os.environ["WANDB_RUN_ID"]
shutil.copytree("run/wandb", "kept", symlinks=True)
for folder in Path("run/wandb").glob("offline-run-*"):
    shutil.rmtree(folder)  # as wandb clean does
run = Run(barlow.Args(resume=Path("run"), track=True), "barlow.py")
assert run.tracker.id == "an-id-of-mine", run.tracker.id
"""


def test_a_picture_leaves_the_step_open_and_any_id_is_found_again(place):
    place.do(sys.executable, "-c", UNUSUAL, WANDB_RUN_ID="an-id-of-mine")
    shutil.rmtree(place.run / "wandb")
    (place.folder / "kept").rename(place.run / "wandb")
    (found,) = tracked(place.run)
    assert found.history == {0: {"x": 1}, 3: {"x": 2, "y": 3}, 5: {"y": 4}}
    names = {step: list(row) for step, row in found.pictures.items()}
    assert names == {0: ["pictures/early"], 3: ["pictures/x"], 5: []}


def test_without_an_account_one_line_says_so_and_the_folder_is_free_again(place, simulated):
    nowhere = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    words = place.command("finetune_basecaller", "--data", simulated, *SMALL, "--max-steps", 1, "--track")
    _, said = place.do(*words, code=1, **nowhere)
    last = said.splitlines()[-1]
    assert last.startswith("finetune_basecaller.py: --track: wandb: ") and "Traceback" not in said
    assert "login" in last and "WANDB_MODE=offline" in last
    assert not place.run.exists()


def test_a_mode_that_wandb_does_not_know_is_told_in_one_line(place, simulated):
    words = place.command("finetune_basecaller", "--data", simulated, *SMALL, "--max-steps", 1, "--track")
    _, said = place.do(*words, code=1, WANDB_MODE="ofline")
    assert "'ofline'" in said.splitlines()[-1] and "Traceback" not in said
    assert not place.run.exists()


def test_the_one_line_of_an_error_stays_the_last_and_wandb_is_told(place, simulated):
    words = place.command("cpc", "--data", simulated, *SMALL, "--max-steps", 9, "--lr", "1e30", "--track")
    _, said = place.do(*words, code=1)
    assert said.splitlines()[-1].startswith("cpc.py: step 2: the loss is ") and "Traceback" not in said
    assert tracked(place.run)[0].exit_code == 1


def test_ctrl_c_leaves_a_checkpoint_and_wandb_is_told(place, simulated):
    words = place.command("finetune_basecaller", "--data", simulated, *SMALL, "--track")
    with subprocess.Popen(
        words, cwd=place.folder, env=place.environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:  # fmt: skip
        until = time.monotonic() + 60
        log = place.run / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < until:
            if log.exists() and log.read_text().count("\n") > 1:  # so that wandb has the first
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    (line,) = (line for line in said.splitlines() if line.startswith("stopped after step "))
    assert line.endswith("go on with --resume run") and "Traceback" not in said
    assert (place.run / "checkpoint.pt").exists() and not (place.run / "basecaller_last.pt").exists()
    (found,) = tracked(place.run)
    assert found.exit_code == 128 + signal.SIGINT and found.history[10] == rows(read_metrics(place.run))[10]


def test_without_track_wandb_is_not_imported(place, simulated):
    code = (
        f"import runpy, sys; sys.argv[0] = 'cpc.py'; runpy.run_path({str(PROJECT / 'cpc.py')!r}, run_name='__main__')"
    )
    code += "; assert 'torch' in sys.modules and 'wandb' not in sys.modules"
    place.do(sys.executable, "-c", code, "--data", str(simulated), *SMALL, "--max-steps", "1")
    assert sorted(path.name for path in place.run.iterdir()) == [
        ".lock", "accuracy.png", "args.json", "checkpoint.pt", "metrics.jsonl", "pore_model.pt"
    ]  # fmt: skip
