"""The read store (common/reads/store.py): what is kept and why the rest is not, as it was in the files; its cache."""

import json
import os
import shutil
import signal
from functools import partial

import h5py
import numpy as np
import pytest

from common import InputError
from common.chunks import open_data
from common.reads import formats, store
from common.reads.formats import is_store, raw_reads
from common.reads.store import ReadStore, prepare
from tests.test_formats import (
    DIGITISATION,
    OFFSET,
    RANGE,
    RATE,
    some_reads,
    wander,
    without_bases,
    write_fast5,
    write_mapped,
)


def normalised_by_hand(dacs):
    current = (dacs.astype(np.float64) + OFFSET) * RANGE / DIGITISATION
    median = np.quantile(current, 0.5)
    return (current - median) / (1.4826 * np.quantile(np.abs(current - median), 0.5))


def signals(store):
    """{id: signal} of a store."""
    return {r["id"].decode(): np.array(store.signal[r["start"] : r["start"] + r["length"]]) for r in store.reads}


def entries(folder):
    """What is in a folder besides the locks of make_once, which stay and are empty."""
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock" or path.stat().st_size)


# ------------------------------------------------------------------------------------------------------- read store


@pytest.mark.parametrize("columns", [10, 12])
def test_a_store_of_before_still_opens(few, tmp_path, columns):
    """Written before the table had identity and coverage, or what tells the chemistry."""
    shutil.copytree(few, tmp_path / "old")
    table = np.load(few / "reads.npy")
    assert table.dtype.names[10:] == ("identity", "coverage", "kit", "flow_cell", "rna")
    older, newer = list(table.dtype.names[:columns]), list(table.dtype.names[columns:])
    np.save(tmp_path / "old" / "reads.npy", table[older].astype(table.dtype.descr[:columns]))
    found = ReadStore(tmp_path / "old").reads
    assert (found[older] == table[older]).all() and not any(map(any, found[newer].tolist()))


def test_store_of_unlabelled_reads(tmp_path):
    reads = some_reads()
    write_fast5(tmp_path / "reads.fast5", reads)
    store = prepare([tmp_path / "reads.fast5"], tmp_path / "store")
    assert isinstance(store.signal, np.memmap) and store.signal.dtype == np.float16
    found = signals(store)
    assert found.keys() == reads.keys()
    for read_id, dacs in reads.items():
        np.testing.assert_allclose(found[read_id], normalised_by_hand(dacs), rtol=2**-11, atol=1e-6)
    current = (next(iter(reads.values())).astype(float) + OFFSET) * RANGE / DIGITISATION
    row = store.reads[store.reads["id"] == next(iter(reads)).encode()][0]
    assert row["shift"] == pytest.approx(np.median(current)) and row["sample_rate"] == RATE
    assert store.info["kept"] == {"unlabelled": 4} and not store.info["left_out"]
    assert store.info["samples_read"] == sum(map(len, reads.values()))


def test_store_of_labelled_reads_is_the_mapped_part(simulated, tmp_path):
    store = prepare([simulated], tmp_path / "store")
    found, calls = signals(store), {}
    for row in store.reads:
        span = slice(row["bases_start"], row["bases_start"] + row["bases_length"])
        calls[row["id"].decode()] = store.bases[span], store.base_starts[span]
    assert store.info["kept"] == {"labelled": 12}
    with h5py.File(simulated) as file:
        assert found.keys() == file["Reads"].keys()
        for read_id, read in file["Reads"].items():
            (bases, starts), mapped = calls[read_id], read["Ref_to_signal"][:]
            assert (bases == read["Reference"][:] + 1).all() and (starts == mapped[:-1] - mapped[0]).all()
            current = (read["Dacs"][:] + read.attrs["offset"]) * read.attrs["range"] / read.attrs["digitisation"]
            expected = (current - read.attrs["shift_frompA"]) / read.attrs["scale_frompA"]
            assert np.abs(found[read_id] - expected[mapped[0] : mapped[-1]]).max() < 0.02  # stored before rounding


def test_labelled_signal_is_normalised_over_the_whole_read_then_cut(tmp_path):
    dacs = wander(np.random.default_rng(0))
    dacs[2000:] += 100  # the unmapped end counts for median and spread
    write_mapped(tmp_path / "a.hdf5", {"a": dacs})
    store = prepare([tmp_path / "a.hdf5"], tmp_path / "store")
    np.testing.assert_allclose(store.signal, normalised_by_hand(dacs)[5:1005], rtol=2**-11, atol=1e-6)
    assert store.base_starts[:3].tolist() == [0, 10, 20]


def test_reads_left_out_are_counted_under_their_reason(tmp_path):
    rng = np.random.default_rng(0)
    clipped, stuck = wander(rng), wander(rng)
    clipped[:400], stuck[:1800] = 1023, 4095  # more than half of the second, so that its spread is 0
    reads = {"good": wander(rng), "flat": np.full(3000, 7, np.int16), "none": np.zeros(0, np.int16)}
    reads |= {"top": clipped, "stuck": stuck, "nan": wander(rng), "zero": wander(rng), "missing": wander(rng)}
    reads |= {name: wander(rng) for name in ("back", "odd", "long", "letters")} | {"short": wander(rng, 1040)}
    write_mapped(tmp_path / "a.hdf5", reads)
    write_mapped(tmp_path / "b.hdf5", {"good": reads["good"]})
    write_fast5(tmp_path / "c.fast5", {"plain": wander(rng)})
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        group = file["Reads"]
        without_bases(group["none"])
        del group["missing"].attrs["range"], group["odd/Reference"], group["short/Ref_to_signal"]
        group["nan"].attrs["offset"], group["zero"].attrs["digitisation"] = np.nan, 0.0
        group["back/Ref_to_signal"][50] = 0
        group["long/Ref_to_signal"][100] = 3001
        group["letters/Reference"][0] = 4
        group["odd/Reference"] = np.zeros(7, np.int16)
        group["short/Ref_to_signal"] = 5 + 5 * np.arange(101)
    paths = [tmp_path / name for name in ("a.hdf5", "b.hdf5", "c.fast5")]
    store = prepare(paths, tmp_path / "store", min_len=1000, labelled_only=True)
    assert store.info["kept"] == {"labelled": 1} and list(signals(store)) == ["good"]
    assert store.info["left_out"] == {
        "constant": 1,
        "no calibration": 3,
        "saturated": 2,
        "corrupt: Ref_to_signal goes backwards": 1,
        "corrupt: Ref_to_signal leaves the signal": 1,
        "corrupt: Ref_to_signal is not one longer than Reference": 1,
        "corrupt: Reference has values other than 0 to 3": 1,
        "shorter than 1000 samples": 1,
        "unlabelled": 2,  # the empty read has no bases either
        "read twice": 1,
    }
    without = prepare(paths, tmp_path / "all").info
    assert without["left_out"]["empty"] == 1 and without["kept"] == {"labelled": 2, "unlabelled": 1}


def test_a_read_with_and_without_bases_is_kept_as_both_and_only_a_true_copy_is_left_out(tmp_path):
    """Whichever file comes first, labels are not lost to an unlabelled copy of the read."""
    (tmp_path / "reads").mkdir()
    reads = some_reads()
    write_fast5(tmp_path / "reads/1.fast5", dict([*reads.items()][:1]))
    for name in ("2.hdf5", "3.hdf5"):
        write_mapped(tmp_path / "reads" / name, reads)
    info = prepare([tmp_path / "reads"], tmp_path / "store").info
    assert info["kept"] == {"unlabelled": 1, "labelled": 4} and info["left_out"] == {"read twice": 4}


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(simulated, tmp_path):
    """In a container every run may be process 1."""
    part = tmp_path / f"store.part-{os.getpid()}"
    part.mkdir()
    (part / "signal.npy").write_bytes(b"half")
    assert len(prepare([simulated], tmp_path / "store").reads) == 12 and not part.exists()


def test_a_store_that_lost_its_end_is_refused(simulated, tmp_path):
    prepare([simulated], tmp_path / "store")
    path = tmp_path / "store" / "signal.npy"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="store: not a whole read store"):
        ReadStore(tmp_path / "store")
    info = json.loads((tmp_path / "store/store.json").read_text())
    (tmp_path / "store/store.json").write_text(json.dumps(info | {"version": 0}))
    with pytest.raises(InputError, match="another version"):
        ReadStore(tmp_path / "store")


# ------------------------------------------------------------------------------------------------------------ cache


def test_raw_input_is_prepared_once_and_again_when_it_changes(simulated, tmp_path, cache, monkeypatch):
    path = tmp_path / "reads.hdf5"
    path.write_bytes(simulated.read_bytes())
    calls = []
    monkeypatch.setattr(store, "prepare", lambda *args: calls.append(args) or prepare(*args))
    first, second = open_data([path])[0], open_data([path])[0]
    assert len(calls) == 1 and first.path == second.path and entries(cache) == [first.path]
    with h5py.File(path, "r+") as file:
        file["Reads/simulated-1-0/Dacs"][0] += 1
    changed = open_data([path])[0]
    assert len(calls) == 2 and entries(cache) == sorted([first.path, changed.path])
    assert changed.signal[0] != first.signal[0] and (changed.signal[1:] == first.signal[1:]).all()


def test_what_was_prepared_with_other_columns_is_prepared_anew(simulated, cache, monkeypatch):
    store.open_stores([simulated])
    monkeypatch.setattr(store, "READ_DTYPE", np.dtype(store.READ_DTYPE.descr[:-1]))
    store.open_stores([simulated])
    assert len(entries(cache)) == 2


def test_a_store_is_opened_where_it_is(simulated, tmp_path, cache):
    store = prepare([simulated], tmp_path / "store")
    (opened,) = open_data([tmp_path / "store"])
    assert opened.path == store.path and (opened.signal == store.signal).all() and not cache.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_an_interrupted_preparation_leaves_nothing(simulated, cache, monkeypatch, error):
    def broken(path):
        reads = raw_reads(path)
        yield next(reads)
        raise error

    monkeypatch.setattr(formats, "raw_reads", broken)
    with pytest.raises(InputError if isinstance(error, OSError) else error):
        open_data([simulated])
    assert entries(cache) == []


def prepare_until_killed(path):
    def dies(path):
        yield next(raw_reads(path))
        os.kill(os.getpid(), signal.SIGKILL)

    formats.raw_reads = dies
    open_data([path])


def test_a_killed_preparation_leaves_no_entry(child, simulated, cache):
    assert child(partial(prepare_until_killed, simulated)) == (-signal.SIGKILL, [])
    assert list(cache.glob("*.part-*")) and not any(is_store(folder) for folder in cache.iterdir())
    (whole,) = open_data([simulated])
    assert len(whole.reads) == 12 and entries(cache) == [whole.path]  # and what was left is gone
