"""Two processes with half of each batch do what one does with the whole: torch.distributed with gloo, on the CPU."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmark.plot_runs import read_metrics
from tests.test_methods import METHODS

ROOT = Path(__file__).parents[1]
SCRIPTS = [*METHODS, "finetune_basecaller"]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a command with folders of its own for the cache and for torchrun's files, its output piped."""
    own = str(tmp_path_factory.mktemp("own"))

    def start(*words, **options):
        own_folders = {"XDG_CACHE_HOME": own, "TMPDIR": own}
        environment = os.environ | own_folders | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([str(word) for word in words], env=environment, **pipes, **options)

    return start


def finished(process):
    out, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return out, error


@pytest.fixture(scope="module", params=["float64", "float32"])
def compared(request, start, simulated, tmp_path_factory):
    """What each script computed in three steps, whole and in two parts, by the name of the script."""
    folder, worker = tmp_path_factory.mktemp("compared"), ("-m", "tests.distributed_worker", "compare", simulated)
    (folder / "one").mkdir(), (folder / "two").mkdir()
    both = [
        start(sys.executable, *worker, folder / "one", request.param),
        start(*TORCHRUN, *worker, folder / "two", request.param),
    ]
    for process in both:
        finished(process)
    return request.param, {
        name: [torch.load(folder / part) for part in (f"one/{name}-0.pt", f"two/{name}-0.pt", f"two/{name}-1.pt")]
        for name in SCRIPTS
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_half_batches_give_the_loss_and_the_gradients_of_the_whole(name, compared):
    """In float64 three steps long; in float32, where steps make roundings grow, at the first: both to 1e-5."""
    dtype, found = compared
    one, two, _ = found[name]
    steps = 3 if dtype == "float64" else 1
    tolerance = 1e-10 if dtype == "float64" else 3e-5 if name == "finetune_basecaller" else 1e-5
    for whole, parts in zip(one["losses"][:steps], two["losses"][:steps], strict=True):
        torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)
    for whole, parts in zip(one["gradients"][:steps], two["gradients"][:steps], strict=True):
        largest = max(gradient.norm() for gradient in whole)
        seen = 0
        for expected, gradient in zip(whole, parts, strict=True):
            if expected.norm() > 1e-6 * largest:
                assert (gradient - expected).norm() <= tolerance * expected.norm()
                seen += 1
            else:  # of a bias before BatchNorm, which has no say
                assert gradient.norm() <= 1e-6 * largest
        assert seen >= len(whole) - 3


def tensors_of(state):
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, dict | list):
            yield from tensors_of(value)
        elif torch.is_tensor(value):
            yield value


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_processes_have_the_same_weights_queue_and_centre(name, compared):
    one, *parts = (list(tensors_of(found["state"])) for found in compared[1][name])
    assert len(one) == len(parts[0])
    torch.testing.assert_close(*parts, rtol=0, atol=0)


@pytest.fixture(scope="module")
def resumed(start, simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    finished(start(*TORCHRUN, "-m", "tests.distributed_worker", "resume", simulated, folder))
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_of_two_that_was_stopped_goes_on_exactly(name, resumed):
    """The signal reaches one of them, and both stop after the same step."""
    step = torch.load(resumed / f"{name}-stopped.pt")["step"]
    assert step == int((resumed / f"{name}-stopped-at").read_text()) < 10
    saved, logs = [], []
    for run in (resumed / f"{name}-whole", resumed / f"{name}-stopped"):
        saved.append(torch.load(run / "checkpoint.pt"))
        logs.append([{**line, "chunks_per_second": 0} for line in read_metrics(run)])
        assert saved[-1].pop("log_bytes") > 0 and saved[-1]["world_size"] == 2 and name == saved[-1].pop("script")
        assert (run / "pore_model.pt").exists() or (run / "basecaller_last.pt").exists()
    torch.testing.assert_close(*saved, rtol=0, atol=0)
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [10, 10]


def test_sigterm_to_torchrun_ends_the_run_with_a_checkpoint(start, simulated, tmp_path):
    """What a scheduler does. torchrun passes it on; that its own exit is not 0 is right."""
    words = ("--data", simulated, "--size", "tiny", "--chunk-len", "400", "--batch-size", "8", "--device", "cpu")
    process = start(*TORCHRUN, ROOT / "moco.py", *words, "--run-dir", "run", cwd=tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    process.terminate()
    out, error = process.communicate()
    stopped = re.search(r"stopped after step (\d+); go on with --resume run", error)
    assert process.returncode != 0 and stopped, error[-3000:]
    step = int(stopped[1])
    out, _ = finished(start(*TORCHRUN, ROOT / "moco.py", "--resume", "run", "--max-steps", step + 2, cwd=tmp_path))
    assert out.count(f"going on after step {step}\n") == 1
    assert read_metrics(tmp_path / "run")[-1]["step"] == step + 2


@pytest.mark.parametrize(
    "words, message",
    [
        (("simclr.py", "--data", "none.pod5"), "simclr.py: none.pod5: no such file or folder"),
        (("simclr.py", "--batch-size", "9"), "simclr.py: --batch-size 9: cannot be split equally among 2 processes"),
        (
            ("prepare_data.py", "reads", "-o", "store"),
            "prepare_data.py: works as one process; start it without torchrun",
        ),
    ],
)
def test_bad_input_is_said_once(start, simulated, tmp_path, words, message):
    script, *rest = words
    data = ["--data", simulated, "--chunk-len", "400"] if "--batch-size" in rest else []
    process = start(*TORCHRUN, ROOT / script, *rest, *data, cwd=tmp_path)
    _, error = process.communicate()
    assert process.returncode == 1 and error.count(message) == 1 and not (tmp_path / "runs").exists()
    assert error.index(message) < error.index("Traceback")  # torchrun's own
