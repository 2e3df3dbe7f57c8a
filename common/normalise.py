"""From the sequencer's integers to picoamperes, and from those to med-mad units."""

import numpy as np

# The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_SD = 1.4826


def picoamperes(dacs, offset, scale):
    """Current in pA of raw samples `dacs` (L,) int16; `scale` is range / digitisation, in pA per unit.

    Oxford Nanopore's calibration: pA = (dacs + offset) * range / digitisation.
    """
    return (np.asarray(dacs, np.float64) + offset) * scale


def med_mad(current):
    """Shift and scale, both in pA, that normalise a read's `current` (L,): median and 1.4826 * median |x - median|."""
    shift = np.median(current)
    return float(shift), float(MAD_TO_SD * np.median(np.abs(current - shift)))
