"""Simulated reads have the levels, dwell times and noise they are meant to have, and the file says what they are."""

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest

from common.reads import simulate
from common.reads.normalise import med_mad, picoamperes
from common.reads.simulate import TRINUCLEOTIDE_LEVELS, kmer_levels, simulate_read, simulated_file, write_simulated

TABLE = Path(__file__).parents[2] / "shared/data/r94_trinucleotide_levels.csv"
ROW = {"".join(letters): row for row, letters in enumerate(itertools.product("ACGT", repeat=3))}


def level(kmer):
    """The sum of four table entries, looked up by name."""
    return sum(TRINUCLEOTIDE_LEVELS[ROW[kmer[j : j + 3]], j] for j in range(4))


def read_all(path):
    """{id: (dacs, bases, starts, attributes)}"""
    with h5py.File(path) as file:
        return {
            name: (read["Dacs"][:], read["Reference"][:], read["Ref_to_signal"][:], dict(read.attrs))
            for name, read in file["Reads"].items()
        }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "reads.hdf5"
    write_simulated(path, 5, mean_bases=1500, seed=0)
    return path


@pytest.fixture(scope="module")
def long_read():
    """Bases, z-scored signal and starts of one read of 100 000 bases."""
    rng = np.random.default_rng(0)
    bases = rng.integers(0, 4, 100_000)
    return bases, *simulate_read(rng, bases)


# ------------------------------------------------------------------------------------------------ the pore


@pytest.mark.parametrize(
    ("kmer", "expected"),
    [
        ("AAAAAA", -0.278 - 0.264 - 0.012 + 0.256),
        ("TTTTTT", 0.210 + 0.095 + 0.026 - 0.372),
        ("ACGTTG", -0.200 - 0.411 - 0.698 - 0.317),  # ACG, CGT, GTT, TTG
    ],
)
def test_the_level_of_a_6mer_is_the_sum_of_its_four_entries(kmer, expected):
    assert kmer_levels(np.array(["ACGT".index(base) for base in kmer]))[2] == pytest.approx(expected)


def test_the_level_of_a_base_is_that_of_the_6mer_from_two_bases_before_it():
    bases = np.random.default_rng(1).integers(0, 4, 300)
    padded = "AA" + "".join("ACGT"[base] for base in bases) + "AAA"
    expected = [level(padded[i : i + 6]) for i in range(300)]
    np.testing.assert_allclose(kmer_levels(bases), expected, rtol=0, atol=1e-12)


def test_the_table_is_the_published_one():
    if not TABLE.exists():
        pytest.skip(f"{TABLE} is not here: it holds the 256 numbers this compares with")
    np.testing.assert_array_equal(TRINUCLEOTIDE_LEVELS, np.loadtxt(TABLE, delimiter=","))


def test_dwell_times_are_as_measured_on_real_reads(long_read):
    bases, signal, starts = long_read
    dwell = np.diff(starts)
    assert (len(dwell), starts[0], starts[-1]) == (len(bases), 0, len(signal))
    np.testing.assert_array_equal(np.percentile(dwell, [1, 5, 25, 50, 75, 95, 99]), [0, 1, 4, 7, 11, 21, 34])
    assert dwell.mean() == pytest.approx(8.8, abs=0.3)
    assert 60 < np.percentile(dwell, 99.9) < 85  # rare long stalls
    assert abs(np.corrcoef(dwell[1:], dwell[:-1])[0, 1]) < 0.02


def test_noise_within_a_base_is_white_with_sd_012(long_read):
    """From differences of neighbours, which need no estimate of the base's level."""
    _, signal, starts = long_read
    base_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    difference = np.diff(signal)
    within = base_of[1:] == base_of[:-1]
    assert (difference[within] ** 2).mean() == pytest.approx(2 * 0.12**2, rel=0.02)
    neighbours, next_but_one = within[1:] & within[:-1], within[2:] & within[1:-1] & within[:-2]
    assert (difference[1:] * difference[:-1])[neighbours].mean() == pytest.approx(-(0.12**2), rel=0.03)
    assert (difference[2:] * difference[:-2])[next_but_one].mean() == pytest.approx(0, abs=0.03 * 0.12**2)


def base_errors(bases, signal, starts):
    """Mean of each base's samples minus the level of its 6-mer, and the samples it has, where it has any."""
    dwell = np.diff(starts)
    sums = np.diff(np.concatenate([[0], signal.cumsum()])[starts])
    has = dwell > 0
    return sums[has] / dwell[has] - kmer_levels(bases)[has], dwell[has]


def test_levels_scatter_around_the_table_with_sd_018(long_read):
    errors, dwell = base_errors(*long_read)
    assert abs(errors.mean()) < 0.003
    assert (errors**2 - 0.12**2 / dwell).mean() == pytest.approx(0.18**2, rel=0.03)
    assert abs(np.corrcoef(errors[1:], errors[:-1])[0, 1]) < 0.02


def test_the_easy_pore_has_exact_levels_a_third_of_the_noise_and_6_to_12_samples_a_base():
    rng = np.random.default_rng(0)
    bases = rng.integers(0, 4, 10_000)
    signal, starts = simulate_read(rng, bases, easy=True)
    errors, dwell = base_errors(bases, signal, starts)
    assert len(dwell) == len(bases)
    assert set(dwell) == set(range(6, 13))
    assert np.sqrt((errors**2 * dwell).mean()) == pytest.approx(0.04, rel=0.04)
    assert (signal - np.repeat(kmer_levels(bases), dwell)).std() == pytest.approx(0.04, rel=0.02)


# ------------------------------------------------------------------------------------------------ the file


def test_the_file_is_mapped_signal_hdf5(path):
    reads = read_all(path)
    assert len(reads) == 5
    for name, (dacs, bases, starts, attributes) in reads.items():
        assert attributes["read_id"] == name
        assert dacs.dtype == np.int16
        assert set(bases) == {0, 1, 2, 3}
        assert len(bases) >= 1000
        assert len(starts) == len(bases) + 1
        assert (starts[0], starts[-1]) == (0, len(dacs))
        assert (np.diff(starts) >= 0).all()
        assert {"range", "offset", "digitisation", "shift_frompA", "scale_frompA"} <= attributes.keys()


def test_ref_to_signal_is_where_the_bases_are(path):
    """The signal follows the levels of the bases there, and not those of the bases next to them."""
    for dacs, bases, starts, _ in read_all(path).values():
        has = np.diff(starts) > 0
        levels = kmer_levels(bases)[has]
        means = np.add.reduceat(dacs.astype(float), starts[:-1][has]) / np.diff(starts)[has]
        assert np.corrcoef(means, levels)[0, 1] > 0.96
        assert max(np.corrcoef(means[1:], levels[:-1])[0, 1], np.corrcoef(means[:-1], levels[1:])[0, 1]) < 0.6


def test_shift_and_scale_are_those_of_the_stored_signal(path):
    """Within what rounding to integers of 0.18 pA does; and reads differ, as pores and channels do."""
    found = []
    for dacs, _, _, stored in read_all(path).values():
        step = stored["range"] / stored["digitisation"]
        shift, scale = med_mad(picoamperes(dacs, stored["offset"], step))
        assert stored["shift_frompA"] == pytest.approx(shift, abs=step)
        assert stored["scale_frompA"] == pytest.approx(scale, abs=1.5 * step)
        assert 60 < shift < 120
        assert 8 < scale < 20
        found.append((shift, scale))
    assert (np.ptp(found, axis=0) > (5, 0.5)).all()


def test_the_file_depends_on_its_arguments_alone(path, tmp_path):
    again, more, other = (tmp_path / name for name in ("again", "more", "other"))
    np.random.seed(1)  # noqa: NPY002  the global generator has no part in it
    write_simulated(again, 5, mean_bases=1500, seed=0)
    assert again.read_bytes() == path.read_bytes()
    reads = read_all(path)
    write_simulated(more, 6, mean_bases=1500, seed=0)
    found = read_all(more)
    assert len(found) == 6
    assert all(found[name][0].tobytes() == reads[name][0].tobytes() for name in reads)
    write_simulated(other, 5, mean_bases=1500, seed=1)
    found = read_all(other)
    assert not found.keys() & reads.keys()
    every = [read[0].tobytes() for read in (*found.values(), *reads.values())]
    assert len(set(every)) == 10


def test_mean_bases_is_the_mean_length(tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "simulate_read", lambda rng, bases, easy: (np.zeros(1), np.zeros(len(bases) + 1)))
    write_simulated(tmp_path / "reads", 400, mean_bases=5000)
    lengths = [len(bases) for _, bases, _, _ in read_all(tmp_path / "reads").values()]
    assert np.mean(lengths) == pytest.approx(5000, abs=4 * 2500 / 400**0.5)  # a gamma of shape 4: sd is half the mean


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    (tmp_path / "reads").write_text("earlier")
    monkeypatch.setattr(simulate, "simulate_read", fail)
    with pytest.raises(KeyboardInterrupt):
        write_simulated(tmp_path / "reads", 2)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("reads", "earlier")]


def test_the_reads_of_a_run_with_no_data_are_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(simulate, "write_simulated", lambda path, reads: made.append(reads) or path.touch())
    assert simulated_file(tmp_path) == simulated_file(tmp_path)
    assert simulated_file(tmp_path).parent == tmp_path
    assert made == [300]
