"""Two processes with half of each batch do what one does with the whole: torch.distributed with gloo, on the CPU."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moco
import prepare_data
from benchmark.plot_runs import read_metrics
from common import InputError
from common.args import parse_args
from common.run import tensors_of
from tests.distributed_worker import SCRIPTS, STEPS
from tests.test_methods import settings

ROOT = Path(__file__).parents[1]
each_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a Python module or script with a cache folder of its own, its output piped."""
    own = str(tmp_path_factory.mktemp("own"))

    def start(*words, **options):
        environment = os.environ | {"XDG_CACHE_HOME": own, "TMPDIR": own, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        words = [sys.executable, *map(str, words)]
        return subprocess.Popen(words, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes, **options)

    return start


@pytest.fixture(scope="module")
def torchrun(start):
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return lambda *rest, **options: start(*words, *rest, **options)


@pytest.fixture(scope="module")
def worked(start, few, tmp_path_factory):
    """The folder of what each script computed, whole and in two parts, and of runs of two that were resumed."""
    folder = tmp_path_factory.mktemp("worked")
    process = start("-m", "tests.distributed_worker", few, folder)
    _, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return folder


def computed(worked, dtype, name):
    """What one process computed, and what each of two did."""
    return [torch.load(worked / f"{dtype}-{part}.pt") for part in (f"1/{name}-0", f"2/{name}-0", f"2/{name}-1")]


@pytest.mark.parametrize("dtype", STEPS)
@each_script
def test_half_batches_give_the_loss_and_the_gradients_of_the_whole(name, dtype, worked):
    """In float64 three steps long, in float32 at the first, since steps make roundings grow: there to 1e-5."""
    one, two, _ = computed(worked, dtype, name)
    tolerance = 1e-10 if dtype == "float64" else 3e-5 if name == "finetune_basecaller" else 1e-5
    assert len(one["losses"]) == len(one["gradients"]) == STEPS[dtype]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=tolerance, atol=tolerance)
    for whole, parts in zip(one["gradients"], two["gradients"], strict=True):
        largest = max(gradient.norm() for gradient in whole)
        seen = 0
        for expected, gradient in zip(whole, parts, strict=True):
            if expected.norm() > 1e-6 * largest:
                assert (gradient - expected).norm() <= tolerance * expected.norm()
                seen += 1
            else:  # of a bias before BatchNorm, which has no say
                assert gradient.norm() <= 1e-6 * largest
        assert seen >= len(whole) - 3


@each_script
def test_two_processes_validate_as_one_does(name, worked):
    one, *two = (found["validation"] for found in computed(worked, "float64", name))
    assert "validation/loss" in one and two[0] == pytest.approx(one, rel=1e-9) and two[0] == two[1]


@each_script
def test_all_processes_have_the_same_weights_queue_and_centre(name, worked):
    one, *two = (list(tensors_of(found["state"])) for found in computed(worked, "float64", name))
    assert len(one) == len(two[0])
    torch.testing.assert_close(*two, rtol=0, atol=0)


@each_script
def test_a_run_of_two_that_was_stopped_goes_on_exactly(name, worked):
    """The signal reaches one of them, and both stop after the same step."""
    resumed = worked / "resumed"
    step = torch.load(resumed / f"{name}-stopped.pt")["step"]
    assert step == int((resumed / f"{name}-stopped-at").read_text()) < 4
    saved, logs = [], []
    for run in (resumed / f"{name}-whole", resumed / f"{name}-stopped"):
        saved.append(torch.load(run / "checkpoint.pt"))
        logs.append([{**line, "chunks_per_second": 0} for line in read_metrics(run)])
        assert saved[-1].pop("log_bytes") > 0 and saved[-1]["world_size"] == 2 and name == saved[-1].pop("script")
        assert (run / "pore_model.pt").exists() or (run / "basecaller_last.pt").exists()
    torch.testing.assert_close(*saved, rtol=0, atol=0)
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [2, 4, 4]


def test_sigterm_to_torchrun_ends_the_run_with_a_checkpoint(torchrun, few, tmp_path, capsys):
    """What a scheduler does. torchrun passes it on; that its own exit is not 0 is right. One process can go on."""
    run = tmp_path / "run"
    words = ("--size", "tiny", "--device", "cpu", "--chunk-len", 200, "--batch-size", 8, "--embedding-dim", 32)
    words += ("--queue", 64, "--checkpoint-minutes", 0, "--data", few, "--run-dir", run)
    process = torchrun(ROOT / "moco.py", *words)
    while process.poll() is None and not (run / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.terminate()
    out, error = process.communicate()
    stopped = re.search(rf"stopped after step (\d+); go on with --resume {run}", error)
    assert process.returncode != 0 and stopped, error[-3000:]
    assert out.count(f"moco: run folder {run}\n") == 1
    step = int(stopped[1])
    assert not moco.main(settings("moco", few, None, resume=run, max_steps=step + 2))
    assert f"going on after step {step}\nthe run had 2 processes, now 1: it draws other" in capsys.readouterr().out
    assert read_metrics(run)[-1]["step"] == step + 2


def test_bad_input_is_said_once(torchrun, few, tmp_path):
    words = ("--batch-size", "9", "--data", few, "--chunk-len", "400", "--device", "cpu")
    process = torchrun(ROOT / "simclr.py", *words, cwd=tmp_path)
    _, error = process.communicate()
    message = "simclr.py: --batch-size 9: cannot be split equally among 2 processes"
    assert process.returncode == 1 and error.count(message) == 1 and not (tmp_path / "runs").exists()
    assert error.index(message) < error.index("Traceback")  # torchrun's own


def test_data_are_prepared_by_one_process(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "reads", "-o", "store"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(InputError, match="works as one process; start it without torchrun"):
        parse_args(prepare_data.Args)
