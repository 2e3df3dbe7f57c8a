"""Compare fine-tuning runs: a table, and a picture as the thesis's figure 5.24 has it.

python -m benchmark.plot_runs picture.png "from scratch=runs/A" "Barlow Twins=runs/B"
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "loss": "training loss (CTC, nats a base)",
    "validation/loss": "validation loss (CTC, nats a base)",
    "validation/identity_mean": "validation accuracy (mean identity, %)",
}


def read_metrics(folder):
    """The lines of a run's metrics.jsonl as dicts."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def smoothed(values):
    """Mean of the values around each, over a thirtieth of the run; a short run stays as it is."""
    half = len(values) // 60
    return [sum(near) / len(near) for i in range(len(values)) if (near := values[max(0, i - half) : i + half + 1])]


def plot(runs, out):
    """Draws the three panels of `runs` ({label: run folder}) to the file `out`."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    colours = plt.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    for colour, (label, folder) in zip(colours, runs.items(), strict=False):
        metrics = read_metrics(folder)
        for axis, key in zip(axes, PANELS, strict=True):
            steps = [line["step"] for line in metrics if key in line]
            values = [line[key] for line in metrics if key in line]
            if key == "loss":
                axis.plot(steps, values, color=colour, alpha=0.2)
                values = smoothed(values)
            axis.plot(steps, values, color=colour, label=label)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set(xlabel="fine-tuning step", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def table(runs):
    """A Markdown table of each run's validation at its best loss, the state that basecaller.pt holds."""
    lines = ["| run | best at step | validation loss | mean identity | median identity |", "|---|---|---|---|---|"]
    for label, folder in runs.items():
        validated = [line for line in read_metrics(folder) if "validation/loss" in line]
        best = min(validated, key=lambda line: line["validation/loss"])
        mean, median = best["validation/identity_mean"], best["validation/identity_median"]
        lines.append(f"| {label} | {best['step']} | {best['validation/loss']:.3f} | {mean:.1f} % | {median:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in word for word in sys.argv[2:]):
        sys.exit(__doc__)
    chosen = dict(word.rsplit("=", 1) for word in sys.argv[2:])
    for chosen_folder in chosen.values():
        if not any("validation/loss" in line for line in read_metrics(chosen_folder)):
            sys.exit(f"{chosen_folder}: no metrics.jsonl with a validation in it; give the folder of a fine-tuning run")
    plot(chosen, sys.argv[1])
    print(table(chosen))
