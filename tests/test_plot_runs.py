"""The table and the picture of fine-tuning runs."""

import json

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
