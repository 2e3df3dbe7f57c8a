"""The run folder and what surrounds it: resume, whole files, seeds, devices."""

import json
import os
import signal
import sys
from functools import partial

import pytest
import torch

import barlow
import common.run
from common import InputError
from common.args import parse_args
from common.device import pick_device, seed_step
from common.pore_model import PoreModel, load_tensors
from common.run import Run, save_whole


def test_all_arguments_have_defaults(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["barlow.py"])
    assert parse_args(barlow.Args) == barlow.Args()


def test_resume_takes_the_arguments_of_the_run_unless_given_anew(tmp_path, monkeypatch):
    saved = {"data": ["a.pod5"], "lr": 0.5, "drop_chance": [0.1, 0.2], "max_steps": 7, "size": "tiny"}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["barlow.py", "--resume", str(tmp_path), "--max-steps", "9"])
    args = parse_args(barlow.Args)
    assert (args.lr, args.drop_chance, args.size, args.max_steps) == (0.5, (0.1, 0.2), "tiny", 9)
    assert [str(path) for path in args.data] == ["a.pod5"] and args.resume == tmp_path
    monkeypatch.setattr(sys, "argv", ["barlow.py", f"--resume={tmp_path}", "--size", "small"])
    with pytest.raises(InputError, match="--size"):
        parse_args(barlow.Args)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    save_whole({"x": torch.ones(3)}, path)

    def full_disk(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_whole({"x": torch.zeros(3)}, path)
    assert torch.equal(load_tensors(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"]


def test_a_step_draws_the_same_numbers_whatever_came_before():
    seed_step(3, 7)
    first = torch.randn(5)
    seed_step(3, 8)
    other = torch.randn(5)
    seed_step(3, 7)
    assert torch.equal(first, torch.randn(5)) and not torch.equal(first, other)


def test_each_process_draws_numbers_of_its_own(monkeypatch):
    draws = []
    for rank in range(3):
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))
        for step in (7, 8):
            seed_step(3, step)
            draws.append(float(torch.rand(())))
    assert len(set(draws)) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(InputError, match="--device cuda"):
        pick_device("cuda")


def said_of(pore_model, capsys, **changes):
    optimizer = torch.optim.Adam(pore_model.parameters())
    args = barlow.Args(batch_size=4, **changes)
    common.run.say_cost(pore_model, pore_model, optimizer, range(10), args, samples=400, trained=2)
    return capsys.readouterr().out


def test_full_size_without_a_gpu_is_announced_and_leaves_the_model_as_it_was(capsys):
    pore_model = PoreModel.of_size("small")
    before = {key: value.clone() for key, value in pore_model.state_dict().items()}
    said = said_of(pore_model, capsys)
    assert "hours an epoch" in said and "--size tiny" in said and "10 chunks" in said and "0.1 GB of memory\n" in said
    assert all(torch.equal(before[key], value) for key, value in pore_model.state_dict().items())
    assert said_of(PoreModel.of_size("tiny"), capsys) == ""


def test_where_memory_is_short_the_line_says_what_takes_less(capsys, monkeypatch):
    tiny = PoreModel.of_size("tiny")
    for gigabytes in ("step_memory", "whole_memory"):
        monkeypatch.setattr(common.run, gigabytes, lambda *given: 9e9 if given[-1:] == (True,) else 20.8e9)
    said = said_of(tiny, capsys)
    assert said == (
        "a step will take about 20.8 GB of memory, of 20.8 GB here: give a smaller --batch-size, or "
        "--activation-checkpointing, which takes about 9.0 GB\n"
    )
    assert said_of(tiny, capsys, activation_checkpointing=True) == ""  # fits
    monkeypatch.setattr(common.run, "whole_memory", lambda _: 8e9)
    said = said_of(tiny, capsys, activation_checkpointing=True)
    assert said == "a step will take about 9.0 GB of memory, of 8.0 GB here: give a smaller --batch-size\n"


def resume_in(folder):
    Run(barlow.Args(resume=folder), "barlow.py")


def test_a_run_that_goes_on_elsewhere_is_not_resumed(child, tmp_path):
    run = Run(barlow.Args(run_dir=tmp_path / "run"), "barlow.py")
    message = f"--resume {tmp_path}/run: this run is going on in another process"
    with pytest.raises(InputError, match="exists"):
        Run(barlow.Args(run_dir=tmp_path / "run"), "barlow.py")
    code, lines = child(partial(resume_in, tmp_path / "run"))
    assert code == 1 and lines[-1] == f"common.InputError: {message}"
    run.lock.release(force=True)  # as the system does for a process that ends
    assert child(partial(resume_in, tmp_path / "run")) == (0, [])


def test_checkpoints_come_by_the_clock(tmp_path, monkeypatch):
    clock, written = [0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    run = Run(barlow.Args(run_dir=tmp_path / "run", checkpoint_minutes=10), "barlow.py")
    for step in run.steps(0, 9):
        clock[0] += 4 * 60
        if run.checkpoint_due:
            run.checkpoint(step, {})
            written.append(step)
    assert written == [3, 6, 9]


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def run(tmp_path):
    return Run(barlow.Args(run_dir=tmp_path / "run"), "barlow.py")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_the_loop_with_its_code(run, capsys, sent):
    before, steps = signal.getsignal(sent), []
    for step in run.steps(3, 9):
        if step == 5:
            os.kill(os.getpid(), sent)
        steps.append(step)
        assert run.stop == (128 + sent if step == 5 else 0)
        if run.stop:
            run.checkpoint(step, {})
            break
    assert steps == [4, 5] and run.stop == 128 + sent and signal.getsignal(sent) is before
    assert capsys.readouterr().err.endswith(f"stopped after step 5; go on with --resume {run.folder}\n")


def test_a_second_signal_ends_the_step(run):
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps(0, 9):
            os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError(step)


def test_a_loop_that_asks_before_the_signal_came_ends_in_the_next_step(run):
    """The lines after `run.stop`, of which the checkpoint is one, are not cut short."""
    for step in run.steps(0, 9):
        if run.stop:
            break
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    assert step == 3
