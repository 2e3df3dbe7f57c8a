"""From the sequencer's integers to picoamperes, and from those to med-mad units; which reads cannot be used."""

import numpy as np

# The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_SD = 1.4826
SATURATED = 0.1  # a read with more than this share of samples on its highest or its lowest value is left out


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


def normalised(raw):
    """The read's signal in med-mad units as float16, with shift and scale in pA; or the reason it cannot be used."""
    if len(raw.dacs) == 0:
        return "empty"
    if not (np.isfinite(raw.offset) and np.isfinite(raw.scale) and raw.scale > 0 and abs(raw.offset) < 2**32):
        return "no calibration"
    values, place, counts = _distinct(raw.dacs)
    current = picoamperes(values, raw.offset, raw.scale)  # all that is asked of a sample depends on its value alone
    shift, scale = med_mad(current, counts)
    if not (np.isfinite(shift) and np.isfinite(scale)):
        return "not finite"
    if len(values) == 1:
        return "constant"
    if max(counts[0], counts[-1]) / len(raw.dacs) > SATURATED:
        return "saturated"
    if scale == 0:
        return "constant"
    signal = ((current - shift) / scale).astype(np.float16)
    return (signal[place], shift, scale) if np.isfinite(signal).all() else "not finite"


def _distinct(dacs):
    """Values from the lowest to the highest of `dacs` (L,), each sample's place among them, how often each comes."""
    low, high = dacs.min(), dacs.max()
    if int(high) - int(low) >= 2**16:  # more than a sequencer's integers hold
        return np.unique(dacs, return_inverse=True, return_counts=True)
    place = np.subtract(dacs, low, dtype=np.uint16, casting="unsafe")  # modulo 2**16, and so never too large
    counts = np.bincount(place)
    return low + np.arange(len(counts)).astype(dacs.dtype), place, counts
