"""Pictures of reads: the current, and the bases at their places in it."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

LINE = 500  # samples a line, at most
POINTS = 600  # between the axes' sides, nearly: to tell how large a letter fits a cell
COLOURS = {"A": "#7CCB76", "C": "#7EB1EA", "G": "#F7C453", "T": "#F0847D"}  # the usual ones, pale behind the letters
INK, PALE = "#222222", "#BBBBBB"
LEVEL = {"color": "#D62728", "lw": 2}  # of a hidden event


def draw_read(current, first, rows, borders=()):
    """The figure of a stretch of a read: the current, and above it a band of cells, one a base, for each row.

    current: (samples,) normalised, of which the first is sample `first` of the read.
    rows: {name: (bases (B,) 1-4 = ACGT, starts (B + 1,) their first samples in the read, and the end of the last)}.
    borders: samples of the read at which a chunk begins.
    Long stretches go on in further lines. Thin lines show where the bases of the first row begin. A base of no samples
    is a short stroke above its band.
    """
    current = np.asarray(current, np.float32)
    end = first + len(current)
    lines = -(-len(current) // LINE)
    length = -(-len(current) // lines)
    low, high = current.min() - 0.2, current.max() + 0.2
    height = 0.11 * (high - low)  # of a band
    bottoms = {name: high + height * (0.2 + 1.5 * i) for i, name in enumerate(reversed(rows))}
    levels = [int(level) for level in MaxNLocator(5, integer=True).tick_values(low, high) if low < level < high]
    figure = Figure(figsize=(10, 0.5 + lines * (1.7 + 0.25 * len(rows))), layout="constrained")
    axes = figure.subplots(lines, squeeze=False)[:, 0]
    for axis, left in zip(axes, range(first, end, length), strict=True):
        right = min(left + length, end)
        axis.plot(range(left, right), current[left - first : right - first], ".-", color=INK, lw=0.7, markersize=2)
        if rows:
            starts = next(iter(rows.values()))[1]
            axis.vlines([start for start in starts if left <= start < right], low, high, color=PALE, lw=0.5, zorder=1)
        for name, (bases, starts) in rows.items():
            _draw_band(axis, bases, starts, (left, right), bottoms[name], height, POINTS / length)
        for border in borders:
            if left <= border < right:
                axis.axvline(border, color=INK, linestyle="--", linewidth=1)
                axis.text(border, 1.01, "chunk border", ha="center", fontsize=8, transform=axis.get_xaxis_transform())
        axis.set_yticks([*levels, *(bottom + height / 2 for bottom in bottoms.values())], [*map(str, levels), *bottoms])
        axis.set(xlim=(left, left + length), ylim=(low, high + height * (1.5 * len(rows) + 0.1)))
        axis.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes[-1].set_xlabel("sample of the read")
    figure.supylabel("current (med-mad units)", fontsize=10)
    return figure


def _draw_band(axis, bases, starts, span, bottom, height, points):
    """The cells of the bases within the samples `span`; `points` of text fit a sample."""
    for base, start, end in zip(bases, starts[:-1], starts[1:], strict=True):
        letter = "ACGT"[base - 1]
        left, right = max(start, span[0]), min(end, span[1])
        if left < right:
            cell = Rectangle((left, bottom), right - left, height, fc=COLOURS[letter], ec="white", linewidth=0.4)
            axis.add_patch(cell)
            size = min(9, 1.15 * (right - left) * points)
            # a base cut by the end of a line has its letter once; letters below 5 points are not legible
            if span[0] <= (start + end) // 2 < span[1] and size >= 5:
                place = (left + right) / 2, bottom + height / 2
                axis.text(*place, letter, size=size, color=INK, ha="center", va="center_baseline", clip_on=True)
        elif start == end and span[0] <= start < span[1]:
            axis.vlines(start, bottom + height, bottom + 1.3 * height, color=COLOURS[letter], lw=1.5)


def draw_events(signal, events, hidden, logits, edges, samples=1000):
    """The figure of the last chunk's first samples: its current and events, and what was predicted of the hidden ones.

    Of N chunks: signal (N, L); events, what masked.find_events() gives; which are hidden (N, S); logits (N, S, B) of
    the bins of level, between edges (B - 1,). A hidden event has its distribution as a column of shades, the likeliest
    level the darkest; its level is a red line, its current pale, since the model had noise there.
    """
    of_sample, start, length, level, hidden = (x[-1].cpu().numpy() for x in (*events, hidden))
    current, edges = signal[-1, :samples].cpu().numpy(), edges.cpu().numpy()
    low, high = min(current.min(), edges[0]) - 0.2, max(current.max(), edges[-1]) + 0.2
    heights = np.array([low, *edges, high])
    density = logits[-1].float().softmax(1).cpu().numpy() / np.diff(heights).clip(1e-6)
    unseen = hidden[of_sample[: len(current)]]
    lines = -(-len(current) // LINE)
    width = -(-len(current) // lines)
    figure = Figure(figsize=(10, 0.6 + 2.1 * lines), layout="constrained")
    axes = figure.subplots(lines, squeeze=False)[:, 0]
    for axis, first in zip(axes, range(0, len(current), width), strict=True):
        for colour, shown in ((PALE, current), (INK, np.where(unseen, np.nan, current))):
            axis.plot(shown, ".-", color=colour, lw=0.7, markersize=2)
        for event in np.flatnonzero((length > 0) & (start < first + width) & (start + length > first)):
            left, right = start[event] - 0.5, start[event] + length[event] - 0.5
            axis.axvline(right, color=PALE, lw=0.5, zorder=0)
            if hidden[event]:
                shades = (density[event] / density[event].max())[:, None]
                axis.pcolormesh([left, right], heights, shades, cmap="Blues", vmin=0, vmax=1, zorder=0)
            axis.hlines(level[event], left, right, **LEVEL if hidden[event] else {"color": INK, "lw": 0.7})
        axis.set(xlim=(first - 0.5, first + width - 0.5), ylim=(low, high))
    axes[-1].set_xlabel("sample of the chunk")
    figure.supylabel("current (med-mad units)", fontsize=10)
    figure.suptitle("hidden events: the level predicted (shades) and the level there was (red)", fontsize=10)
    return figure
