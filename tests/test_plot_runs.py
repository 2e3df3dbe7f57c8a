"""The picture and the tables of runs, from what they logged."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from benchmark import plot_runs
from benchmark.plot_runs import plot, table

PROJECT = Path(__file__).parents[1]


def write_run(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def finetuning(folder):
    lines = [{"step": 10, "loss": 2.0}]
    for step, loss, identity in ((20, 1.5, 60.0), (40, 1.1, 71.25), (60, 1.2, 70.0)):
        line = {"step": step, "validation/loss": loss, "validation/identity_mean": identity}
        lines.append(line | {"validation/identity_median": identity + 1})
    return write_run(folder, lines)


def pretraining(folder, unit=1.0, **more):
    lines = [{"step": 20, "validation/loss": 4.5 * unit}]
    for step, loss, speed in ((10, 9.0, 7.0), (20, 5.0, 8.0), (30, 3.25, 30.0)):
        spread = {"feature_spread": 1 - step / 100, "effective_rank": step / 4}
        lines.append({"step": step, "loss": loss * unit, "chunks_per_second": speed} | spread | more)
    return write_run(folder, lines)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws runs and gives {(x label, y label): axes}, and the figure."""
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(runs):
        plot(runs, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        figure = plt.gcf()
        return {(axis.get_xlabel(), axis.get_ylabel()): axis for axis in figure.axes}, figure

    yield draw
    monkeypatch.undo()
    plt.close("all")


def values(axis, line=-1):
    return list(axis.lines[line].get_ydata())


def test_table_takes_the_best_validation(tmp_path):
    rows = table({"scratch": finetuning(tmp_path / "run")}).splitlines()
    assert rows[0] == "| run | best at step | validation loss | mean identity | median identity |"
    assert rows[2:] == ["| scratch | 40 | 1.100 | 71.2 % | 72.2 % |"]


def test_table_of_pretraining_has_the_first_and_the_last_step(tmp_path):
    rows = table({"barlow": pretraining(tmp_path / "run")}).splitlines()
    assert rows[0] == "| run | steps | loss | validation loss | feature spread | effective rank | chunks / s |"
    assert rows[2:] == ["| barlow | 10 → 30 | 9 → 3.25 | 4.5 | 0.90 → 0.70 | 2.5 → 7.5 | 8 |"]


def test_runs_that_have_not_validated_yet_have_rows(tmp_path):
    step = {"step": 10, "loss": 2.0, "chunks_per_second": 1.0}
    pre = write_run(tmp_path / "pre", [step | {"feature_spread": 1, "effective_rank": 2}])
    tuned = write_run(tmp_path / "tuned", [step])
    assert "| pre | 10 → 10 | 2 → 2 |  | 1.00 → 1.00 | 2.0 → 2.0 | 1 |" in table({"pre": pre})
    assert "| tuned | | | | |" in table({"tuned": tuned})


def test_fine_tuning_has_three_panels(tmp_path, drawn):
    axes, figure = drawn({"scratch": finetuning(tmp_path / "run")})
    assert {x for x, _ in axes} == {"fine-tuning step"}
    training, loss, accuracy = axes.values()
    assert values(training) == [2.0] and values(loss) == [1.5, 1.1, 1.2] and values(accuracy) == [60.0, 71.25, 70.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["scratch"]


def test_both_kinds_together_keep_one_colour_a_run(tmp_path, drawn):
    runs = {
        "a": pretraining(tmp_path / "a"),
        "b": finetuning(tmp_path / "b"),
        "c": pretraining(tmp_path / "c", top1=0.5),
    }
    axes, figure = drawn(runs)
    colours = dict(zip("abc", plot_runs.COLOURS, strict=False))
    assert [line.get_color() for line in figure.legends[0].get_lines()] == list(colours.values())
    for (kind, _), axis in axes.items():
        seen = {line.get_color() for line in axis.lines if line.get_linewidth()}
        members = {"b"} if kind == "fine-tuning step" else {"c"} if "top1" in axis.get_ylabel() else {"a", "c"}
        assert seen == {colours[label] for label in members}
    assert len(axes) == 3 + 5
    (top1,) = (axis for (_, name), axis in axes.items() if "top1" in name)
    assert values(top1, 1) == [50.0] * 3 and top1.get_ylim()[0] == 0


def test_the_floor_is_beside_the_bits_gained(tmp_path, drawn):
    axes, _ = drawn({"masked": pretraining(tmp_path / "run", gained=0.5, floor=0.25)})
    (gained,) = (axis for (_, name), axis in axes.items() if "gained" in name)
    floor = next(line for line in gained.lines if line.get_linestyle() == "--")
    assert len(axes) == 5 and list(floor.get_ydata()) == [0.25] * 3 and list(gained.lines[-1].get_ydata()) == [0.5] * 3


@pytest.mark.parametrize(("unit", "first"), [(2, [18.0, 10.0, 6.5]), (1000, [1.0, 5 / 9, 3.25 / 9])])
def test_losses_in_other_units_are_drawn_as_shares(tmp_path, drawn, unit, first):
    axes, _ = drawn({"a": pretraining(tmp_path / "a"), "b": pretraining(tmp_path / "b", unit)})
    losses = {name: axis for (_, name), axis in axes.items() if "loss" in name}
    assert all(("share of the first training loss" in name) == (unit == 1000) for name in losses)
    training, validation = losses.values()
    assert values(training) == pytest.approx(first)
    assert values(validation) == pytest.approx([0.5 if unit == 1000 else 9.0])


def test_smoothed_keeps_short_runs_and_means_long_ones():
    assert plot_runs.smoothed([1, 5, 3]) == [1, 5, 3]
    assert plot_runs.smoothed([0, 3, 0] * 20)[1:-1] == pytest.approx([1] * 58)


def call(*words):
    command = [sys.executable, "-m", "benchmark.plot_runs", *map(str, words)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def test_a_folder_without_a_label_goes_by_its_name(tmp_path):
    done = call(
        tmp_path / "p.png", f"{finetuning(tmp_path / 'scratch')}/", f"CPC, lr=1e-3={pretraining(tmp_path / 'c')}"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.png").exists() and "| scratch | 40 |" in done.stdout and "| CPC, lr=1e-3 | 10" in done.stdout


@pytest.mark.parametrize("case", ["missing", "empty", "broken", "twice", "no picture", "no folder for it"])
def test_errors_are_one_line(tmp_path, case):
    run, picture = finetuning(tmp_path / "run"), tmp_path / "p.png"
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "broken", [])
    (tmp_path / "broken/metrics.jsonl").write_text('{"step": 1, "lo')
    words, message = {
        "missing": ([picture, tmp_path / "missing"], "missing: no metrics.jsonl"),
        "empty": ([picture, f"a={tmp_path}/empty"], "empty: no metrics.jsonl"),
        "broken": ([picture, tmp_path / "broken"], "broken/metrics.jsonl: cannot be read"),
        "twice": ([picture, run, run], "another run goes by 'run'"),
        "no picture": ([run, run], "the picture comes first"),
        "no folder for it": ([tmp_path / "none/p.png", run], "p.png: cannot be written"),
    }[case]
    done = call(*words)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not picture.exists()
