"""Draw what each augmentation of common/augment.py does to a simulated chunk: the pictures of docs/augmentations.md.

python -m benchmark.draw_augmentations

Writes one PNG each to docs/augmentations: the chunk's current above, the augmented below, on the same axes. The chunks
have 300 or 600 samples, not the 3600 of the scripts, so that the levels of single bases can be seen.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from common import augment
from common.reads.normalise import med_mad
from common.reads.simulate import simulate_read

SEED = 101  # gives a crop, a shuffle and two views that show well
AUGMENTATIONS = {
    "drop-point": augment.drop_points,
    "view": lambda signal, lengths: augment.drop_points(*augment.noise(signal, lengths)),
}  # the others are called as their functions are
TITLES = {  # of the chunk and of the augmented; {} is the number of samples left
    "noise": ("the chunk", "noise of standard deviation 0.25 added; thin: the chunk"),
    "drop-point": ("the chunk, 300 samples; dots: to be dropped", "drop-point: the {} left, moved together"),
    "view": ("the chunk, 600 samples", "view 1, noise then drop-point: {} samples", "view 2: {} samples"),
    "shuffle": ("the chunk, its eighths numbered", "shuffle: in a random order"),
    "moving-average": ("the chunk", "moving-average: means of 7 samples; thin: the chunk"),
    "random-crop": ("the chunk; shaded: the part that is kept", "random-crop: stretched to the chunk's length"),
    "flip-time": ("the chunk; shaded: its first quarter", "flip-time: end to end"),
    "flip-current": ("the chunk", "flip-current: the sign changed"),
    "gain-offset": ("the chunk", "gain-offset: scaled and moved; thin: the chunk"),
    "time-warp": ("the chunk, its eighths numbered", "time-warp: each 32 samples at a speed of their own"),
    "mask-spans": ("the chunk", "mask-spans: spans of 40 samples set to 0"),
}
BEFORE, AFTER, MARK, GREY = "#444444", "#0072B2", "#D55E00", "#666666"
EIGHTHS = plt.get_cmap("viridis")(np.linspace(0, 0.75, 8))


def simulated_chunk(samples):
    """Normalised current (samples,) from within a read of the standard pore."""
    rng = np.random.default_rng(0)
    signal, _ = simulate_read(rng, rng.integers(0, 4, 2000))
    shift, scale = med_mad(signal)
    return torch.tensor((signal - shift) / scale, dtype=torch.float32)[2000 : 2000 + samples]


def augmented(name, signal, seed=SEED):
    """The augmented signal, without padding: of 16 equal rows the first that changed, since flips leave half alone."""
    torch.manual_seed(seed)
    rows = signal.repeat(16, 1)
    augmentation = AUGMENTATIONS.get(name) or getattr(augment, name.replace("-", "_"))
    out, lengths, *_ = augmentation(rows, torch.full((16,), len(signal)))
    row = (out != rows[:, : out.shape[1]]).any(1).int().argmax()
    return out[row, : lengths[row]]


def draw(name):
    """The figure of one augmentation."""
    n = 300 if name in ("noise", "drop-point", "moving-average") else 600
    chunk, count = simulated_chunk(n), len(TITLES[name])
    currents = [chunk] + [augmented(name, chunk, SEED + k) for k in range(count - 1)]
    source = augmented(name, torch.arange(float(n)))  # from where in the chunk the augmented samples are
    figure, axes = plt.subplots(count, figsize=(8, 0.5 + 1.5 * count), sharex=True, sharey=True, layout="constrained")
    for axis, current, title in zip(axes, currents, TITLES[name], strict=True):
        axis.plot(current, color=BEFORE if current is chunk else AFTER, linewidth=1)
        if "thin" in title:
            axis.plot(chunk, color=BEFORE, linewidth=0.6)
        if len(current) < n:
            axis.plot([len(current), n - 1], [0, 0], ":", color=GREY)
            axis.text((len(current) + n) / 2, 0.35, "padding: zeros", ha="center", color=GREY)
        axis.set_title(title.format(len(current)), loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="sample", xlim=(-1, n), ylim=(-2.8, 3.3))
    figure.supylabel("normalised current", fontsize=10)

    shaded = {"random-crop": [(source[0], source[-1])], "flip-time": [(0, n / 4), (n * 3 / 4, n)]}
    for axis, span in zip(axes, shaded.get(name, []), strict=False):
        axis.axvspan(*span, color=MARK, alpha=0.15, linewidth=0)
    if name == "drop-point":
        dropped = np.setdiff1d(np.arange(n), source.int())
        axes[0].plot(dropped, chunk[dropped], "o", color=MARK, markersize=3)
    if "numbered" in TITLES[name][0]:
        for number in range(8):
            for axis, current, places in zip(axes, currents, (np.arange(n), source), strict=True):
                eighth = np.flatnonzero(places * 8 // n == number)
                axis.plot(eighth, current[eighth], color=EIGHTHS[number])
                axis.text(eighth.mean(), 2.45, number + 1, ha="center", color=EIGHTHS[number])
    return figure


if __name__ == "__main__":
    for name in TITLES:
        draw(name).savefig(Path("docs/augmentations") / f"{name}.png", dpi=100)
