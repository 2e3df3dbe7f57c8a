"""Reading, the read store and its cache, chunks and batches (common/data.py)."""

import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pod5
import pytest
import torch

from common import InputError, data
from common.data import Chunks, ReadStore, StoreWriter, ctc_steps_needed, open_data, prepare, raw_reads

PROJECT = Path(__file__).parents[1]
RANGE, OFFSET, DIGITISATION, RATE = 1444.86, 6.0, 8192.0, 4000


def wander(rng, samples=3000):
    """int16 signal with many values, no two of them too frequent."""
    return np.clip(500 + 90 * rng.standard_normal(samples), 0, 1000).astype(np.int16)


def some_reads(number=4, seed=0):
    rng = np.random.default_rng(seed)
    return {str(uuid.UUID(bytes=rng.bytes(16))): wander(rng, 2000 + 300 * i) for i in range(number)}


def normalised_by_hand(dacs):
    current = (dacs.astype(np.float64) + OFFSET) * RANGE / DIGITISATION
    median = np.quantile(current, 0.5)
    return (current - median) / (1.4826 * np.quantile(np.abs(current - median), 0.5))


def write_mapped(path, reads, bases=100, **attributes):
    """Mapped-signal HDF5 of {id: dacs}: base i starts at sample 5 + 10 i."""
    calibration = {"range": RANGE, "offset": OFFSET, "digitisation": DIGITISATION} | attributes
    with h5py.File(path, "w") as file:
        for read_id, dacs in reads.items():
            group = file.create_group(f"Reads/{read_id}")
            group["Dacs"], group["Reference"] = dacs, np.arange(bases, dtype=np.int16) % 4
            group["Ref_to_signal"] = 5 + 10 * np.arange(bases + 1, dtype=np.int32)
            group.attrs.update(calibration)


def write_fast5(path, reads, single=False):
    channel = {"range": RANGE, "offset": OFFSET, "digitisation": DIGITISATION, "sampling_rate": RATE}
    with h5py.File(path, "w") as file:
        for read_id, dacs in reads.items():
            raw = file.create_group("Raw/Reads/Read_7" if single else f"read_{read_id}/Raw")
            raw.create_dataset("Signal", data=dacs, compression="gzip")
            raw.attrs["read_id"] = np.bytes_(read_id)
            file.create_group("UniqueGlobalKey/channel_id" if single else f"read_{read_id}/channel_id").attrs.update(
                channel
            )


def write_pod5(path, reads):
    names = ["acquisition_id", "experiment_name", "flow_cell_id", "flow_cell_product_code", "protocol_name"]
    names += ["protocol_run_id", "sample_id", "sequencing_kit", "sequencer_position", "sequencer_position_type"]
    names += ["software", "system_name", "system_type"]
    times = dict.fromkeys(["acquisition_start_time", "protocol_start_time"], datetime(2020, 1, 1, tzinfo=UTC))
    run = dict.fromkeys(names, "test") | times | {"context_tags": {}, "tracking_id": {}}
    run = pod5.RunInfo(**run, adc_min=-4096, adc_max=4095, sample_rate=RATE)
    with pod5.Writer(path) as writer:
        for number, (read_id, dacs) in enumerate(reads.items()):
            writer.add_read(
                pod5.Read(
                    uuid.UUID(read_id), pod5.Pore(1, 1, "r9"), pod5.Calibration(OFFSET, RANGE / DIGITISATION), number,
                    0, 0.0, pod5.EndReason(pod5.EndReasonEnum.SIGNAL_POSITIVE, False), run, signal=dacs,
                )
            )  # fmt: skip


def write_bonito(path, chunks, references):
    path.mkdir(parents=True)
    lengths = np.array([len(reference) for reference in references], np.uint16)
    padded = np.zeros((len(references), max(lengths)), np.uint8)
    for row, reference in zip(padded, references, strict=True):
        row[: len(reference)] = reference
    for name, array in (("chunks", chunks), ("references", padded), ("reference_lengths", lengths)):
        np.save(path / f"{name}.npy", array)


def picoampere_reads(path):
    return {raw.id: (raw.dacs.astype(np.float64) + raw.offset) * raw.scale for raw in raw_reads(path)}


def signals(store):
    """{id: signal} of a store."""
    return {r["id"].decode(): np.array(store.signal[r["start"] : r["start"] + r["length"]]) for r in store.reads}


# ---------------------------------------------------------------------------------------------------------- reading


def test_fast5_and_pod5_of_the_same_reads_agree(shared_data):
    fast5 = picoampere_reads(shared_data / "formats/multi_read_gzip.fast5")
    from_pod5 = picoampere_reads(shared_data / "formats/same_reads_as_multi_read_gzip.pod5")
    assert len(fast5) == 10 and fast5.keys() == from_pod5.keys()
    for read_id, current in fast5.items():
        np.testing.assert_allclose(from_pod5[read_id], current, rtol=1e-6)


@pytest.mark.parametrize("name", ["single_read_gzip.fast5", "single_read_vbz_rna.fast5"])
def test_single_read_files_open(shared_data, name):
    (raw,) = raw_reads(shared_data / "formats" / name)
    current = (raw.dacs + raw.offset) * raw.scale
    assert len(raw.dacs) > 10_000 and raw.sample_rate in (3012, 4000) and raw.bases is None
    assert 40 < np.median(current) < 150  # pA, what a pore passes


def test_stored_shift_and_scale_of_mapped_reads(shared_data):
    path = shared_data / "ecoli_r94_mapped.hdf5"
    raws = [raw for raw, _ in zip(raw_reads(path), range(10), strict=False)]
    with h5py.File(path) as file:
        for raw in raws:
            _, shift, scale = data.normalised(raw)
            stored = file["Reads"][raw.id].attrs
            assert (shift, scale) == pytest.approx((stored["shift_frompA"], stored["scale_frompA"]), rel=1e-6)


@pytest.mark.parametrize("kind", ["i1", "u1", "<i2", ">i2", "u2", "i4", "i8", "u8"])
def test_normalising_by_value_is_normalising_by_sample(kind):
    """To the last bit, up to values as far apart as the type allows."""
    rng, info = np.random.default_rng(0), np.iinfo(kind)
    for length in (1, 2, 7, 1000, 1001):
        for low, high in ((0, 100), (info.min, info.min + 9), (info.max - 9, info.max), (info.min, info.max)):
            dacs = rng.integers(low, high, length, np.dtype(kind).newbyteorder("="), endpoint=True).astype(kind)
            found = data.normalised(data.RawRead("a", dacs, -3.5, 0.1755, RATE))
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


def test_without_the_vbz_plugin_the_error_says_what_to_install(shared_data, tmp_path):
    (tmp_path / "vbz_h5py_plugin.py").write_text("raise ImportError('not installed')")
    path = shared_data / "formats/single_read_vbz_rna.fast5"
    code = f"import pathlib; from common.data import raw_reads; list(raw_reads(pathlib.Path({str(path)!r})))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{PROJECT}"}
    environment.pop("HDF5_PLUGIN_PATH", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and "InputError" in last
    assert str(path) in last and "pip install vbz-h5py-plugin" in last


@pytest.mark.parametrize("kind", ["mapped.hdf5", "multi.fast5", "single.fast5", "reads.pod5"])
def test_reads_come_back_as_written(tmp_path, kind):
    path, reads = tmp_path / kind, some_reads(1 if kind.startswith("single") else 4)
    if kind.endswith("pod5"):
        write_pod5(path, reads)
    elif kind.endswith("fast5"):
        write_fast5(path, reads, single=kind.startswith("single"))
    else:
        write_mapped(path, reads, sample_rate=RATE)
    raws = {raw.id: raw for raw in raw_reads(path)}
    assert raws.keys() == reads.keys()
    for read_id, raw in raws.items():
        assert raw.dacs.dtype == np.int16 and (raw.dacs == reads[read_id]).all()
        assert (raw.offset, raw.scale) == pytest.approx((OFFSET, RANGE / DIGITISATION))
        assert raw.sample_rate == RATE
        if kind == "mapped.hdf5":
            assert raw.bases.tolist() == [1, 2, 3, 4] * 25
            assert raw.base_starts.tolist() == list(range(5, 1006, 10))
        else:
            assert raw.bases is None


# ------------------------------------------------------------------------------------------------------- read store


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
    clipped = wander(rng)
    clipped[:400] = 1023
    reads = {"good": wander(rng), "flat": np.full(3000, 7, np.int16), "none": np.zeros(0, np.int16), "top": clipped}
    reads |= {"nan": wander(rng), "zero": wander(rng), "missing": wander(rng), "back": wander(rng), "odd": wander(rng)}
    reads |= {"long": wander(rng), "letters": wander(rng), "short": wander(rng, 1040)}
    write_mapped(tmp_path / "a.hdf5", reads)
    write_mapped(tmp_path / "b.hdf5", {"good": reads["good"]})
    write_fast5(tmp_path / "c.fast5", {"plain": wander(rng)})
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        group = file["Reads"]
        del group["none/Ref_to_signal"], group["none/Reference"], group["missing"].attrs["range"]
        group["none/Reference"], group["none/Ref_to_signal"] = np.zeros(0, np.int16), np.zeros(1, np.int32)
        group["nan"].attrs["offset"], group["zero"].attrs["digitisation"] = np.nan, 0.0
        group["back/Ref_to_signal"][50] = 0
        group["long/Ref_to_signal"][100] = 3001
        group["letters/Reference"][0] = 4
        del group["odd/Reference"]
        group["odd/Reference"] = np.zeros(7, np.int16)
        del group["short/Ref_to_signal"]
        group["short/Ref_to_signal"] = 5 + 5 * np.arange(101)
    paths = [tmp_path / name for name in ("a.hdf5", "b.hdf5", "c.fast5")]
    store = prepare(paths, tmp_path / "store", min_len=1000, labelled_only=True)
    assert store.info["kept"] == {"labelled": 1} and list(signals(store)) == ["good"]
    assert store.info["left_out"] == {
        "constant": 1,
        "no calibration": 3,
        "saturated": 1,
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


def test_a_read_stuck_at_the_top_is_saturated(tmp_path):
    """Also where more than half of it is, so that its spread is 0."""
    dacs = wander(np.random.default_rng(0))
    dacs[:1800] = 4095
    write_mapped(tmp_path / "a.hdf5", {"good": wander(np.random.default_rng(1)), "stuck": dacs})
    left_out = prepare([tmp_path / "a.hdf5"], tmp_path / "store").info["left_out"]
    assert left_out == {"saturated": 1}


def test_bonito_arrays_without_validation_are_split_by_chunk_number(tmp_path):
    """Whatever the folder is called: also a name that is long, or not ASCII."""
    rng = np.random.default_rng(0)
    folder = tmp_path / ("données-" * 8)
    write_bonito(folder, rng.standard_normal((200, 50)).astype(np.float16), [rng.integers(1, 5, 4)] * 200)
    stores = open_data([folder])
    training, validation = (Chunks(stores, 50, split, labelled=True) for split in ("training", "validation"))
    assert len(training) + len(validation) == 200 and 5 < len(validation) < 40
    with pytest.raises(InputError, match="--chunk-len 50"):
        Chunks(stores, 40, "training", labelled=True)


# ------------------------------------------------------------------------------------------------------------ cache


def test_raw_input_is_prepared_once_and_again_when_it_changes(simulated, tmp_path, cache, monkeypatch):
    path = tmp_path / "reads.hdf5"
    path.write_bytes(simulated.read_bytes())
    calls = []
    monkeypatch.setattr(data, "prepare", lambda *args: calls.append(args) or prepare(*args))
    first, second = open_data([path])[0], open_data([path])[0]
    assert len(calls) == 1 and first.path == second.path and list(cache.iterdir()) == [first.path]
    with h5py.File(path, "r+") as file:
        file["Reads/simulated-1-0/Dacs"][0] += 1
    changed = open_data([path])[0]
    assert len(calls) == 2 and sorted(cache.iterdir()) == sorted([first.path, changed.path])
    assert changed.signal[0] != first.signal[0] and (changed.signal[1:] == first.signal[1:]).all()


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

    monkeypatch.setattr(data, "raw_reads", broken)
    with pytest.raises(InputError if isinstance(error, OSError) else error):
        open_data([simulated])
    assert list(cache.iterdir()) == []


def test_a_killed_preparation_leaves_no_entry(simulated, cache):
    code = f"""
import os, signal
from pathlib import Path
from common import data
whole = data.raw_reads
def dies(path):
    yield next(whole(path))
    os.kill(os.getpid(), signal.SIGKILL)
data.raw_reads = dies
data.open_data([Path({str(simulated)!r})])
"""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL and list(cache.glob("*.part-*"))
    assert not any(data.is_store(folder) for folder in cache.iterdir())
    (store,) = open_data([simulated])
    assert len(store.reads) == 12


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


# ----------------------------------------------------------------------------------------------------------- chunks

LENGTHS = [100, 205, 330, 90, 1000, 415]  # of the reads of coded_store; chunks of 100: 1 2 3 0 10 4, 20 in all


def coded_store(folder, lengths=LENGTHS, split=0, prefix="read"):
    """A store whose every sample tells where it is from: even ones -(read + 1), odd ones their position // 2."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    store = StoreWriter(folder)
    for read, length in enumerate(lengths):
        signal = np.arange(length) // 2
        signal[::2] = -(read + 1)
        starts = np.sort(rng.integers(0, length, length // 8))  # some equal: bases the strand passed in no time
        store.add(f"{prefix}-{read}", signal, rng.integers(1, 5, len(starts)), starts, split=split)
    store.close()
    return ReadStore(folder)


def locate(row):
    """Read and position that a chunk of a coded_store starts at; fails if it is no piece of that read."""
    row = row.numpy()
    first_odd = int(row[0] < 0)
    read, start = int(-row[1 - first_odd] - 1), int(2 * row[first_odd] + 1 - first_odd)
    positions = start + np.arange(len(row))
    assert (row == np.where(positions % 2 == 0, -(read + 1), positions // 2)).all()
    return read, start


@pytest.fixture
def coded(tmp_path):
    return coded_store(tmp_path / "coded")


def batches(chunks, steps, seed=0, batch_size=5):
    return [chunks.batch(seed, step, batch_size) for step in steps]


def test_a_batch_depends_on_seed_and_step_alone(coded):
    chunks = Chunks([coded], 100, "training", labelled=True)
    in_order = batches(chunks, range(12))
    again = batches(Chunks([coded], 100, "training", labelled=True), reversed(range(12)))[::-1]
    for one, other in zip(in_order, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one[:4], other[:4], strict=True)) and one.reads == other.reads
    for step, batch in enumerate(in_order):  # one seed after the other changes nothing, either
        chunks.batch(1, step, 5)
        assert torch.equal(chunks.batch(0, step, 5).signal, batch.signal)


def test_another_seed_has_another_order_of_reads_and_other_offsets(coded):
    chunks = Chunks([coded], 100, "training")
    places = []
    for seed in (0, 1):
        rows = [row for batch in batches(chunks, range(8), seed) for row in batch.signal]
        places.append([locate(row) for row in rows])
    assert [read for read, _ in places[0]] != [read for read, _ in places[1]]
    assert len(set(places[0]) & set(places[1])) < 10  # of 40; the read of one tile has one place


def test_an_epoch_takes_from_each_read_as_many_chunks_as_it_has_tiles(coded):
    chunks = Chunks([coded], 100, "training")
    assert len(chunks) == 20 and chunks.number_of_reads == 5 and chunks.too_short == 1
    for epoch in range(3):
        rows = [row for batch in batches(chunks, range(4 * epoch, 4 * epoch + 4)) for row in batch.signal]
        assert Counter(locate(row)[0] for row in rows) == {0: 1, 1: 2, 2: 3, 4: 10, 5: 4}
    assert batches(chunks, [0])[0].targets is None


def test_a_chunk_starts_anywhere_in_its_read_anew_each_epoch(tmp_path):
    chunks = Chunks([coded_store(tmp_path / "one", [116])], 100, "training")
    starts = [locate(chunks.batch(0, step, 1).signal[0])[1] for step in range(1000)]
    assert set(starts) == set(range(17))
    assert max(Counter(starts).values()) < 100  # 59 expected of each, standard deviation 7.4
    assert starts[:50] != starts[50:100]


def test_the_bases_of_a_chunk_are_those_that_start_in_it(coded):
    chunks = Chunks([coded], 100, "training", labelled=True)
    rows = 0
    for batch in [*batches(chunks, range(40)), *chunks.tiles(7)]:
        for signal_, targets, length in zip(batch.signal, batch.targets, batch.target_lengths, strict=True):
            read, first = locate(signal_)
            row, expected = coded.reads[read], []
            for i in range(row["bases_start"], row["bases_start"] + row["bases_length"]):
                if first <= coded.base_starts[i] < first + 100:
                    expected.append(coded.bases[i])
            assert targets[:length].tolist() == expected and not targets[length:].any()
            rows += 1
        assert batch.signal.shape == (len(batch.lengths), 100) and (batch.lengths == 100).all()
    assert rows == 40 * 5 + 20


def test_validation_tiles_each_read_once_without_overlap(tmp_path):
    store = coded_store(tmp_path / "store", split=1)
    chunks = Chunks([store], 100, "validation")
    found = [locate(row) for batch in chunks.tiles(3) for row in batch.signal]
    assert found == [(read, 100 * i) for read, length in enumerate(LENGTHS) for i in range(length // 100)]
    with pytest.raises(InputError, match="no training read of at least 100 samples"):
        Chunks([store], 100, "training")


def in_each_process(monkeypatch, number, work):
    """What work() gives in each of `number` processes of torchrun."""
    results = []
    for rank in range(number):
        with monkeypatch.context() as patch:
            for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "WORLD_SIZE": number}.items():
                patch.setenv(name, str(value))
            results.append(work())
    return results


@pytest.mark.parametrize("number", [2, 3, 4])
def test_processes_have_equal_parts_of_each_batch_and_the_names_of_all_its_reads(coded, monkeypatch, number):
    chunks = Chunks([coded], 100, "training", labelled=True)
    whole = batches(chunks, range(3), batch_size=12)
    parts = in_each_process(monkeypatch, number, lambda: batches(chunks, range(3), batch_size=12))
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert {len(share.signal) for share in shares} == {12 // number}
        assert torch.equal(torch.cat([share.signal for share in shares]), batch.signal)
        assert torch.equal(torch.cat([share.target_lengths for share in shares]), batch.target_lengths)
        assert {share.reads for share in shares} == {batch.reads}
    assert in_each_process(monkeypatch, number, lambda: chunks.steps_per_epoch(12)) == [1] * number
    with pytest.raises(InputError, match=rf"--batch-size 13: cannot be split equally among {number} processes"):
        in_each_process(monkeypatch, number, lambda: chunks.steps_per_epoch(13))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_processes_validate_each_tile_once_or_equally_many(coded, monkeypatch, number):
    chunks = Chunks([coded], 100, "training")  # 20 tiles
    tiles = [locate(row) for batch in chunks.tiles(20) for row in batch.signal]
    for equal, size in ((False, 12), (True, 12), (False, 24), (True, 24)):
        parts = in_each_process(monkeypatch, number, lambda size=size, equal=equal: list(chunks.tiles(size, equal)))
        found = [locate(row) for part in parts for batch in part for row in batch.signal]
        expected = tiles if not equal else tiles[:12] if size == 12 else tiles[: 20 // number * number]
        assert sorted(found) == sorted(expected)
        if equal:
            assert len({tuple(len(batch.signal) for batch in part) for part in parts}) == 1
    with pytest.raises(InputError, match="only 20 training chunks for 21 processes; give more reads"):
        in_each_process(monkeypatch, 21, lambda: Chunks([coded], 100, "training"))


def test_several_stores_are_one_set_of_reads(tmp_path):
    stores = [coded_store(tmp_path / name, [500], prefix=name) for name in ("a", "b")]
    both = Chunks([stores[0], coded_store(tmp_path / "c", [100, 300], prefix="c")], 100, "training")
    assert Counter(locate(row)[0] for row in both.batch(0, 0, 9).signal) == {0: 6, 1: 3}
    assert len(Chunks(stores, 100, "training")) == 10
    short = Chunks([coded_store(tmp_path / "d", [90]), stores[0]], 100, "training", labelled=True)
    assert len(short.batch(0, 0, 5).signal) == 5  # from the store that is long enough


# ----------------------------------------------------------------------------------------------------------- splits


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """3000 labelled reads of 20 samples, to be split by the hash of their id."""
    return coded_store(tmp_path_factory.mktemp("splits") / "many", [20] * 3000, split=-1)


def ids(chunks):
    return set(chunks.reads["id"][chunks.read_of].tolist())


def test_no_read_is_in_two_splits(many):
    training, validation = (ids(Chunks([many], 10, split)) for split in ("training", "validation"))
    assert not training & validation and len(training | validation) == 3000
    assert 250 < len(validation) < 350  # a tenth; standard deviation 16


def test_a_read_stays_in_its_split_when_data_is_added(many, tmp_path):
    few = coded_store(tmp_path / "few", [20] * 300, split=-1)  # the first 300 of the 3000
    for split in ("training", "validation"):
        assert ids(Chunks([few], 10, split)) == ids(Chunks([many], 10, split)) & set(few.reads["id"].tolist())


def test_shares_of_pretraining_and_fine_tuning(many):
    both = ids(Chunks([many], 10, "training"))
    pretraining, finetuning = (ids(Chunks([many], 10, "training", share=x)) for x in ("pretraining", "finetuning"))
    validation = ids(Chunks([many], 10, "validation", share="finetuning"))
    assert pretraining | finetuning == both and not pretraining & finetuning
    assert 4.4 < len(pretraining) / len(finetuning) < 5.7
    assert validation == ids(Chunks([many], 10, "validation")) and not validation & pretraining


@pytest.mark.parametrize(("share", "seed"), [(None, 0), ("finetuning", 0), ("finetuning", 1)])
def test_label_fractions_are_nested_sets_of_reads(many, share, seed):
    def at(fraction, seed=seed):
        return Chunks([many], 10, "training", True, share, fraction, seed)

    parts = [at(fraction) for fraction in (1e-9, 0.01, 0.1, 0.5, 1.0)]
    whole = parts[-1].number_of_reads
    assert [part.number_of_reads for part in parts] == [1, *(round(x * whole) for x in (0.01, 0.1, 0.5)), whole]
    assert all(ids(small) < ids(large) for small, large in itertools.pairwise(parts))
    assert len(parts[2]) == 2 * parts[2].number_of_reads  # all chunks of those reads
    assert 0.4 < parts[3].read_of.mean() / 3000 < 0.6  # from anywhere in the data, not its beginning
    in_both = len(ids(at(0.5, seed=7)) & ids(parts[3])) / parts[3].number_of_reads
    assert 0.4 < in_both < 0.6  # half of another half


# ---------------------------------------------------------------------------------------------------------------- CTC


def test_ctc_steps_needed_is_where_ctc_becomes_possible():
    """Against torch's CTC: infinite with one time step fewer. Half of the references have equal neighbours."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(1, 4, (40, 9), generator=generator)
    lengths = torch.randint(1, 10, (40,), generator=generator)
    needed = ctc_steps_needed(targets, lengths)
    assert (needed > lengths).any() and (needed == lengths).any()
    log_probs = torch.zeros(20, 40, 5).log_softmax(-1)

    def possible(steps):
        loss = torch.nn.functional.ctc_loss(log_probs, targets, steps, lengths, reduction="none")
        return loss.isfinite()

    assert possible(needed).all() and not possible(needed - 1).any()


@pytest.mark.parametrize("width", [0, 1, 3])
def test_ctc_steps_needed_of_chunks_without_bases(width):
    assert ctc_steps_needed(torch.zeros(2, width, dtype=torch.long), torch.tensor([0, 0])).tolist() == [0, 0]


def test_a_read_with_and_without_bases_is_kept_as_both_and_only_a_true_copy_is_left_out(simulated, tmp_path):
    """Whichever file comes first, labels are not lost to an unlabelled copy of the read."""
    folder = tmp_path / "reads"
    folder.mkdir()
    with h5py.File(simulated) as file, h5py.File(folder / "1.fast5", "w") as unlabelled:
        read = file["Reads/simulated-1-0"]
        group = unlabelled.create_group("read_simulated-1-0")
        group["Raw/Signal"] = read["Dacs"][:]
        group.create_group("channel_id").attrs.update(
            {key: read.attrs[key] for key in ("range", "offset", "digitisation")} | {"sampling_rate": 4000.0}
        )
    for name in ("2.hdf5", "3.hdf5"):
        (folder / name).write_bytes(simulated.read_bytes())
    info = prepare([folder], tmp_path / "store").info
    assert info["kept"] == {"unlabelled": 1, "labelled": 12} and info["left_out"] == {"read twice": 12}


def test_a_signal_that_is_not_a_row_of_integers_is_corrupt(simulated, tmp_path):
    path = tmp_path / "reads.hdf5"
    path.write_bytes(simulated.read_bytes())
    with h5py.File(path, "r+") as file:
        for name, signal in (("simulated-1-0", np.zeros((500, 2), np.int16)), ("simulated-1-1", np.zeros(500))):
            del file[f"Reads/{name}/Dacs"]
            file[f"Reads/{name}/Dacs"] = signal
    assert prepare([path], tmp_path / "store").info["left_out"] == {"corrupt: the signal is not a row of integers": 2}
