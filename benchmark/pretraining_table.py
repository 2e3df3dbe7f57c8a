"""A Markdown table of pretraining runs: what each logged first and last, and how fast it went.

python -m benchmark.pretraining_table runs/A runs/B
"""

import statistics
import sys
from pathlib import Path

from benchmark.plot_runs import read_metrics


def table(folders):
    """One line a run: first and last of the logged training steps, the last validation, median chunks a second."""
    lines = [
        "| run | steps | loss | validation loss | feature spread | effective rank | chunks / s |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder in folders:
        metrics = read_metrics(folder)
        steps = [line for line in metrics if "loss" in line]
        validation = [line["validation/loss"] for line in metrics if "validation/loss" in line][-1]
        first, last = steps[0], steps[-1]
        change = " | ".join(
            f"{first[key]:.{digits}f} → {last[key]:.{digits}f}"
            for key, digits in (("feature_spread", 2), ("effective_rank", 1))
        )
        speed = statistics.median(line["chunks_per_second"] for line in steps)
        lines.append(
            f"| {Path(folder).name} | {first['step']} → {last['step']} | {first['loss']:.4g} → {last['loss']:.4g} "
            f"| {validation:.4g} | {change} | {speed:.3g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for chosen in sys.argv[1:]:
        logged = [key for line in read_metrics(chosen) for key in line]
        if "feature_spread" not in logged or "validation/loss" not in logged:
            sys.exit(f"{chosen}: no metrics.jsonl of a finished pretraining; give the folder of such a run")
    print(table(sys.argv[1:]))
