"""Print a Markdown table of what unseen.py found, and draw the gains over training from scratch.

    python -m benchmark.plot_unseen NAME

reads benchmark/results/NAME.csv and draws docs/unseen_NAME.png. Rows with the same labelled reads, share of them and
steps compare. A gain is the mean over the seeds that both have. Its interval holds 95 % of the gains of resampled seeds
and test reads (a bootstrap; with three seeds or fewer it is too narrow).
"""

import re
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmark.evidence import ROOT, read_rows
from benchmark.plot_runs import COLOURS
from common import InputError

SCRATCH = "from scratch"
RESAMPLED = 4000


def training_of(row):
    """What fine-tuning was given: its labelled reads, share of them and steps."""
    options = dict(re.findall(r"--([a-z-]+) (\S+)", row["finetune_command"]))
    share = f"{100 * float(options.get('label-fraction', 1)):g} %"
    return f"{Path(options['data']).stem}, {share}, {options['steps']} steps"


def arm_of(row):
    """The commands before fine-tuning, without --seed and --data."""
    commands = row["pretrain_command"].split(" && ")
    return ", ".join(re.sub(r" --(seed|data|size) [^-]\S*( [^-]\S*)*", "", command) for command in commands) or SCRATCH


def tests_of(row):
    return [name.removeprefix("reads_") for name in row if name.startswith("reads_")]


def read_arms(name):
    """{training: {arm: {seed: row}}}. InputError if there are none, or two of one seed."""
    found = {}
    for row in read_rows(name).values():
        seeds = found.setdefault(training_of(row), {}).setdefault(arm_of(row), {})
        if seeds.setdefault(int(row["seed"]), row) is not row:
            raise InputError(f"{name}: two rows of {training_of(row)}, {arm_of(row)}, seed {row['seed']}; remove one")
    if not found:
        raise InputError(f"benchmark/results/{name}.csv: no results; run benchmark/unseen.py --name {name} first")
    return found


def by_read(row, test):
    """Means (reads,) and numbers of chunks (reads,) of a test's reads."""
    return np.array([pair.split("x") for pair in row[f"reads_{test}"].split()], float).T


def gain(arm, scratch, test):
    """Mean gain over the seeds that both ({seed: row}) have, and the ends of its interval."""
    seeds = sorted(arm.keys() & scratch.keys())
    counts = by_read(arm[seeds[0]], test)[1]
    more = np.stack([by_read(arm[seed], test)[0] - by_read(scratch[seed], test)[0] for seed in seeds])  # (seeds, reads)
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(seeds), size=(RESAMPLED, len(seeds)))
    reads = rng.integers(len(counts), size=(RESAMPLED, len(counts)))
    drawn = more[chosen[:, :, None], reads[:, None]].mean(1)  # (RESAMPLED, reads)
    weights = counts[reads]
    low, high = np.percentile((drawn * weights).sum(1) / weights.sum(1), [2.5, 97.5])
    return (more.mean(0) * counts).sum() / counts.sum(), low, high


def table(arms):
    """The lines of a Markdown table: a row for each arm, and for each test its identity and gain."""
    tests = tests_of(next(iter(next(iter(next(iter(arms.values())).values())).values())))
    yield f"| trained on | before | seeds | {' | '.join(f'{test} | gain' for test in tests)} |"
    yield "|---" * (3 + 2 * len(tests)) + "|"
    for training, found in arms.items():
        for arm, seeds in found.items():
            cells = []
            for test in tests:
                cells.append(f"{np.mean([float(row[f'identity_{test}']) for row in seeds.values()]):.2f}")
                compared = arm != SCRATCH and seeds.keys() & found.get(SCRATCH, {}).keys()
                cells.append(
                    "{:+.2f} ({:+.2f} to {:+.2f})".format(*gain(seeds, found[SCRATCH], test)) if compared else ""
                )
            yield f"| {training} | {arm} | {len(seeds)} | {' | '.join(cells)} |"


def plot(arms, out):
    """Draws the gains as dots with their intervals, one row an arm, to the file `out`. InputError if there are none."""
    rows = [
        (f"{training}\n{textwrap.fill(arm, 50)}", seeds, found[SCRATCH])
        for training, found in arms.items()
        for arm, seeds in found.items()
        if arm != SCRATCH and seeds.keys() & found.get(SCRATCH, {}).keys()
    ]
    if not rows:
        raise InputError("no gains to draw: from scratch and another arm need a seed in common")
    figure, axis = plt.subplots(figsize=(8, 1 + 0.8 * len(rows)), layout="constrained")
    axis.axvline(0, color="black", linewidth=0.8)
    for number, test in enumerate(tests_of(next(iter(rows[0][1].values())))):
        for place, (_, seeds, scratch) in enumerate(rows):
            mean, low, high = gain(seeds, scratch, test)
            y, look = place + 0.2 * number, {"color": COLOURS[number], "label": test if place == 0 else None}
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, **look)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("gain over training from scratch (points of identity)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(words):
    if len(words) != 1:
        sys.exit(__doc__)
    try:
        arms = read_arms(words[0])
        print("\n".join(table(arms)))
        plot(arms, ROOT / "docs" / f"unseen_{words[0]}.png")
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
