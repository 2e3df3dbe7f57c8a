"""Print what unseen.py found as Markdown tables, and draw it.

    python -m benchmark.plot_unseen NAME

reads benchmark/results/NAME.csv and prints gains over training from scratch, every seed's, and what arms of several
commands gain over each of them alone. It draws docs/unseen_NAME.png: each arm's gain over training from scratch; and
docs/unseen_NAME_lines.png: identity against samples seen in pretraining and against labels. Rows with the same labelled
reads, share of them and steps compare. A gain is the mean over the seeds that both have. Its interval holds 95 % of
the gains of resampled seeds and test reads (a bootstrap; with three seeds or fewer it is too narrow). An arm's identity
is scratch's mean and its gain, since arms may have other seeds.
"""

import importlib
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmark.evidence import ROOT, read_rows
from benchmark.plot_evidence import LOOKS, NAMES
from benchmark.plot_runs import COLOURS
from common import InputError

SCRATCH = "from scratch"
THEN = ", then "  # between the commands of an arm
RESAMPLED = 4000
TITLES = {"lambda_first": "lambda, first half", "lambda_second": "lambda", "ecoli": "*E. coli*"}  # others: file names


def options_of(command):
    """{option: its words} of a command of a script."""
    return {name: words.strip() for name, words in re.findall(r"--([a-z-]+)((?: (?!--)\S+)*)", command)}


def training_of(row):
    """What fine-tuning was given: its labelled reads and the share of them in percent; and its steps."""
    options = options_of(row["finetune_command"])
    return Path(options["data"]).stem, 100 * float(options.get("label-fraction", 1)), int(options["steps"])


def commands_of(row):
    """[(script, options)] before fine-tuning, without --seed and --weights; --data by the files' names."""
    commands = row["pretrain_command"].split(" && ") if row["pretrain_command"] else []
    options = [options_of(command) for command in commands]
    for given in options:
        given.pop("seed", None), given.pop("weights", None)
        given["data"] = " ".join(Path(path).stem for path in given["data"].split())
    return [(command.partition(".py")[0], given) for command, given in zip(commands, options, strict=True)]


def arm_names(rows):
    """The arm of each row: the scripts before fine-tuning, with what differs in the options of a script."""
    all_options = defaultdict(list)
    for row in rows:
        for script, options in commands_of(row):
            all_options[script].append(options)

    def title_of(script, options):
        title = f"labels of {options['data']} reads" if script == "finetune_basecaller" else NAMES[script]
        for option, words in options.items():
            others = [other.get(option) for other in all_options[script]]
            if len({*others}) > 1:
                differ = [word for word in words.split() if any(word not in (of or "").split() for of in others)]
                title = " ".join([title, f"--{option}", *differ])
        return title

    return [THEN.join(title_of(*command) for command in commands_of(row)) or SCRATCH for row in rows]


def tests_of(seeds):
    """The names of the tests of rows ({seed: row})."""
    return [name.removeprefix("reads_") for name in next(iter(seeds.values())) if name.startswith("reads_")]


def read_arms(name):
    """{training: {arm: {seed: row}}}, by share of labels. Steps that scratch alone was given are an arm of fewer steps.

    InputError if no training has scratch, or two rows are of one seed.
    """
    rows = [*read_rows(name).values()]
    pretrained = {training_of(row) for row in rows if row["pretrain_command"]}
    found = {}
    for row, arm in sorted(zip(rows, arm_names(rows), strict=True), key=lambda pair: training_of(pair[0])):
        data, share, steps = training_of(row)
        fewer = [other for other in pretrained if other[:2] == (data, share) and other[2] < steps]
        if fewer and (data, share, steps) not in pretrained:
            arm, steps = f"{arm}, {steps} steps", max(fewer)[2]
        seeds = found.setdefault(f"{data}, {share:g} %, {steps} steps", {}).setdefault(arm, {})
        if seeds.setdefault(int(row["seed"]), row) is not row:
            raise InputError(f"{name}: two rows of {data}, {share:g} %, {arm}, seed {row['seed']}; remove one")
    found = {training: arms for training, arms in found.items() if SCRATCH in arms}
    if not found:
        raise InputError(
            f"benchmark/results/{name}.csv: no results from scratch; run benchmark/unseen.py --name {name} first"
        )
    return found


def by_read(row, test):
    """Means (reads,) and numbers of chunks (reads,) of a test's reads."""
    return np.array([pair.split("x") for pair in row[f"reads_{test}"].split()], float).T


def paired(arm, scratch, test):
    """Gains (seeds, reads) of the seeds that both ({seed: row}) have, and the reads' chunks (reads,)."""
    seeds = sorted(arm.keys() & scratch.keys())
    gains = np.stack([by_read(arm[seed], test)[0] - by_read(scratch[seed], test)[0] for seed in seeds])
    return gains, by_read(arm[seeds[0]], test)[1]


def gain(arm, scratch, test):
    """Mean gain over the seeds that both ({seed: row}) have, and the ends of its interval."""
    more, counts = paired(arm, scratch, test)
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(more), size=(RESAMPLED, len(more)))
    reads = rng.integers(len(counts), size=(RESAMPLED, len(counts)))
    drawn = more[chosen[:, :, None], reads[:, None]].mean(1)  # (RESAMPLED, reads)
    weights = counts[reads]
    low, high = np.percentile((drawn * weights).sum(1) / weights.sum(1), [2.5, 97.5])
    return (more.mean(0) * counts).sum() / counts.sum(), low, high


def compared(found):
    """{arm: {seed: row}} of one training: those that have a seed in common with scratch, the largest gain first."""
    scratch = found[SCRATCH]
    rows = {arm: seeds for arm, seeds in found.items() if arm != SCRATCH and seeds.keys() & scratch.keys()}
    gains = {arm: np.mean([gain(seeds, scratch, test)[0] for test in tests_of(seeds)]) for arm, seeds in rows.items()}
    return {arm: rows[arm] for arm in sorted(rows, key=gains.get, reverse=True)}


def mean_identity(seeds, test):
    return np.mean([float(row[f"identity_{test}"]) for row in seeds.values()])


def signed(gain, digits=2):
    return f"{gain:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def with_interval(mean, low, high):
    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def table(arms):
    """The lines of a Markdown table: a row for each arm, and for each test its identity and gain."""
    tests = tests_of(next(iter(arms.values()))[SCRATCH])
    titles = [TITLES.get(test, test) for test in tests]
    yield f"| trained on | before fine-tuning | seeds | {' | '.join(f'{title} | gain' for title in titles)} |"
    yield "|---" * (3 + 2 * len(titles)) + "|"
    for training, found in arms.items():
        scratch = found[SCRATCH]
        base = [mean_identity(scratch, test) for test in tests]
        yield f"| {training} | {SCRATCH} | {len(scratch)} | {' | '.join(f'{mean:.2f} | ' for mean in base)} |"
        for arm, seeds in compared(found).items():
            gains = [gain(seeds, scratch, test) for test in tests]
            cells = [f"{mean + of[0]:.2f} | {with_interval(*of)}" for mean, of in zip(base, gains, strict=True)]
            yield f"| | {arm} | {len(seeds.keys() & scratch.keys())} | {' | '.join(cells)} |"


def table_of_seeds(arms):
    """The lines of a Markdown table: a row for each arm, and for each test its gain with each seed."""
    tests = tests_of(next(iter(arms.values()))[SCRATCH])
    yield f"| trained on | before fine-tuning | {' | '.join(TITLES.get(test, test) for test in tests)} |"
    yield "|---" * (2 + len(tests)) + "|"
    for training, found in arms.items():
        for arm, seeds in compared(found).items():
            cells = []
            for test in tests:
                more, counts = paired(seeds, found[SCRATCH], test)
                cells.append(", ".join(signed(of, 1) for of in (more * counts).sum(1) / counts.sum()))
            yield f"| {training} | {arm} | {' | '.join(cells)} |"


def table_of_parts(arms):
    """The lines of a Markdown table: what arms of several commands gain over each of them alone; none without such."""
    lines = []
    for training, found in arms.items():
        tests = tests_of(found[SCRATCH])
        for arm in compared(found):
            for part in arm.split(THEN) if THEN in arm else ():
                common = found[arm].keys() & found.get(part, {}).keys()
                if common:
                    cells = [with_interval(*gain(found[arm], found[part], test)) for test in tests]
                    lines.append(f"| {training} | {arm} | {part} | {len(common)} | {' | '.join(cells)} |")
    if lines:
        titles = [TITLES.get(test, test) for test in tests]
        yield f"| trained on | before fine-tuning | gain over | seeds | {' | '.join(titles)} |"
        yield "|---" * (4 + len(titles)) + "|"
        yield from lines


def plot(arms, out):
    """Draws the gains as dots with their intervals, one row an arm, to the file `out`. InputError if there are none."""
    shown = {training: rows for training, found in arms.items() if (rows := compared(found))}
    if not shown:
        raise InputError("no gains to draw: from scratch and another arm need a seed in common")
    heights = [len(rows) + 0.5 for rows in shown.values()]
    figure, axes = plt.subplots(
        len(shown), figsize=(8, 1 + 0.45 * sum(heights)), height_ratios=heights, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (training, rows) in zip(axes[:, 0], shown.items(), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for number, test in enumerate(tests_of(arms[training][SCRATCH])):
            for place, seeds in enumerate(rows.values()):
                mean, low, high = gain(seeds, arms[training][SCRATCH], test)
                look = {"color": COLOURS[number], "label": TITLES.get(test, test).strip("*") if place == 0 else None}
                axis.errorbar(
                    mean, place + 0.25 * number, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, **look
                )
        labels = [f"{arm} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for arm, seeds in rows.items()]
        labels = [textwrap.fill(label, 48, break_on_hyphens=False) for label in labels]
        axis.set_yticks(np.arange(len(rows)) + 0.1, labels, fontsize=8)
        axis.set_ylim(len(rows) - 0.3, -0.5)
        axis.set_title(training, loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    axes[-1, 0].set_xlabel("gain over training from scratch (points of identity)")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def samples_of(row):
    """Millions of samples that pretraining, of one command, saw."""
    ((script, options),) = commands_of(row)
    defaults = importlib.import_module(script).Args
    batch, length = (
        int(options.get(name, getattr(defaults, name.replace("-", "_")))) for name in ("batch-size", "chunk-len")
    )
    return int(row["pretraining_steps"]) * batch * length / 1e6


def plot_lines(arms, out):
    """Draws identity against samples seen in pretraining, and against the share of labels, to the file `out`.

    An arm's identity is scratch's mean and its gain, so that arms with other seeds compare.
    """
    tests = tests_of(next(iter(arms.values()))[SCRATCH])
    data_of = defaultdict(dict, scratch={"": "-"})  # {script: {what it was pretrained on: line}}
    for row in (next(iter(seeds.values())) for found in arms.values() for seeds in found.values()):
        for script, options in commands_of(row):
            data_of[script].setdefault(options["data"], ("-", "--", ":")[min(len(data_of[script]), 2)])

    def draw(axis, script, data, places):
        colour, _, marker = LOOKS[script]
        differ = [word for word in data.split() if any(word not in other.split() for other in data_of[script])]
        label = ", ".join([NAMES[script], *differ])
        axis.plot(*zip(*sorted(places), strict=True), f"{marker}{data_of[script][data]}", color=colour, label=label)

    figure, axes = plt.subplots(2, len(tests), figsize=(8, 6.5), sharey="row", squeeze=False, layout="constrained")
    for (above, below), test in zip(axes.T, tests, strict=True):
        by_labels = defaultdict(list)
        for training, found in arms.items():
            base, points = mean_identity(found[SCRATCH], test), defaultdict(list)
            share = training_of(next(iter(found[SCRATCH].values())))[1]
            by_labels["scratch", ""].append((share, base))
            for seeds in compared(found).values():
                row = next(iter(seeds.values()))
                if len(commands_of(row)) == 1 and commands_of(row)[0][0] in LOOKS:
                    ((script, options),) = commands_of(row)
                    points[script, options["data"]].append(
                        (samples_of(row), base + gain(seeds, found[SCRATCH], test)[0])
                    )
            for of, places in points.items():
                draw(above, *of, [(0, base), *places])
                by_labels[of].append((share, max(places)[1]))
            above.annotate(training, (0, base), fontsize=8, xytext=(4, -12), textcoords="offset points")
        for of, places in by_labels.items():
            draw(below, *of, places)
        above.set_title(TITLES.get(test, test).strip("*"))
        above.margins(y=0.12)
        above.set_xlabel("samples seen in pretraining (millions)")
        below.set_xlabel("labelled reads (%)")
        below.set_xscale("log")
        shares = sorted({share for share, _ in by_labels["scratch", ""]})
        below.set_xticks(shares, [f"{share:g}" for share in shares])
        below.minorticks_off()
        for axis in (above, below):
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("mean identity (%)")
    handles = dict(zip(*axes[1, 0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(words):
    if len(words) != 1:
        sys.exit(__doc__)
    try:
        arms = read_arms(words[0])
        print("\n".join([*table(arms), "", *table_of_seeds(arms), "", *table_of_parts(arms)]))
        plot(arms, ROOT / "docs" / f"unseen_{words[0]}.png")
        plot_lines(arms, ROOT / "docs" / f"unseen_{words[0]}_lines.png")
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
