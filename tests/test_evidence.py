"""The grid of evidence.py: jobs done once, broken off and gone on with; its learning rates, table and picture."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from benchmark import evidence, plot_evidence
from benchmark.evidence import COLUMNS, Args, as_many_steps, complete, key, main, plan, read_rows
from benchmark.plot_evidence import interval, read_identities, table
from common import InputError

BATCHES = {(fraction, seed): 32 for fraction in (0.1, 1.0) for seed in (0, 1)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty folders for runs and results."""
    monkeypatch.setattr(evidence, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence.time, "sleep", lambda seconds: pytest.fail("waits for nobody"))
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The scripts called, which write what they should without training; those in `failing` end with an error."""

    class Calls(list):
        failing = ()

        def __call__(self, words):
            script, folder = Path(words[1]).stem, Path(words[words.index("--run-dir") + 1])
            self.append((script, words[2:]))
            if script in self.failing:
                return 1
            folder.mkdir(parents=True)
            features = {"feature_spread": 0.5, "effective_rank": 7.0} if script != "finetune_basecaller" else {}
            lines = [{"step": 2, "loss": 1.0} | features]
            for step, percent in ((2, 99.0), (3, 50.0)):
                of = {"loss": 1.0, "identity_mean": percent, "identity_median": percent}
                lines.append({"step": step} | {f"validation/{name}": value for name, value in of.items()})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            for name in ("checkpoint", "basecaller_last" if script == "finetune_basecaller" else "pore_model"):
                (folder / f"{name}.pt").touch()
            return 0

    found = Calls()
    monkeypatch.setattr(evidence, "call", found)
    return found


@pytest.fixture
def args(simulated):
    """Of a function, since main() changes a name."""
    settings = {"name": "small", "pretraining_data": (simulated,), "labelled_data": (simulated,)}
    settings |= {"pretraining_epochs": 1, "finetuning_steps": 2, "fractions": (1.0,), "seeds": (0,)}
    return lambda **changes: Args(**settings | {"methods": ("scratch", "barlow")} | changes)


def test_the_real_scripts_make_a_row_once(place, args):
    assert main(args(methods=("cpc",))) == 0
    (row,) = read_rows("small")
    assert row["arm"] == "cpc" and row["split"] == "validation" and row["validation_reads"] == "2"
    assert float(row["loss"]) > 0 and float(row["seconds"]) > 0 and float(row["pretraining_seconds"]) > 0
    assert row["commit"] and row["hardware"] and (row["lr"], row["finetuning_steps"]) == ("0.002", "2")
    (run,) = (place / "runs" / "small").glob("cpc-1.0-0-????????")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and str(last["validation/loss"]) == row["loss"]
    assert "pore_model.pt" in json.loads((run / "args.json").read_text())["weights"]
    assert main(args(methods=("cpc",))) == 0 and len(read_rows("small")) == 1


def test_each_pretraining_is_done_once_and_a_deleted_row_alone_again(place, args, calls):
    grid = args(fractions=(0.5, 1.0), seeds=(0, 1))
    assert main(grid) == 0
    tune = "finetune_basecaller"
    assert [script for script, _ in calls] == [tune, tune, "barlow", tune, tune] * 2
    rows = read_rows("small")
    assert [(row["seed"], row["arm"], row["fraction"]) for row in rows] == [
        (seed, arm, fraction) for seed in "01" for arm in ("scratch", "barlow") for fraction in ("0.5", "1.0")
    ]
    assert {row["identity_mean"] for row in rows} == {"50.0"}  # the last, not the best
    assert {(row["arm"], row["feature_spread"], row["effective_rank"]) for row in rows} == {
        ("scratch", "", ""),
        ("barlow", "0.5", "7.0"),
    }
    del calls[:]
    assert main(grid) == 0 and not calls
    (path,) = evidence.RESULTS.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    path.with_name("small-other.csv").write_text("".join([lines[0], *lines[4:]]))  # of another machine
    assert main(grid) == 0
    ((script, words),) = calls
    assert script == tune and words[words.index("--label-fraction") + 1] == "0.5" and "--weights" in words


def test_a_stopped_pretraining_is_resumed_and_one_without_checkpoint_begins_anew(tmp_path, simulated):
    words = ["cpc.py", "--data", simulated, "--size", "tiny", "--chunk-len", 400, "--batch-size", 4]
    run, command = tmp_path / "run", " ".join(map(str, [*words, "--max-steps", 2, "--checkpoint-every", 1]))
    run.mkdir()
    (run / "args.json").touch()
    complete(run, command, "pore_model.pt")
    (run / "pore_model.pt").unlink()
    log = (run / "args.json").stat().st_mtime_ns
    attempts = run / "attempts.jsonl"
    attempts.write_text(json.dumps({"commit": "before", "seconds": 1000.0}) + "\n")
    commits, seconds = complete(run, command, "pore_model.pt")
    assert commits == f"before, {evidence.current_commit()}" and seconds > 1000
    assert (run / "pore_model.pt").exists() and (run / "args.json").stat().st_mtime_ns == log  # not made again
    assert len(attempts.read_text().splitlines()) == 2


def test_a_failed_job_is_named_and_the_others_are_done(place, args, calls, capsys):
    calls.failing = ("barlow",)
    assert main(args(methods=("barlow", "scratch"))) == 1
    assert [row["arm"] for row in read_rows("small")] == ["scratch"]
    assert capsys.readouterr().err.splitlines()[-1] == "failed: barlow, 1 of the labels, lr 0.002, seed 0"


def test_a_job_of_another_process_is_left_to_it(place, args, calls, monkeypatch):
    (row,) = plan(args(methods=("barlow",)), 2, BATCHES)  # an epoch has one step
    pretrained = evidence.run_folder(row, "pretrain_command")
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    lock = pretrained.with_name(pretrained.name + ".lock")
    lock.parent.mkdir(parents=True)
    words = [sys.executable, "-c", holder, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert evidence.do(dict(row)) is False and not calls
        monkeypatch.setattr(evidence.time, "sleep", lambda seconds: other.communicate(b"\n"))
        assert main(args(methods=("barlow", "scratch"))) == 0
    assert [row["arm"] for row in read_rows("small")] == ["scratch", "barlow"]  # others first, then it


def test_a_script_that_outlives_a_killed_process_keeps_the_lock(tmp_path):
    lock = tmp_path / "lock"
    parent = f"""if True:
        import pathlib, sys
        from benchmark import evidence
        with evidence.locked(pathlib.Path({str(lock)!r})) as mine:
            print(mine, flush=True)
            evidence.subprocess.DEVNULL = None  # so that the end of the script can be waited for
            evidence.call([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"])
    """
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        with evidence.locked(lock) as mine:
            assert not mine
        os.kill(child, signal.SIGKILL)
        assert not process.stdout.read()  # both have ended
    with evidence.locked(lock) as mine:
        assert mine


def test_the_key_has_no_run_folders(args, monkeypatch):
    before = [key(row) for row in plan(args(), 1, BATCHES)]
    monkeypatch.setattr(evidence, "RUNS", Path("elsewhere"))
    assert [key(row) for row in plan(args(), 1, BATCHES)] == before
    assert len({key(row) for row in plan(args(fractions=(0.1, 1.0), seeds=(0, 1)), 1, BATCHES)}) == 8
    scratch, barlow = (key(row) for row in plan(args(pretraining_epochs=3), 1, BATCHES))
    assert scratch == before[0] and barlow != before[1]


def test_the_yardstick_is_trained_on_simulated_labels_as_long_and_goes_on_head_and_all(place, args, calls, monkeypatch):
    monkeypatch.setattr(evidence, "write_simulated", lambda path, reads, seed: path.touch())
    assert main(args(methods=("scratch-long", "simulated"), finetuning_steps=3)) == 0
    (_, longer), (script, first), (_, then) = calls
    assert script == "finetune_basecaller" and "simulated/pretraining.hdf5" in str(first[first.index("--data") + 1])
    assert float(first[first.index("--lr") + 1]) == 0.004
    assert int(first[first.index("--steps") + 1]) == int(longer[longer.index("--steps") + 1]) - 3
    assert then[then.index("--weights") + 1] == str(Path(first[first.index("--run-dir") + 1]) / "basecaller_last.pt")
    assert [float(then[then.index(name) + 1]) for name in ("--lr", "--pore-model-lr")] == [0.002, 0.0005]
    assert [row["pretraining_steps"] for row in read_rows("small")] == ["0", first[first.index("--steps") + 1]]


def test_a_method_goes_on_from_simulated_labels(place, args, calls, monkeypatch):
    monkeypatch.setattr(evidence, "write_simulated", lambda path, reads, seed: path.touch())
    seconds = iter([10.0, 1.0, 20.0, 2.0, 1.0])  # of labels, fine-tuning, MoCo, fine-tuning twice
    took, complete = {}, evidence.complete

    def timed(folder, *words):
        complete(folder, *words)
        return took.setdefault(folder, (f"commit{len(took)}", next(seconds) if folder not in took else 0))

    monkeypatch.setattr(evidence, "complete", timed)
    assert main(args(methods=("simulated", "simulated+moco"))) == 0
    (first, labels), (last, with_head), (method, words), (_, then) = calls  # simulated labels once, for both arms
    assert (first, last, method) == ("finetune_basecaller", "finetune_basecaller", "moco")
    assert words[words.index("--weights") + 1] == f"{labels[labels.index('--run-dir') + 1]}/basecaller_last.pt"
    assert float(words[words.index("--lr") + 1]) == 1e-4
    assert then[then.index("--weights") + 1] == f"{words[words.index('--run-dir') + 1]}/pore_model.pt"
    assert [float(then[then.index(name) + 1]) for name in ("--lr", "--pore-model-lr")] == [0.002, 0.0005]
    alone, both = read_rows("small")
    assert int(both["pretraining_steps"]) == int(alone["pretraining_steps"]) + 1  # an epoch has one step
    assert both["pretrain_command"].startswith(f"{alone['pretrain_command']} && moco.py ")
    assert (alone["pretraining_seconds"], both["pretraining_seconds"]) == ("10.0", "30.0")
    assert (alone["pretraining_commit"], both["pretraining_commit"]) == ("commit0", "commit0 && commit2")
    assert (alone["effective_rank"], both["effective_rank"]) == ("", "7.0")
    calls.clear()
    assert main(args(methods=("simulated-new-head",))) == 0  # from the same weights, but for the head
    ((_, without),) = calls
    assert set(without) ^ set(with_head) == {"--new-head", *(words[-1] for words in (without, with_head))}


def test_when_the_method_after_simulated_labels_fails_their_row_is_there(place, args, calls, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "write_simulated", lambda path, reads, seed: path.touch())
    calls.failing = ("moco",)
    assert main(args(methods=("simulated+moco", "simulated"))) == 1
    assert [script for script, _ in calls] == ["finetune_basecaller", "moco", "finetune_basecaller"]
    assert [row["arm"] for row in read_rows("small")] == ["simulated"]
    assert "python moco.py" in capsys.readouterr().err


def test_scratch_long_has_the_passes_of_both():
    # 300 * 8/3 * 64 / 32 = 1600 steps, and with the thesis's chunks of 3600 a third of them
    assert as_many_steps(Args(), 300, 32) == 1600
    assert as_many_steps(Args(size="thesis"), 300, 32) == 534


def result(**changes):
    row = dict.fromkeys(COLUMNS, "") | {"name": "small", "arm": "scratch", "fraction": 1.0, "seed": 0, "size": "tiny"}
    row |= {"split": "validation", "finetuning_steps": 2, "lr": 0.002, "identity_mean": 50.0} | changes
    # the commands differ where the rows do, as they would
    words = f"--label-fraction {row['fraction']} --seed {row['seed']} --lr {row['lr']} --weights {row['arm']}"
    return row | {"finetune_command": f"finetune_basecaller.py {words}{' --tune' * (row['split'] == 'tune')}"}


def write(rows, host="here"):
    evidence.RESULTS.mkdir(exist_ok=True)
    with open(evidence.RESULTS / f"small-{host}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_tune_searches_and_the_grid_takes_the_best_rate_of_each_fraction(place, args, calls):
    assert main(args(tune=True)) == 0
    assert [float(words[words.index("--lr") + 1]) for _, words in calls] == list(evidence.RATES)
    assert all("--tune" in words for _, words in calls) and {row["split"] for row in read_rows("small")} == {"tune"}
    calls.clear()
    assert main(args(tune=True, lr=0.5)) == 0  # one more rate than the usual ones
    assert [words[words.index("--lr") + 1] for _, words in calls] == ["0.5"]
    rows = [(0.1, 0.001, 40), (0.1, 0.002, 41), (1.0, 0.002, 70), (1.0, 0.008, 72), (1.0, 0.004, 71)]
    rows = [result(split="tune", fraction=f, lr=lr, identity_mean=identity) for f, lr, identity in rows]
    more = [(0.002, 69), (0.004, 72), (0.008, 70)]  # 8e-3 is best with seed 0, but not in the mean
    rows += [result(split="tune", fraction=1.0, lr=lr, identity_mean=identity, seed=1) for lr, identity in more]
    write([*rows, result(split="tune", lr=0.001, identity_mean=99, finetuning_steps=9), result(identity_mean=99)])
    shutil.rmtree(evidence.RUNS)
    for path in evidence.RESULTS.glob("small-*.csv"):
        if path.name != "small-here.csv":
            path.unlink()
    jobs = plan(args(fractions=(0.1, 1.0)), 1, BATCHES)
    assert [(job["arm"], job["lr"]) for job in jobs] == [
        ("scratch", 0.002),
        ("scratch", 0.004),
        ("barlow", 0.002),
        ("barlow", 0.004),
    ]
    assert {job["lr"] for job in plan(args(lr=0.5), 1, BATCHES)} == {0.5}
    write([result(split="tune", fraction=0.1, lr=0.001, identity_mean=60, seed=1)], "there")  # alone: does not compare
    with pytest.raises(InputError, match=r"no row of --tune at 0.1 of the labels with lr 0.002 and seed 1, "):
        plan(args(fractions=(0.1, 1.0)), 1, BATCHES)


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])  # sd 1, t of two degrees of freedom 4.303: 4.303 / sqrt(3)
    assert mean == 2 and half == pytest.approx(2.4843, abs=1e-4)
    for few in ([5.0], [4.0, 6.0]):
        mean, half = interval(few)
        assert mean == 5 and math.isnan(half)


def test_table_and_picture_pair_the_seeds(place, monkeypatch):
    identities = {"scratch": (60, 70, 50), "barlow": (61, 72, 53)}
    rows = [result(arm=arm, seed=seed, identity_mean=x) for arm, xs in identities.items() for seed, x in enumerate(xs)]
    rows += [result(arm="barlow", fraction=0.1, identity_mean=30)]
    write(rows)
    found = read_identities("small")
    assert list(table(found))[2:] == [
        "| from scratch |  |  | 0 | 60.00 ± 24.84 |  | 3 |",
        "| Barlow Twins | 30.00 |  | 1 | 62.00 ± 23.70 | +2.00 ± 2.48 | 3 |",
    ]
    assert list(table(found, "barlow"))[2:] == [
        "| from scratch |  |  | 0 | 60.00 ± 24.84 | -2.00 ± 2.48 | 3 |",
        "| Barlow Twins | 30.00 |  | 1 | 62.00 ± 23.70 |  | 3 |",
    ]
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_evidence.plot(found, place / "picture.png")
    assert (place / "picture.png").read_bytes().startswith(b"\x89PNG")
    left, right = plt.gcf().axes
    assert len(left.containers) == 2 and len(right.containers) == 1
    hollow = [line for line in right.lines if line.get_fillstyle() == "none"]
    assert [line.get_ydata()[0] for line in hollow] == [0.3]
    write([*rows, result(arm="simulated-new-head", identity_mean=70), result(arm="simulated+moco", identity_mean=71)])
    plot_evidence.plot(read_identities("small"), place / "picture.png")
    left, right, last = plt.gcf().axes
    assert len(left.containers) == 2 and len(right.containers) == 1  # as before
    ((line, *_),) = last.containers
    assert line.get_ydata() == [1]
    monkeypatch.undo()
    plt.close("all")


def test_rows_of_other_data_or_settings_are_refused(place):
    """Commands may differ in what the table has a place for, and between arms in how the weights came about."""
    rows = [
        result(arm="barlow", seed=s) | {"pretrain_command": f"barlow.py --data a.pod5 --seed {s}"} for s in range(3)
    ]
    write([result(), *rows])
    assert {arm: list(found[1.0]) for arm, found in read_identities("small").items()} == {
        "scratch": [0],
        "barlow": [0, 1, 2],
    }
    for column, old, new in (("pretrain_command", "a.pod5", "b.pod5"), ("finetune_command", "--lr", "--tail 5 --lr")):
        write([result(), *rows[:2], rows[2] | {column: rows[2][column].replace(old, new)}])
        with pytest.raises(
            InputError, match=r"barlow, 1.0 of the labels, seed 2 do not compare: (pretrain|fine-tun)ing"
        ):
            read_identities("small")


@pytest.mark.parametrize("column", ["finetune_command", "lr", "size", "finetuning_steps"])
def test_rows_that_do_not_compare_are_refused(place, column):
    other = {"finetune_command": "another"} if column == "finetune_command" else {"seed": 1, column: "9"}
    write([result(seed=2), result()])  # in any order
    write([result() | {"commit": "another"}], "there")  # the same made twice does no harm
    assert read_identities("small")["scratch"] == {1.0: {2: 50.0, 0: 50.0}}
    write([result() | other], "there")
    with pytest.raises(InputError, match=rf"small: .* do not compare: {column} .* and "):
        read_identities("small")


def test_half_a_row_is_refused_by_name(place, args):
    write([result()])
    path = evidence.RESULTS / "small-here.csv"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(InputError, match=r"small-here.csv: has lines that are no rows"):
        main(args())
