"""From the sequencer's integers to picoamperes, and from those to med-mad units."""

import numpy as np

# The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_SD = 1.4826


def picoamperes(dacs, offset, scale):
    """Current in pA of raw samples `dacs` (L,) int16; `scale` is range / digitisation, in pA per unit.

    Oxford Nanopore's calibration: pA = (dacs + offset) * range / digitisation.
    """
    return (np.asarray(dacs, np.float64) + offset) * scale


def med_mad(current, counts=None):
    """Shift and scale, both in pA, that normalise a read's `current` (L,): median and 1.4826 * median |x - median|.

    counts (L,): how often each value of `current` comes; once each, if not given.
    """
    counts = np.ones(len(current), int) if counts is None else counts
    shift = _median(current, counts)
    return float(shift), float(MAD_TO_SD * _median(np.abs(current - shift), counts))


def _median(values, counts):
    """np.median of `values` (L,), of which each comes `counts` times."""
    order = np.argsort(values)
    up_to = counts[order].cumsum()
    middle = np.arange((up_to[-1] - 1) // 2, up_to[-1] // 2 + 1)  # one place, or two
    return values[order[np.searchsorted(up_to, middle, side="right")]].mean()
