"""Picoamperes and med-mad units, by hand and against what was stored with real reads."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from common.normalise import med_mad, picoamperes

ECOLI = Path(__file__).parents[2] / "shared/data/ecoli_r94_mapped.hdf5"


def test_picoamperes_adds_the_offset_then_scales():
    np.testing.assert_array_equal(picoamperes(np.array([0, 10, -6], np.int16), 6, 0.5), [3.0, 8.0, 0.0])


def test_picoamperes_does_not_overflow_int16():
    dacs = np.array([32767, -32768], np.int16)
    found = picoamperes(dacs, np.int16(10), 2.0)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [65554.0, -65516.0])


@pytest.mark.parametrize(
    ("current", "shift", "mad"),
    [
        ([1, 2, 3, 4, 100], 3, 1),  # neither sees the outlier
        ([1, 2, 3, 10], 2.5, 1),  # an even number: deviations 1.5, 0.5, 0.5, 7.5
        ([-5.0, -5.0, -5.0], -5, 0),
    ],
)
def test_med_mad_by_hand(current, shift, mad):
    """The *median* absolute deviation (the mean one of the first case would be 20.2), times 1.4826."""
    assert med_mad(np.array(current)) == (shift, pytest.approx(1.4826 * mad))


def test_med_mad_of_counted_values_is_that_of_all_of_them():
    """To the last bit, also where the two in the middle differ and where values are missing."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        values = rng.normal(90, 12, rng.integers(1, 30))
        counts = rng.integers(0, 4, len(values)) + (len(values) == 1)
        if counts.any():
            current = rng.permutation(np.repeat(values, counts))
            shift = np.median(current)
            expected = shift, 1.4826 * np.median(np.abs(current - shift))
            assert med_mad(values, counts) == med_mad(current) == expected


def test_med_mad_of_normal_noise_is_its_mean_and_sd():
    current = np.random.default_rng(0).normal(90.0, 12.0, 100_000)
    assert med_mad(current) == pytest.approx((90.0, 12.0), abs=0.2)


def test_med_mad_of_real_reads_is_what_was_stored_with_them():
    if not ECOLI.exists():
        pytest.skip(f"{ECOLI} is not here: it holds the real reads this compares with")
    with h5py.File(ECOLI) as file:
        reads = file["Reads"]
        assert len(reads) == 92
        for read in reads.values():
            stored = read.attrs
            current = picoamperes(read["Dacs"][:], stored["offset"], stored["range"] / stored["digitisation"])
            expected = stored["shift_frompA"], stored["scale_frompA"]
            assert med_mad(current) == pytest.approx(expected, rel=1e-9), read.name
