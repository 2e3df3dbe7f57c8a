"""docs/lesson.md: its commands are commands, its changes fit the scripts, run, and change what comes out."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import tyro

from benchmark.plot_runs import read_metrics
from common.pore_model import PoreModel
from common.reads import simulate

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "lesson.md").read_text()
PREPARATION, *EXERCISES = re.split(r"^(?=## \d\. )", PAGE, flags=re.M)
PARTS = ["Question", "Change", "Look at", "What comes out", "Why", "Further"]
SMALL = {"chunk_len": 400, "batch_size": 8, "max_steps": 2, "device": "cpu"}


def blocks(language, text):
    return [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if kind == language]


def commands(text):
    """(Module, words after it) of each line that starts python."""
    lines = "".join(blocks("", text)).replace("\\\n", " ").splitlines()
    found = re.findall(r"^python (?:-m (\S+)|(\w+)\.py) (.*)", "\n".join(lines), re.M)
    return [(module or script, shlex.split(words)) for module, script, words in found]


def copied(exercise):
    """The module that an exercise copies, and that which it makes."""
    ((original, copy),) = re.findall(r"`cp (\S+)\.py (\w+)\.py`", exercise)
    return original.replace("/", "."), copy


def changed(exercise):
    """The source of the exercise's copy: each hunk's old lines, found by what they say, replaced by its new ones."""
    name = f"{copied(exercise)[0].replace('.', '/')}.py"
    (diff,), source = blocks("diff", exercise), "\n" + (ROOT / name).read_text()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old, new = ("".join(f"\n{line[1:]}" for line in lines if line[0] in kept) + "\n" for kept in (" -", " +"))
        times = source.count(old)
        assert times == 1, f"lesson.md no longer fits {name}, which has these lines {times} times: {old}"
        source = source.replace(old, new)
    return source[1:]


@pytest.fixture(params=EXERCISES, ids=[exercise.splitlines()[0][3:] for exercise in EXERCISES])
def exercise(request):
    return request.param


@pytest.fixture
def both(exercise, tmp_path, monkeypatch):
    """The script as it is and the exercise's copy, each with the arguments of its command."""
    original, copy = copied(exercise)
    (tmp_path / f"{copy}.py").write_text(changed(exercise))
    spec = importlib.util.spec_from_file_location(copy, tmp_path / f"{copy}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, copy, module)
    spec.loader.exec_module(module)
    found = []
    for name, script in ((original, importlib.import_module(original)), (copy, module)):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *dict(commands(exercise))[name]])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which parse_args changes
        try:
            found.append((script, script.parse_args(script.Args)))
        except SystemExit:
            pytest.fail(f"not a command: {' '.join(sys.argv)}")
    return found


def test_six_exercises_have_the_same_parts_and_change_few_lines():
    assert len(EXERCISES) == 6
    for exercise in EXERCISES:
        assert re.findall(r"^\*\*([^*]+)\.\*\*", exercise, re.M) == PARTS
        (diff,) = blocks("diff", exercise)
        assert 1 <= max(len(re.findall(rf"^\{sign}", diff, re.M)) for sign in "+-") <= 6


def test_what_is_said_before_the_class_works():
    assert re.search(r"^make (\S+)$", PREPARATION, re.M)[1] + ":" in (ROOT / "Makefile").read_text()
    (name, words), *_ = commands(PREPARATION)
    assert name == simulate.__name__ and tyro.cli(simulate.Args, args=words).out == Path("lesson.hdf5")


def test_a_run_is_looked_at_after_it_is_made_and_made_once():
    made = []
    for name, words in commands(PAGE[len(PREPARATION) :]):
        runs = {re.match(r"runs/\w+", word)[0] for word in words if word.startswith("runs/")}
        if "--run-dir" in words:
            assert runs == {f"runs/{name}"} and not runs & {*made}
            made += runs
        else:
            assert runs <= {*made}, f"python -m {name}: {runs - {*made}}"
    assert len(made) == 10


def test_the_copy_is_run_with_the_options_of_the_script(exercise):
    original, copy = copied(exercise)
    words = dict(commands(exercise))
    assert [word.replace(f"runs/{copy}", f"runs/{original}") for word in words[copy]] == words[original] or (
        words[copy] == words[original]
    )


@pytest.mark.parametrize("exercise", EXERCISES[:5], indirect=True)
def test_a_change_runs_and_changes_what_is_logged(exercise, both, few, tmp_path, monkeypatch):
    logs = []
    for script, args in both:
        vars(args).update(SMALL, data=(few,), run_dir=tmp_path / script.__name__)
        monkeypatch.setattr(script, "LOG_EVERY", 1)
        assert not script.main(args)
        logs.append([{**line, "chunks_per_second": 0} for line in read_metrics(args.run_dir)])
    assert len(logs[0]) == len(logs[1]) == 3 and logs[0][2] != logs[1][2]
    looked_at = re.search(r"^\*\*Look at\.\*\*.*?\n\n", exercise, re.M | re.S)[0]
    assert {*re.findall(r"`(\S+?)`", looked_at)} <= logs[1][1].keys() | logs[1][2].keys()


@pytest.mark.parametrize("exercise", EXERCISES[5:], indirect=True)
def test_the_changed_probe_runs_and_changes_the_table(both, few, tmp_path, capsys):
    weights, tables = tmp_path / "pore_model.pt", []
    torch.save(PoreModel.of_size("tiny").state_dict(), weights)
    for script, args in both:
        vars(args).update(weights=(weights,), data=(few,), few=4, many=8, chunk_len=400)
        assert not script.main(args)
        tables.append(re.findall(r"^\| .*", capsys.readouterr().out, re.M))
    assert len(tables[0]) == len(tables[1]) == 4 and tables[0][3] != tables[1][3]
