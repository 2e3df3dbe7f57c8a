"""Picoamperes and med-mad units, by hand and against what was stored with real reads."""

import h5py
import numpy as np
import pytest

from common.reads.formats import RawRead, raw_reads
from common.reads.normalise import med_mad, normalised, picoamperes


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
    for _ in range(200):
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


@pytest.mark.parametrize("kind", ["i1", "u1", "<i2", ">i2", "u2", "i4", "i8", "u8"])
def test_normalising_by_value_is_normalising_by_sample(kind):
    """To the last bit, up to values as far apart as the type allows."""
    rng, info = np.random.default_rng(0), np.iinfo(kind)
    for length in (1, 2, 7, 1000, 1001):
        for low, high in ((0, 100), (info.min, info.min + 9), (info.max - 9, info.max), (info.min, info.max)):
            dacs = rng.integers(low, high, length, np.dtype(kind).newbyteorder("="), endpoint=True).astype(kind)
            found = normalised(RawRead("a", dacs, -3.5, 0.1755, 4000))
            current = (dacs.astype(float) - 3.5) * 0.1755
            shift = np.median(current)
            scale = 1.4826 * np.median(np.abs(current - shift))
            share = max((dacs == dacs.min()).mean(), (dacs == dacs.max()).mean())
            if dacs.min() == dacs.max():
                assert found == "constant"
            elif share > 0.1:
                assert found == "saturated"
            elif scale == 0:  # 64 bits are more than a float tells apart
                assert found == "constant" and dacs.itemsize == 8
            else:
                assert found[1:] == (shift, scale) and found[0].dtype == np.float16
                assert (found[0] == ((current - shift) / scale).astype(np.float16)).all()


def test_shift_and_scale_of_real_reads_are_what_was_stored_with_them(shared_data):
    path = shared_data / "ecoli_r94_mapped.hdf5"
    with h5py.File(path) as file:
        assert len(file["Reads"]) == 92
        for raw in raw_reads(path):
            stored, (_, *found) = file["Reads"][raw.id].attrs, normalised(raw)
            assert found == pytest.approx((stored["shift_frompA"], stored["scale_frompA"]), rel=1e-9), raw.id
