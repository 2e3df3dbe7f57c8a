"""What somebody who copies a script runs into: each trap is sprung on a copy of barlow.py, and works or is said."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark.plot_runs import read_metrics
from common import InputError
from common.args import parse_args

BARLOW = (Path(__file__).parents[1] / "barlow.py").read_text()
SMALL = ["--size", "tiny", "--device", "cpu", "--chunk-len", "200", "--batch-size", "8", "--embedding-dim", "16"]
SMALL += ["--checkpoint-minutes", "0"]


@pytest.fixture
def run(tmp_path, simulated, monkeypatch, capsys):
    """Runs a changed barlow.py as its own script, in this process; its exit code, and what it said on both streams."""

    def run(source, *words, name="mine", before=None):
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        given = [] if "--resume" in words else ["--data", simulated, *SMALL]
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, [*given, *words])])
        spec.loader.exec_module(module)
        if before:
            before(module)
        capsys.readouterr()
        code = module.main(parse_args(module.Args))
        return code, "".join(capsys.readouterr())

    return run


def with_argument(line):
    """barlow.py with one more argument, which it prints."""
    source = BARLOW.replace(
        "    # Arguments of the method\n", f'    # Arguments of the method\n    {line}\n    """mine"""\n'
    )
    name = line.partition(":")[0]
    return source.replace("def main(args):\n", f"def main(args):\n    print(repr(args.{name}))\n")


@pytest.mark.parametrize(
    "line, words, shown",
    [
        ("margin: int = 0", [], "0"),
        ("margin: int = 5", ["--margin", "0"], "0"),
        ("bias: float = -1.5", [], "-1.5"),
        ("bias: float = 1.0", ["--bias", "-2.5"], "-2.5"),
        ("own_lr: float = -0.5", [], "-0.5"),  # no rule hangs on the end of a name
    ],
)
def test_an_argument_of_ones_own_may_have_any_value_of_its_type(run, tmp_path, line, words, shown):
    code, said = run(with_argument(line), *words, "--max-steps", 1, "--run-dir", tmp_path / "run")
    assert code is None and f"{shown}\n" in said
    code, said = run(with_argument(line), "--resume", tmp_path / "run", "--max-steps", 2)
    assert code is None and f"{shown}\n" in said


def test_a_list_of_paths_comes_back_on_resume(run, tmp_path):
    source = with_argument("more: tuple[Path, ...] = ()").replace(
        "print(repr(args.more))", "print([path.name for path in args.more])"
    )
    run(source, "--more", "a/b.pod5", "c", "--max-steps", 1, "--run-dir", tmp_path / "run")
    code, said = run(source, "--resume", tmp_path / "run", "--max-steps", 2)
    assert code is None and "['b.pod5', 'c']" in said


def test_a_constraint_beside_the_field_is_kept(run, tmp_path):
    with pytest.raises(InputError, match=r"^--margin -1: should be greater than or equal to 0$"):
        run(with_argument("margin: NonNegativeInt = 0"), "--margin", "-1", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_chunk_longer_than_the_projector_was_made_for_is_refused(run, tmp_path):
    """It was cut in silence."""
    source = BARLOW.replace("args.chunk_len, args.embedding_dim)", "args.chunk_len // 2, args.embedding_dim)")
    assert source != BARLOW
    with pytest.raises(InputError, match=r"^a chunk of \d+ samples, but the projector was made for 104; make it for"):
        run(source, "--max-steps", 1, "--run-dir", tmp_path / "run")
    shorter = BARLOW.replace("args.chunk_len, args.embedding_dim)", "2 * args.chunk_len, args.embedding_dim)")
    assert run(shorter, "--max-steps", 1, "--run-dir", tmp_path / "other")[0] is None


def loop_statements():
    """The statements of barlow.py's training loop, by their first line; what deleting each has to lead to is below."""
    (main,) = (node for node in ast.parse(BARLOW).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    (loop,) = (node for node in main.body if isinstance(node, ast.For))
    lines = BARLOW.splitlines(keepends=True)
    found = {}
    for node in loop.body:
        kept = lines[: node.lineno - 1] + lines[node.end_lineno :]
        found[lines[node.lineno - 1].split("#")[0].strip()] = "".join(kept)
    return found


WITHOUT = loop_statements()
# without these the script fails, with the error named
FAILS = {
    "batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)": NameError,
    "loss, terms, embeddings = forward(models, batch, args)": NameError,
}
# without these a run goes on without what the line says: its log, or its weights, show it
DOES_WITHOUT = {
    "seed_step(args.seed, step)",
    "stop_if_not_finite(step, loss, terms, batch)",
    "for group in optimizer.param_groups:",
    "optimizer.zero_grad()",
    "loss.backward()",
    "average_gradients(optimizer)",  # with many processes: below
    "optimizer.step()",
    "if step % LOG_EVERY == 0:",
    "if step % steps_per_epoch == 0 and len(validation):",
}
SAID = {"if run.stop or run.checkpoint_due or step == last:", "if run.stop:"}


def test_each_statement_of_the_loop_is_accounted_for():
    assert set(WITHOUT) == {*FAILS, *DOES_WITHOUT, *SAID}


@pytest.mark.parametrize("line", FAILS)
def test_without_it_the_script_fails(run, tmp_path, line):
    with pytest.raises(FAILS[line]):
        run(WITHOUT[line], "--max-steps", 1, "--run-dir", tmp_path / "run")


def terminated_at(step):
    """A change of the script, by which a SIGTERM comes in the midst of a step."""

    def before(module):
        forward, calls = module.forward, []

        def terminated(*inputs):
            calls.append(inputs)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return forward(*inputs)

        module.forward = terminated

    return before


def test_whole_it_stops_with_a_checkpoint(run, tmp_path):
    words = ("--max-steps", 9, "--run-dir", tmp_path / "run")
    code, said = run(BARLOW, *words, before=terminated_at(3))
    assert code == 128 + signal.SIGTERM
    assert said.endswith(f"stopped after step 3; go on with --resume {tmp_path / 'run'}\n")
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_without_the_line_that_stops_it_a_signal_ends_the_run_and_says_what_is_missing(run, tmp_path):
    with pytest.raises(InputError, match=r"step 3: stopped; this loop lacks `if run.stop: return run.stop`"):
        run(WITHOUT["if run.stop:"], "--run-dir", tmp_path / "run", before=terminated_at(3))
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_without_either_line_a_signal_ends_the_run(run, tmp_path):
    tree = WITHOUT["if run.stop:"].replace("if run.stop or run.", "if run.")
    with pytest.raises(InputError, match=r"step 3: stopped; this loop lacks"):
        run(tree, "--run-dir", tmp_path / "run", before=terminated_at(3))


def test_without_a_checkpoint_it_is_said(run, tmp_path):
    source = WITHOUT["if run.stop or run.checkpoint_due or step == last:"]
    code, said = run(source, "--max-steps", 2, "--run-dir", tmp_path / "run")
    assert code is None and "no checkpoint of step 2 was written" in said
    code, said = run(source, "--run-dir", tmp_path / "again", before=terminated_at(3))
    assert code == 128 + signal.SIGTERM and "stopped after step 3, but its last checkpoint is of step 0" in said


def test_without_logs_there_are_none(run, tmp_path):
    """One example of those that do without: nothing else changes."""
    words = ("--max-steps", 10)
    run(BARLOW, *words, "--run-dir", tmp_path / "whole")
    run(WITHOUT["if step % LOG_EVERY == 0:"], *words, "--run-dir", tmp_path / "run")
    assert [line for line in read_metrics(tmp_path / "whole") if "loss" in line]
    assert not [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    torch.testing.assert_close(
        *(torch.load(tmp_path / name / "pore_model.pt") for name in ("whole", "run")), rtol=0, atol=0
    )


def test_without_the_mean_of_the_gradients_two_processes_are_stopped(tmp_path, simulated):
    """Their weights drift apart, which the next checkpoint sees."""
    (tmp_path / "mine.py").write_text(WITHOUT["average_gradients(optimizer)"])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "mine.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words += ["--data", str(simulated), *SMALL, "--max-steps", "4"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "step 1: processes have other weights; does the loop call average_gradients()?" in done.stderr
