"""Draw what evidence.py found, and print a Markdown table of it: identity by label fraction, and what pretraining adds.

python -m benchmark.plot_evidence real

reads benchmark/results/real.csv and draws docs/evidence_real.png. Gains are over the same seed. The table has all seeds
in order; in the picture each is a dot, and lines go through the means.

python -m benchmark.plot_evidence real simulated-new-head

prints the table with the gains over that arm, and draws nothing.
"""

import re
import sys
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

from benchmark.evidence import METHODS, ROOT, read_rows
from benchmark.plot_runs import COLOURS
from common import InputError

NAMES = {"scratch": "from scratch", "scratch-long": "from scratch, longer", "simulated": "simulated reads, labelled"}
NAMES |= {"cpc": "CPC", "simclr": "SimCLR", "moco": "MoCo", "simsiam": "SimSiam", "byol": "BYOL", "dino": "DINO"}
NAMES |= {"barlow": "Barlow Twins", "masked": "masked events", "simulated-new-head": "simulated, new head"}
NAMES |= {f"simulated+{method}": f"simulated, then {NAMES[method]}" for method in METHODS}
THESIS = {"cpc": 0.0, "moco": 0.1, "simsiam": 0.1, "dino": 0.1, "barlow": 0.3}  # points gained in 2021, with all labels
LOOKS = {"scratch": (COLOURS[6], "-", "s"), "scratch-long": (COLOURS[6], "--", "s"), "simulated": ("grey", ":", "s")}
LOOKS |= {
    method: (colour, "-", "o") for method, colour in zip(METHODS, [*COLOURS[:6], "#8C6D31", "#6F4FA8"], strict=True)
}
LOOKS |= {f"simulated+{method}": (LOOKS[method][0], ":", "^") for method in METHODS}
# what commands of fine-tuning may differ in; all else has to be equal
DIFFERS = r" --(label-fraction|seed|weights|steps|lr|pore-model-lr|batch-size) \S+| --new-head"


def read_identities(name):
    """{arm: {fraction: {seed: mean identity}}}, all in order. InputError if rows do not belong together."""
    rows = [row for row in read_rows(name).values() if row["split"] == "validation"]
    if not rows:
        raise InputError(f"benchmark/results/{name}.csv: no results; run benchmark/evidence.py --name {name} first")
    settings, found = {}, {}
    for row in sorted(rows, key=lambda row: (list(NAMES).index(row["arm"]), float(row["fraction"]), int(row["seed"]))):
        arm, fraction, seed = row["arm"], row["fraction"], row["seed"]
        for part, setting in {
            f"{arm}, {fraction}, {seed}": (row["pretrain_command"], row["finetune_command"]),
            f"pretraining of {arm}": re.sub(r" --seed \S+", "", row["pretrain_command"]),
            f"steps of {arm}": arm == "scratch-long" or row["finetuning_steps"],  # of which some seeds need more
            f"{fraction} of the labels": (row["lr"], row["validation_reads"], row["validation_chunks"]),
            "fine-tuning": re.sub(DIFFERS, "", row["finetune_command"]),
        }.items():
            if settings.setdefault(part, setting) != setting:
                raise InputError(
                    f"{name}: {arm}, {fraction} of the labels, seed {seed} does not compare with other results, by "
                    f"{part}: {setting} and {settings[part]}; remove the rows of one"
                )
        found.setdefault(arm, {}).setdefault(float(fraction), {})[int(seed)] = float(row["identity_mean"])
    return found


def gains(identities, over="scratch"):
    """{arm: {fraction: {seed: difference to arm `over`}}} of all other arms, for the seeds that both have."""
    found = {}
    for arm, fractions in identities.items():
        for fraction, seeds in fractions.items():
            baseline = identities.get(over, {}).get(fraction, {})
            both = {seed: seeds[seed] - baseline[seed] for seed in seeds if seed in baseline}
            if both and arm != over:
                found.setdefault(arm, {})[fraction] = both
    return found


def table(identities, over="scratch"):
    """A Markdown table: a row for each arm, and for each fraction the identity and the gain over the arm `over`."""
    places = sorted({(f, seed) for found in identities.values() for f in found for seed in found[f]})
    seeds = {fraction: [seed for f, seed in places if f == fraction] for fraction, _ in places}
    yield f"| | {' | '.join(f'{100 * fraction:g} % of labels | gain' for fraction in seeds)} |"
    yield "|---" * (2 * len(seeds) + 1) + "|"
    gained = gains(identities, over)
    for arm, found in identities.items():
        cells = []
        for fraction in seeds:
            values, more = found.get(fraction, {}), gained.get(arm, {}).get(fraction, {})
            cells.append(" ".join(f"{values[s]:.1f}" if s in values else "-" for s in seeds[fraction] if values))
            cells.append(" ".join(f"{more[s]:+z.1f}" if s in more else "-" for s in seeds[fraction] if more))
            cells[-1] += f", mean {mean(more.values()):+.2f}" if more else ""
        yield f"| {NAMES[arm]} | {' | '.join(cells)} |"


def plot(identities, out):
    """Draws identity, gains over scratch, and those of methods after simulated labels to the file `out`."""
    alone = {arm: found for arm, found in identities.items() if arm in LOOKS and "+" not in arm}
    after = {arm: found for arm, found in gains(identities, "simulated-new-head").items() if "+" in arm}
    parts = {"mean identity (%)": alone, "gain over scratch (points)\nhollow: the thesis, all labels": gains(alone)}
    if after:
        parts["gain of a method after simulated labels\nover the same start without it"] = after
    figure, axes = plt.subplots(1, len(parts), figsize=(4.7 * len(parts), 4.8), layout="constrained")
    axes[1].set_yscale("symlog", linthresh=1)  # failed runs lie far below, the differences of interest about 0
    for axis, (label, arms) in zip(axes, parts.items(), strict=True):
        axis.set_ylabel(label)
        _draw(axis, arms)
    for axis in axes[1:]:
        axis.axhline(0, color="black", linewidth=0.8)
    for place, (arm, points) in enumerate(THESIS.items()):
        if 1.0 in gains(alone).get(arm, {}):
            axes[1].plot(1.25 * 1.06**place, points, "D", color=LOOKS[arm][0], fillstyle="none")
    axes[1].yaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20]))
    axes[1].yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, handles=axes[0].get_legend_handles_labels()[0])
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _draw(axis, arms):
    """Each seed of {arm: {fraction: {seed: value}}} as a dot, and lines through the means."""
    for place, (arm, found) in enumerate(arms.items()):
        colour, style, marker = LOOKS[arm]
        x = [fraction * 1.035 ** (place - len(arms) / 2) for fraction in found]  # dots should not hide each other
        look = {"color": colour, "marker": marker, "ms": 3.5, "lw": 1}
        means = [mean(seeds.values()) for seeds in found.values()]
        axis.plot(x, means, linestyle=style, markevery=[], label=NAMES[arm], **look)
        for at, seeds in zip(x, found.values(), strict=True):
            axis.plot([at] * len(seeds), list(seeds.values()), linestyle="", **look)
    fractions = sorted({fraction for found in arms.values() for fraction in found})
    axis.set(xscale="log", xlabel="share of the labelled reads (%)")
    axis.xaxis.set_major_locator(FixedLocator(fractions))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels(f"{100 * fraction:g}" for fraction in fractions)
    axis.grid(alpha=0.3)


def main(words):
    if len(words) not in (1, 2):
        sys.exit(__doc__)
    try:
        identities = read_identities(words[0])
        if words[1:] and words[1] not in identities:
            raise InputError(f"{words[0]}: no results of {words[1]}, only of {', '.join(identities)}")
    except InputError as error:
        sys.exit(str(error))
    if not words[1:]:
        plot(identities, ROOT / "docs" / f"evidence_{words[0]}.png")
    print("\n".join(table(identities, *words[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
