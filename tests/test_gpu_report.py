"""benchmark/gpu.py: its commands are ones that the scripts take; a part that fails is said and the others go on."""

import importlib
import shlex
from pathlib import Path

import pytest
import tyro

from benchmark import gpu, speed, unseen
from common import InputError
from common.reads.simulate import write_simulated

ROW = '{"batch_size": 32, "chunks_per_second": 50.0, "step": 0.64, "bound_ratio": 1.1, "utilisation": 0.5, '
ROW += '"peak_memory": 1234.0, "matmul": 1e11, "precision": "float32"}'


@pytest.fixture
def args(simulated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_simulated(tmp_path / "other.hdf5", reads=8, mean_bases=1000, seed=2)
    return gpu.Args((simulated,), (simulated,), (tmp_path / "other.hdf5",), size="tiny", epochs=1, steps=10)


def report_of(folder):
    (path,) = folder.glob("runs/gpu__*/report/report.md")
    return path.parent, path.read_text()


def test_a_small_run_writes_the_tables_and_pictures(args, tmp_path, monkeypatch):
    """As anyone would run it, but with one method, all labels, and shorter batches of the speed table."""
    run, shorter = gpu.run, ["--batch-sizes", "2", "--chunk-len", "400", "--steps", "1"]
    monkeypatch.setattr(gpu, "run", lambda words, log: run(words + shorter * (log.stem == "speed"), log))
    monkeypatch.setattr(gpu, "PASSES", ("masked",))
    monkeypatch.setattr(gpu, "FRACTIONS", (1.0,))
    monkeypatch.setattr(gpu, "METHODS", {"masked events": "masked.py --chunk-len 400 --batch-size 8"})
    assert gpu.main(args) == 0
    report, text = report_of(tmp_path)
    for start in ("| card | ", "| masked | no | 2 | ", "| reads, 100 %, 10 steps | from scratch | 1 | "):
        assert f"\n{start}" in text
    assert "\n| | masked events | 1 | " in text
    pictures = {path.name: path.read_bytes()[:4] for path in report.glob("*.png")}
    assert pictures == dict.fromkeys(("events.png", "gains.png", "runs.png"), b"\x89PNG")
    assert {path.name for path in report.iterdir()} >= {"tests.txt", "speed.txt", "learning.txt", "identities.csv"}
    assert not any(path.suffix == ".pt" for path in report.iterdir())  # too large to attach


def test_the_scripts_take_its_commands(args, monkeypatch, tmp_path):
    asked = []

    def run(words, log):
        asked.append(words)
        return 0, [ROW]

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda args: "a card")
    gpu.main(args)
    timed = [tyro.cli(speed.Args, args=words[2:]) for words in asked if "benchmark.speed" in words]
    assert [(row.methods, row.compile) for row in timed] == [
        ((method,), (compiled,)) for compiled in (False, True) for method in speed.PASSES
    ]
    assert "| barlow | yes | 32 | 50 | 640 | 1.10 | 50 % | 1.23 |" in report_of(tmp_path)[1]
    arms = [tyro.cli(unseen.Args, args=words[2:]) for words in asked if "benchmark.unseen" in words]
    assert len(arms) == 9 and {Path(arm.name).parent for arm in arms} == {report_of(tmp_path)[0]}
    tuned = []
    for arm in arms:
        scripts = [shlex.split(command) for command in arm.commands]
        given = [tyro.cli(importlib.import_module(name[:-3]).Args, args=words) for name, *words in scripts]
        assert {(words.seed, words.size) for words in given} == {(0, "tiny")}
        tuned.append((scripts[0][0], given[-1].weights, given[-1].label_fraction))
    pretrained = Path("pore_model.pt")
    assert tuned == [
        (script, weights, fraction)
        for fraction in (0.01, 0.1, 1.0)
        for script, weights in (
            ("finetune_basecaller.py", None),
            ("barlow.py", pretrained),
            ("masked.py", pretrained),
        )
    ]


def test_a_part_that_fails_is_said_and_the_others_go_on(args, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "run", lambda words, log: (1, ["it broke"]))
    monkeypatch.setitem(gpu.PARTS, "Speed", lambda args, report: 1 / 0)
    assert gpu.main(args) == 1
    text = report_of(tmp_path)[1]
    assert "tests.txt says how" in text and "it broke" in text
    assert "**Failed**: ZeroDivisionError: division by zero" in text
    assert "**Failed**: masked events, 10 % of the labels. learning.txt says how." in text


def test_what_a_command_prints_is_kept_and_its_exit_code_known(tmp_path, capfd):
    (tmp_path / "report").mkdir()
    log = tmp_path / "report/some.txt"
    code, lines = gpu.run(["-c", "import sys; print('said'); sys.exit('why')"], log)
    assert code == 1 and sorted(lines) == ["said", "why"]
    assert "$ python -c" in log.read_text() and "\nwhy\n" in log.read_text()


def test_a_file_that_is_not_there_is_said_before_anything_runs(args, tmp_path):
    args.tests = (Path("none.hdf5"),)
    with pytest.raises(InputError, match=r"none\.hdf5"):
        gpu.main(args)
    assert not (tmp_path / "runs").exists()
