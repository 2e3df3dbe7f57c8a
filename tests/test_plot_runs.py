"""The tables of runs, and the picture of fine-tuning ones."""

import json

from benchmark import pretraining_table
from benchmark.plot_runs import plot, table


def test_table_takes_the_best_validation_and_the_picture_is_drawn(tmp_path):
    lines = [{"step": 10, "loss": 2.0}]
    for step, loss, identity in ((20, 1.5, 60.0), (40, 1.1, 71.25), (60, 1.2, 70.0)):
        line = {"step": step, "validation/loss": loss, "validation/identity_mean": identity}
        lines.append(line | {"validation/identity_median": identity + 1})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert table({"scratch": tmp_path}).splitlines()[2:] == ["| scratch | 40 | 1.100 | 71.2 % | 72.2 % |"]
    plot({"scratch": tmp_path}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_pretraining_table_has_the_first_and_the_last_step(tmp_path):
    run = tmp_path / "barlow"
    run.mkdir()
    lines = [{"step": 20, "validation/loss": 4.5}]
    for step, loss, speed in ((10, 9.0, 7.0), (20, 5.0, 8.0), (30, 3.25, 30.0)):
        spread = {"feature_spread": 1 - step / 100, "effective_rank": step / 4}
        lines.append({"step": step, "loss": loss, "chunks_per_second": speed} | spread)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = "| barlow | 10 → 30 | 9 → 3.25 | 4.5 | 0.90 → 0.70 | 2.5 → 7.5 | 8 |"
    assert pretraining_table.table([run]).splitlines()[2:] == [row]
