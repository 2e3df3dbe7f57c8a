"""The grid of evidence.py: jobs done once, stopped and gone on with; its learning rates, table and picture."""

import importlib
import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import matplotlib.pyplot as plt
import pytest
import tyro
from filelock import FileLock

from benchmark import evidence, plot_evidence
from benchmark.evidence import ARMS, Args, append_row, key, main, plan, read_rows
from benchmark.plot_evidence import read_identities, table
from common import InputError

TUNE = "finetune_basecaller"


@pytest.fixture
def args(simulated, tmp_path, monkeypatch):
    """Arguments of a small grid that runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "write_simulated", lambda path, reads, seed: path.touch())
    small = {"methods": ("scratch", "barlow"), "fractions": (1.0,), "seeds": (0,), "finetuning_steps": 2}
    return lambda **changes: Args((simulated,), (simulated,), "small", **small | changes)


@pytest.fixture
def calls(monkeypatch):
    """The scripts called, [script, words ...]; they write what they should without training.

    how: {script: its exit code, or the file that it leaves when it is stopped}.
    """

    class Calls(list):
        def __call__(self, words, **_):
            script = Path(words[1]).stem
            self.append([script, *words[2:]])
            folder, how = Path(words[-1]), self.how.get(script)  # of --run-dir or --resume
            folder.mkdir(parents=True, exist_ok="--resume" in words)
            if isinstance(how, str):
                (folder / (how or "args.json")).touch()
                raise KeyboardInterrupt
            lines = [{"step": 10, "loss": 1, "chunks_per_second": 20}]
            for step, percent in ((10, 99), (12, 50)):
                names = "validation/loss", "validation/identity_mean", "validation/identity_median"
                lines.append({"step": step} | dict.fromkeys(names, percent))
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
            (folder / "args.json").write_text('{"batch_size": 4}')
            (folder / ("basecaller_last.pt" if script == TUNE else "pore_model.pt")).touch()
            return SimpleNamespace(returncode=how or 0)

    found = Calls()
    found.how = {}
    monkeypatch.setattr(evidence, "current_commit", lambda: "old")
    monkeypatch.setattr(evidence.subprocess, "run", found)
    return found


def rows_of(*columns):
    return [tuple(row[column] for column in columns) for row in read_rows("small").values()]


def test_the_real_scripts_make_a_row(args):
    assert main(args(methods=("cpc",))) == 0
    (row,) = read_rows("small").values()
    assert (row["arm"], row["split"], row["validation_reads"], row["lr"]) == ("cpc", "validation", "2", "0.008")
    assert float(row["loss"]) > 0 and row["commit"] == row["pretraining_commit"] != "" and row["hardware"]
    (run,) = Path("runs/evidence").glob(f"{TUNE}-????????")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], str(last["validation/loss"])) == (2, row["loss"])
    assert json.loads((run / "args.json").read_text())["weights"].endswith("/pore_model.pt")


def test_pretraining_is_shared_and_no_row_is_made_twice(args, calls):
    grid = args(fractions=(0.5, 1.0), seeds=(0, 1))
    assert main(grid) == 0
    assert [script for script, *_ in calls] == [TUNE, TUNE, "barlow", TUNE, TUNE] * 2
    jobs = [(seed, arm, fraction) for seed in "01" for arm in ("scratch", "barlow") for fraction in ("0.5", "1.0")]
    assert rows_of("seed", "arm", "fraction") == jobs
    measured = rows_of("identity_mean", "seconds", "pretraining_seconds", "pretraining_steps")  # the last, not the best
    assert set(measured) == {("50", "2.0", "0", "0"), ("50", "2.0", "2.0", "12")}
    path = evidence.RESULTS / "small.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    calls.clear()
    assert main(grid) == 0 and path.read_text() == "".join(lines)  # from what has run
    shutil.rmtree("runs")
    assert main(grid) == 0 and not calls


@pytest.mark.parametrize("left, word, commits", [("checkpoint.pt", "--resume", "old, new"), ("", "--run-dir", "new")])
def test_a_stopped_script_goes_on(args, calls, monkeypatch, left, word, commits):
    calls.how = {"barlow": left}
    with pytest.raises(KeyboardInterrupt):
        main(args())
    calls.how = {}
    monkeypatch.setattr(evidence, "current_commit", lambda: "new")
    assert main(args()) == 0
    assert [script for script, *_ in calls] == [TUNE, "barlow", "barlow", TUNE] and calls[2][-2] == word
    assert rows_of("commit", "pretraining_commit") == [("old", ""), ("new", commits)]


def test_a_failed_job_is_named_and_the_others_are_done(args, calls, capsys):
    calls.how = {"moco": 1}
    failed = main(args(methods=("simulated+moco", "simulated")))  # sys.exit prints it, and the exit code is 1
    assert failed == "failed: simulated+moco, 1 of the labels, lr 0.008, seed 0"
    assert [script for script, *_ in calls] == [TUNE, "moco", TUNE]
    assert rows_of("arm") == [("simulated",)] and "python moco.py --data" in capsys.readouterr().err


def test_a_job_of_another_process_is_skipped(args, calls, capsys):
    main(args())
    (pretrained,) = Path("runs/evidence").glob("barlow-????????")
    (evidence.RESULTS / "small.csv").unlink()
    with FileLock(f"{pretrained}.lock"):
        assert main(args(methods=("barlow", "scratch"))) == 0
    assert rows_of("arm") == [("scratch",)]
    assert "barlow, 1 of the labels, lr 0.008, seed 0: another process is at it\n" in capsys.readouterr().out


def test_rows_are_added_side_by_side_to_those_there(args):
    before = (Path(__file__).parents[1] / "benchmark" / "results" / "real.csv").read_text()
    evidence.RESULTS.mkdir()
    (evidence.RESULTS / "real.csv").write_text(before)
    with ThreadPoolExecutor(4) as pool:
        rows = [{"name": "real", "pretrain_command": "", "finetune_command": f"{number}"} for number in range(20)]
        list(pool.map(append_row, rows))
    after = (evidence.RESULTS / "real.csv").read_text()
    assert after.startswith(before)
    assert sorted(int(line.split(",")[-1]) for line in after.removeprefix(before).splitlines()) == list(range(20))


def test_all_commands_have_options_of_the_scripts(args):
    lines = {command for _, commands in plan(args(methods=tuple(ARMS))) for command in commands}
    assert len(lines) == 23  # 5 of fine-tuning, 1 of simulated labels, 8 of methods, 9 after those
    for script, *words in map(shlex.split, lines):
        assert tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=words).data


def test_the_rows_of_the_repository_count(tmp_path, monkeypatch):
    """The commands of all arms, to the letter: here are the counts of the reads that they were made with.

    But for masked events, which are younger.
    """

    def counts(stores, chunk_len, split, labelled=False, share=None, fraction=1.0, seed=0):
        chunks = MagicMock(number_of_reads=12, steps_per_epoch=lambda batch_size: 266)
        chunks.__len__.return_value = {(0.01, 1): 18, (0.01, 2): 15}.get((fraction, seed), 100)
        return chunks

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "write_simulated", lambda path, reads, seed: path.touch())
    monkeypatch.setattr(evidence, "open_data", lambda paths: None)
    monkeypatch.setattr(evidence, "Chunks", counts)
    data = Path("../shared/data")
    raw, labelled = (data / "unlabelled_r94.pod5", data / "na12878_r941.pod5"), (data / "ecoli_r94_mapped.hdf5",)
    grids = {90: {}, 15: {"tune": True, "seeds": (0,)}, 108: {"fractions": (0.01, 0.1), "methods": tuple(ARMS)}}
    for jobs, settings in grids.items():
        rows = [row for row, _ in plan(Args(raw, labelled, **settings)) if "masked" not in row["arm"]]
        assert len(rows) == jobs and all(key(row) in read_rows("real") for row in rows)


def result(**changes):
    row = {"name": "small", "arm": "scratch", "fraction": 1.0, "seed": 0, "size": "tiny", "split": "validation"}
    row |= {"validation_reads": 2, "validation_chunks": 9, "finetuning_steps": 2, "lr": 0.002, "identity_mean": 50.0}
    row |= changes
    words = "--label-fraction {fraction} --seed {seed} --lr {lr} --weights {arm}{split}".format(**row)
    return {"pretrain_command": "", "finetune_command": f"{TUNE}.py {words}"} | row


def write(*rows):
    (evidence.RESULTS / "small.csv").unlink(missing_ok=True)
    for row in rows:
        append_row(row)


def test_tune_searches_and_the_grid_takes_the_best_of_each_fraction(args, calls):
    assert main(args(tune=True)) == main(args(tune=True, lr=0.5)) == 0
    assert [float(call[call.index("--lr") + 1]) for call in calls] == [*evidence.LEARNING_RATES, 0.5]
    assert all("--tune" in call for call in calls) and set(rows_of("split")) == {("tune",)}
    found = [(0.1, 0, 0.001, 40), (0.1, 0, 0.002, 41), (1.0, 0, 0.002, 70), (1.0, 0, 0.008, 72), (1.0, 0, 0.004, 71)]
    found += [(1.0, 1, 0.002, 69), (1.0, 1, 0.004, 72), (1.0, 1, 0.008, 70)]  # 0.008 is best with seed 0 alone
    found += [(0.1, 1, 0.001, 60)]  # with a seed that the other learning rate has not
    rows = [result(split="tune", fraction=f, seed=seed, lr=lr, identity_mean=x) for f, seed, lr, x in found]
    write(*rows, result(split="tune", lr=0.001, identity_mean=99, finetuning_steps=9), result(identity_mean=99))
    jobs = [(row["arm"], row["lr"]) for row, _ in plan(args(fractions=(0.1, 1.0)))]
    assert jobs == [("scratch", 0.002), ("scratch", 0.004), ("barlow", 0.002), ("barlow", 0.004)]
    assert {row["lr"] for row, _ in plan(args(lr=0.5))} == {0.5}


def test_table_and_picture_pair_the_seeds(args, tmp_path, monkeypatch):
    identities = {"scratch": (60, 70, 50), "barlow": (61, 72, 53)}
    rows = [result(arm=arm, seed=seed, identity_mean=x) for arm, xs in identities.items() for seed, x in enumerate(xs)]
    write(*rows[::-1], result(arm="barlow", fraction=0.1, identity_mean=30), result(arm="dino", seed=1))
    assert list(table(read_identities("small"))) == [
        "| | 10 % of labels | gain | 100 % of labels | gain |",
        "|---|---|---|---|---|",
        "| from scratch |  |  | 60.0 70.0 50.0 |  |",
        "| DINO |  |  | - 50.0 - | - -20.0 -, mean -20.00 |",
        "| Barlow Twins | 30.0 |  | 61.0 72.0 53.0 | +1.0 +2.0 +3.0, mean +2.00 |",
    ]
    assert list(table(read_identities("small"), "barlow"))[2].endswith("| -1.0 -2.0 -3.0, mean -2.00 |")
    write(*rows, result(arm="simulated-new-head", identity_mean=70), result(arm="simulated+moco", identity_mean=71))
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_evidence.plot(read_identities("small"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    drawn = [[list(line.get_ydata()) for line in axis.lines] for axis in plt.gcf().axes]  # means and seeds of each arm
    assert drawn == [[[60], [60, 70, 50], [62], [61, 72, 53]], [[2], [1, 2, 3], [0, 0], [0.3]], [[1], [1], [0, 0]]]
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("column", ["finetune_command", "pretrain_command", "lr", "finetuning_steps", "same seed"])
def test_rows_that_do_not_compare_are_refused(args, column):
    rows = [result(arm="barlow", seed=s, pretrain_command=f"barlow.py --data a.pod5 --seed {s}") for s in range(3)]
    write(*rows, result())
    assert list(read_identities("small")) == ["scratch", "barlow"]
    if column == "same seed":
        rows.append(rows[2] | {"finetune_command": rows[2]["finetune_command"] + " --batch-size 9"})
    else:
        rows[2][column] = f"{rows[2][column]} --new 9"
    write(*rows, result())
    with pytest.raises(InputError, match=r"^small: barlow, 1.0 of the labels, seed 2 does not compare with"):
        read_identities("small")
