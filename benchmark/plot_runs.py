"""Draw the metrics.jsonl of any runs, pretraining and fine-tuning alike, and print a Markdown table of them.

python -m benchmark.plot_runs picture.png runs/barlow "from scratch=runs/A" "Barlow Twins=runs/B"

A folder without a label before it goes by its name.
"""

import json
import statistics
import sys
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's, safe for the colour-blind, without yellow, which is too pale for a line
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
STYLES = ["-", "--", ":"]
PANELS = {  # of the two kinds of run, in the order drawn; a panel that no run has logged is left out
    "pretraining": {
        "loss": "training loss",
        "validation/loss": "validation loss",
        "feature_spread": "feature spread (0 collapsed, 1 even)",
        "effective_rank": "effective rank (directions filled)",
        "top1": "top1: positive found (%)",
        "accuracy": "accuracy: future frame found (%)",
        "gained": "bits gained (dashed: the floor)",
    },
    "fine-tuning": {
        "loss": "training loss (CTC, nats a base)",
        "validation/loss": "validation loss (CTC, nats a base)",
        "validation/identity_mean": "validation accuracy\n(mean identity, %)",
    },
}
SHARES = ("top1", "accuracy")  # logged from 0 to 1
FROM_ZERO = ("feature_spread", "effective_rank", *SHARES)  # of which it matters how near 0 they are


def read_metrics(folder):
    """The lines of a run's metrics.jsonl as dicts."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_runs(runs):
    """{kind: {label: metrics}} of `runs` ({label: run folder}); pretraining logs features, fine-tuning does not."""
    kinds = {kind: {} for kind in PANELS}
    for label, folder in runs.items():
        metrics = read_metrics(folder)
        kind = "pretraining" if any("feature_spread" in line for line in metrics) else "fine-tuning"
        kinds[kind][label] = metrics
    return {kind: metrics for kind, metrics in kinds.items() if metrics}


def smoothed(values):
    """Mean of the values around each, over a thirtieth of the run; a short run stays as it is."""
    half = len(values) // 60
    return [sum(near) / len(near) for i in range(len(values)) if (near := values[max(0, i - half) : i + half + 1])]


def curve(metrics, key):
    """Steps and values of what was logged as `key`."""
    logged = [(line["step"], line[key]) for line in metrics if key in line]
    return [step for step, _ in logged], [value for _, value in logged]


def plot(runs, out):
    """Draws `runs` ({label: run folder}) to the file `out`: a panel for each metric, a colour for each run."""
    kinds = read_runs(runs)
    panels = {
        kind: [key for key in PANELS[kind] if any(curve(m, key)[0] for m in kinds[kind].values())] for kind in kinds
    }
    grids = {kind: (2, 2) if len(keys) == 4 else (-(-len(keys) // 3), 3) for kind, keys in panels.items()}
    rows = [grid[0] for grid in grids.values()]
    figure = plt.figure(figsize=(10, 3.1 * sum(rows) + 0.1 * len(runs)), layout="constrained")
    parts = figure.subfigures(len(kinds), height_ratios=rows, squeeze=False).flat
    looks = dict(zip(runs, cycle((colour, style) for style in STYLES for colour in COLOURS), strict=False))
    for part, (kind, members) in zip(parts, kinds.items(), strict=True):
        firsts = {label: curve(metrics, "loss")[1][0] for label, metrics in members.items()}
        # methods count their losses in different units; no axis shows 3000 and 0.9
        as_share = kind == "pretraining" and 0 < min(firsts.values()) < max(firsts.values()) / 3
        axes = part.subplots(*grids[kind], sharex=True, squeeze=False).flatten()
        for axis, key in zip(axes, panels[kind], strict=False):
            loss_share = as_share and key.endswith("loss")
            for label, metrics in members.items():
                colour, style = looks[label]
                steps, values = curve(metrics, key)
                if not steps:
                    continue
                unit = firsts[label] if loss_share else 0.01 if key in SHARES else 1
                values = [value / unit for value in values]
                if key == "gained":
                    steps_of_floor, floor = curve(metrics, "floor")
                    axis.plot(steps_of_floor, smoothed(floor), "--", color=colour, alpha=0.6, linewidth=1)
                if key.startswith("validation/"):
                    axis.plot(steps, values, style, marker=".", markersize=4, color=colour)
                else:
                    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                    axis.plot(steps, smoothed(values), style, color=colour)
            note = "\n(share of the first training loss)" if loss_share else ""
            axis.set(xlabel=f"{kind} step", ylabel=PANELS[kind][key] + note)
            axis.tick_params(labelbottom=True)
            axis.grid(alpha=0.3)
            if key in FROM_ZERO:
                axis.axhline(0, linewidth=0)  # 0 in sight, and room above the curves all the same
                axis.set_ylim(bottom=0)
        for axis in axes[len(panels[kind]) :]:
            axis.remove()
    lines = [plt.Line2D([], [], color=colour, linestyle=style) for colour, style in looks.values()]
    columns = 4 if max(map(len, runs)) < 20 else 2
    figure.legend(lines, list(looks), loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def table(runs):
    """A Markdown table for each kind among `runs` ({label: run folder})."""
    tables = {"pretraining": pretraining_table, "fine-tuning": finetuning_table}
    return "\n\n".join("\n".join(tables[kind](members)) for kind, members in read_runs(runs).items())


def finetuning_table(runs):
    """Each run's validation at its best loss, the state that basecaller.pt holds."""
    yield "| run | best at step | validation loss | mean identity | median identity |\n|---|---|---|---|---|"
    for label, metrics in runs.items():
        validated = [line for line in metrics if "validation/loss" in line]
        if not validated:
            yield f"| {label} | | | | |"
            continue
        best = min(validated, key=lambda line: line["validation/loss"])
        mean, median = best["validation/identity_mean"], best["validation/identity_median"]
        yield f"| {label} | {best['step']} | {best['validation/loss']:.3f} | {mean:.1f} % | {median:.1f} % |"


def pretraining_table(runs):
    """First and last of the logged training steps, the last validation, median chunks per second."""
    yield "| run | steps | loss | validation loss | feature spread | effective rank | chunks / s |"
    yield "|---|---|---|---|---|---|---|"
    for label, metrics in runs.items():
        steps = [line for line in metrics if "loss" in line]
        first, last = steps[0], steps[-1]
        validation = [f"{line['validation/loss']:.4g}" for line in metrics if "validation/loss" in line]
        spread, rank = (
            f"{first[key]:.{digits}f} → {last[key]:.{digits}f}"
            for key, digits in (("feature_spread", 2), ("effective_rank", 1))
        )
        speed = statistics.median(line["chunks_per_second"] for line in steps)
        yield (
            f"| {label} | {first['step']} → {last['step']} | {first['loss']:.4g} → {last['loss']:.4g} "
            f"| {validation[-1] if validation else ''} | {spread} | {rank} | {speed:.3g} |"
        )


def main(words):
    if len(words) < 2:
        sys.exit(__doc__)
    out, runs = Path(words[0]), {}
    if out.suffix not in (".png", ".pdf", ".svg"):
        sys.exit(f"{out}: the picture comes first, and should end in .png, .pdf or .svg")
    for word in words[1:]:
        label, _, folder = word.rpartition("=")
        label = label or Path(folder).resolve().name
        if label in runs:
            sys.exit(f"{word}: another run goes by {label!r}; give it a label: name={folder}")
        runs[label] = folder
        try:
            lines = read_metrics(folder)
        except (OSError, ValueError) as error:
            sys.exit(f"{folder}/metrics.jsonl: cannot be read ({error})")
        if not any("loss" in line for line in lines):
            sys.exit(f"{folder}: no metrics.jsonl with a logged step in it; give the folder of a run")
    try:
        plot(runs, out)
    except OSError as error:
        sys.exit(f"{out}: cannot be written ({error.strerror})")
    print(table(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
