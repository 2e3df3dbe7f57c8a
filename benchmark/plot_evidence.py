"""Draw what evidence.py found, and print a Markdown table of it: identity by label fraction, and what pretraining adds.

python -m benchmark.plot_evidence real

reads benchmark/results/real-*.csv and draws docs/evidence_real.png. Intervals are of 95 %, by Student's t over
three seeds or more; differences are taken seed by seed. In the picture each seed is a dot, lines go through the means,
and intervals that are wider than the dots lie apart are cut off.

python -m benchmark.plot_evidence real simulated

prints the table with the gains over that arm, and draws nothing.
"""

import math
import re
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

from benchmark.evidence import ARMS, KEY, METHODS, RECIPES, ROOT, read_rows
from benchmark.plot_runs import COLOURS
from common import InputError

STUDENT_T = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, of 2 to 9 degrees of freedom
NAMES = {
    "scratch": "from scratch",
    "scratch-long": "from scratch, longer",
    "simulated": "simulated reads, labelled",
    "simulated-new-head": "simulated, new head",
    "cpc": "CPC",
    "simclr": "SimCLR",
    "moco": "MoCo",
    "simsiam": "SimSiam",
    "byol": "BYOL",
    "dino": "DINO",
    "barlow": "Barlow Twins",
}
NAMES |= {f"simulated+{arm}": f"simulated, then {NAMES[arm]}" for arm in RECIPES}
# what commands of fine-tuning may differ in: the first three are in the table, the others by arm, or compared below
DIFFERS = r" --(label-fraction|seed|weights|steps|lr|pore-model-lr|batch-size) \S+| --new-head"
THESIS = {"cpc": 0.0, "moco": 0.1, "simsiam": 0.1, "dino": 0.1, "barlow": 0.3}  # points gained in 2021, with all labels
LOOKS = {arm: (colour, "-", "o") for arm, colour in zip(RECIPES, [*COLOURS[:6], "#8C6D31"], strict=True)}
LOOKS |= {"scratch": (COLOURS[6], "-", "s"), "scratch-long": (COLOURS[6], "--", "s"), "simulated": ("grey", ":", "s")}
LOOKS |= {f"simulated+{arm}": (LOOKS[arm][0], ":", "^") for arm in RECIPES}
CONTROL = "simulated-new-head"


def interval(values):
    """Mean of the values and half the width of its 95 % interval; nan for fewer than three."""
    if len(values) < 3:
        return statistics.mean(values), math.nan
    # beyond the table the last entry, which is a little too wide
    t = STUDENT_T[min(len(values) - 2, len(STUDENT_T)) - 1]
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def read_identities(name):
    """{arm: {fraction: {seed: mean identity}}}, arms in their order. InputError if rows do not belong together."""
    first, steps, found = {}, {}, {}
    rows = [row for row in read_rows(name) if row["split"] == "validation"]
    if not rows:
        raise InputError(f"benchmark/results/{name}-*.csv: no results; run benchmark/evidence.py --name {name} first")
    for row in rows:
        arm, fraction, seed = row["arm"], float(row["fraction"]), int(row["seed"])
        _compare(first.setdefault((arm, fraction, seed), row), row, KEY)
        row |= {"pretraining": re.sub(r" --seed \S+", "", row["pretrain_command"])}
        row |= {"fine-tuning": re.sub(DIFFERS, "", row["finetune_command"])}
        # one arm's lines and its scratch should differ in nothing but pretraining
        _compare(first.setdefault(arm, row), row, ("size", "pretraining_steps", "pretraining"))
        _compare(first.setdefault("all", row), row, ("fine-tuning",))
        # seeds have other reads, perhaps smaller batches, and scratch-long then more steps
        same_steps = (arm, fraction, seed if arm == "scratch-long" else None)
        _compare(steps.setdefault(same_steps, row), row, ("finetuning_steps",))
        _compare(first.setdefault(fraction, row), row, ("size", "lr", "validation_reads", "validation_chunks"))
        found.setdefault(arm, {}).setdefault(fraction, {})[seed] = float(row["identity_mean"])
    return {arm: dict(sorted(found[arm].items())) for arm in ARMS if arm in found}


def _compare(one, other, columns):
    for column in columns:
        if one[column] != other[column]:
            raise InputError(
                f"{other['name']}: results of {other['arm']}, {other['fraction']} of the labels, seed {other['seed']} "
                f"do not compare: {column} {one[column]!r} and {other[column]!r}; remove the rows of one"
            )


def gains(identities, over="scratch"):
    """{arm: {fraction: differences to arm `over` of the seeds that both have}} of all other arms."""
    baseline, found = identities.get(over, {}), {}
    for arm, fractions in identities.items():
        for fraction, seeds in fractions.items():
            both = sorted(seeds.keys() & baseline.get(fraction, {}).keys())
            if both and arm != over:
                found.setdefault(arm, {})[fraction] = [seeds[seed] - baseline[fraction][seed] for seed in both]
    return found


def percent(fraction):
    return f"{100 * fraction:g} %"


def table(identities, over="scratch"):
    """A Markdown table: a row for each arm, and for each fraction identity and gain over the arm `over`."""
    fractions = sorted({fraction for found in identities.values() for fraction in found})
    heads = [head for f in fractions for head in (f"{percent(f)} of labels", "gain", "seeds")]
    yield f"| | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    gained = gains(identities, over)
    for arm, found in identities.items():
        cells = []
        for fraction in fractions:
            values, more = list(found.get(fraction, {}).values()), gained.get(arm, {}).get(fraction)
            cells += [_words(values, "") if values else "", _words(more, "+") if more else "", str(len(values))]
        yield f"| {NAMES[arm]} | {' | '.join(cells)} |"


def _words(values, sign):
    mean, half = interval(values)
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def plot(identities, out):
    """Draws identity against label fraction and the gains over scratch to the file `out`.

    Those that go on from simulated labels, if any, have a part of their own: gains over the same start without them.
    """
    gained, after = gains(identities), gains(identities, CONTROL)
    after = {arm: found for arm, found in after.items() if "+" in arm}
    parts = 2 + bool(after)
    figure, (left, right, *last) = plt.subplots(1, parts, figsize=(4.7 * parts, 4.8), layout="constrained")
    left.set_ylabel("mean identity (%)")
    right.set_ylabel("gain over scratch (points of identity)\nhollow: the thesis, all labels")
    _draw(
        left, {arm: {f: list(s.values()) for f, s in identities[arm].items()} for arm in METHODS if arm in identities}
    )
    _draw(right, {arm: gained[arm] for arm in METHODS if arm in gained})
    for place, (arm, points) in enumerate(THESIS.items()):
        if 1.0 in gained.get(arm, {}):
            right.plot(1.25 * 1.06**place, points, "D", color=LOOKS[arm][0], fillstyle="none")
    low, high = (pick([x for found in gained.values() for s in found.values() for x in s] + [0]) for pick in (min, max))
    right.set_yscale("symlog", linthresh=1)  # failed runs lie far below, the differences of interest about 0
    right.set_yticks([-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20])
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylim(1.5 * min(low, -1), 1.5 * max(high, 1))
    for axis in last:
        axis.set_ylabel("gain of a method after simulated labels\nover the same start without it")
        _draw(axis, after)
    for axis in (right, *last):
        axis.axhline(0, color="black", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, handles=left.get_legend_handles_labels()[0])
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _draw(axis, arms):
    """Each seed of {arm: {fraction: values}} as a dot, lines through the means, and their intervals."""
    for place, (arm, found) in enumerate(arms.items()):
        colour, style, marker = LOOKS[arm]
        apart = 1.035 ** (place - (len(arms) - 1) / 2)  # so that bars do not hide each other
        x = [fraction * apart for fraction in found]
        means, halves = zip(*map(interval, found.values()), strict=True)
        halves = [0 if math.isnan(half) else half for half in halves]
        axis.errorbar(x, means, halves, color=colour, linestyle=style, lw=1, capsize=2, label=NAMES[arm])
        for at, values in zip(x, found.values(), strict=True):
            axis.plot([at] * len(values), values, marker, color=colour, ms=3.5)
    values = [x for found in arms.values() for some in found.values() for x in some] or [0]
    fractions = sorted({fraction for found in arms.values() for fraction in found})
    axis.set(xscale="log", xlabel="share of the labelled reads", ylim=(min(values) - 3, min(max(values) + 3, 100)))
    axis.xaxis.set_major_locator(FixedLocator(fractions))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels(map(percent, fractions))
    axis.grid(alpha=0.3)


def main(words):
    if len(words) not in (1, 2):
        sys.exit(__doc__)
    out = ROOT / "docs" / f"evidence_{words[0]}.png"
    try:
        identities = read_identities(words[0])
        if len(words) == 1:
            plot(identities, out)
        elif words[1] not in identities:
            raise InputError(f"{words[0]}: no results of {words[1]}, only of {', '.join(identities)}")
    except InputError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{out}: cannot be written ({error.strerror})")
    print("\n".join(table(identities, *words[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
