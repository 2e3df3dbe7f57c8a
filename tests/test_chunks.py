"""Splits by read, chunks and batches (common/chunks.py)."""

import itertools
import re
from collections import Counter

import h5py
import numpy as np
import pytest
import torch

from common import InputError
from common.chunks import Chunks, in_validation, open_data
from common.reads.simulate import simulate_read
from common.reads.store import ReadStore, StoreWriter

LENGTHS = [100, 205, 330, 90, 1000, 415]  # of the reads of coded_store; chunks of 100: 1 2 3 0 10 4, 20 in all


def coded_store(folder, lengths=LENGTHS, split=0, prefix="read", labelled=True, rates=(0,)):
    """A store whose every sample tells where it is from: even ones -(read + 1), odd ones their position // 2."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    store = StoreWriter(folder)
    for read, (length, rate) in enumerate(zip(lengths, itertools.cycle(rates))):
        signal = np.arange(length) // 2
        signal[::2] = -(read + 1)
        starts = np.sort(rng.integers(0, length, length // 8 * labelled))  # some equal: bases passed in no time
        store.add(f"{prefix}-{read}", signal, rng.integers(1, 5, len(starts)), starts, sample_rate=rate, split=split)
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


def test_sequences_are_those_of_the_reads_that_have_chunks(tmp_path):
    stores = [coded_store(tmp_path / "a"), coded_store(tmp_path / "b", [300, 50, 200], prefix="other")]
    found = Chunks(stores, 100, "training", labelled=True).sequences()
    expected = []
    for store, too_short in zip(stores, (3, 1), strict=True):
        for read in np.delete(store.reads, too_short):
            expected.append(store.bases[read["bases_start"] : read["bases_start"] + read["bases_length"]])
    assert len(found) == 7 and all(map(np.array_equal, found, expected))


@pytest.fixture
def coded(tmp_path):
    return coded_store(tmp_path / "coded")


def batches(chunks, steps, seed=0, batch_size=5):
    return [chunks.batch(seed, step, batch_size) for step in steps]


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Simulated reads of 2000 to 100,000 samples, in two stores."""
    rng, stores = np.random.default_rng(0), []
    for number in range(2):
        folder = tmp_path_factory.mktemp("mixed") / "store"
        folder.mkdir()
        store = StoreWriter(folder)
        for read in range(25):
            signal, _ = simulate_read(rng, rng.integers(0, 4, max(230, int(rng.gamma(1.5, 2500)))))
            store.add(f"simulated-{number}-{read}", signal)
        store.close()
        stores.append(ReadStore(folder))
    return stores


@pytest.mark.parametrize(("batch_size", "chunk_len"), [(64, 1200), (64, 3600), (384, 200)])
def test_no_two_chunks_of_a_batch_overlap(mixed, batch_size, chunk_len):
    """And those of an epoch are each tile of each training read, once, but for what is left over of whole batches."""
    chunks = Chunks(mixed, chunk_len, "training")
    steps = chunks.steps_per_epoch(batch_size)
    assert steps >= 3
    tiles, lengths = Counter(chunks.read_of.tolist()), chunks.reads["length"]
    for seed, epoch in itertools.product(range(3), range(4)):
        taken, left = set(), set()
        for step in range(epoch * steps, (epoch + 1) * steps):
            reads, starts = chunks.places(seed, step, batch_size)
            assert len(reads) == batch_size and (starts >= 0).all() and (starts + chunk_len <= lengths[reads]).all()
            for read in set(reads.tolist()):
                assert (np.diff(np.sort(starts[reads == read])) >= chunk_len).all()
            taken |= set(zip(reads.tolist(), (starts // chunk_len).tolist(), strict=True))
            left |= set(zip(reads.tolist(), (starts % chunk_len).tolist(), strict=True))
        assert len(taken) == steps * batch_size and all(tile < tiles[read] for read, tile in taken)
        assert len(left) == len({read for read, _ in taken})  # the tiles of a read are moved together


def test_a_batch_is_the_signal_at_its_places(mixed):
    chunks, signal = Chunks(mixed, 1200, "training"), np.concatenate([store.signal for store in mixed])
    first = chunks.reads["start"] + np.repeat([0, len(mixed[0].signal)], 25)
    for step in (0, 7):
        batch, (reads, starts) = chunks.batch(3, step, 64), chunks.places(3, step, 64)
        for row, read_id, read, start in zip(batch.signal, batch.reads, reads, starts, strict=True):
            assert read_id.encode() == chunks.reads["id"][read]
            assert (row.numpy() == signal[first[read] + start :][:1200]).all()


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
    # of one tile a read without spare samples has one place; offsets of the others differ nearly always
    assert sum(start for _, start in places[0]) != sum(start for _, start in places[1])


def test_an_epoch_takes_every_tile_of_every_read_once(coded):
    chunks = Chunks([coded], 100, "training")
    assert len(chunks) == 20 and chunks.number_of_reads == 5 and chunks.too_short == 1
    tiles = [(read, i) for read, length in enumerate(LENGTHS) for i in range(length // 100)]
    for epoch in range(3):
        rows = [row for batch in batches(chunks, range(4 * epoch, 4 * epoch + 4)) for row in batch.signal]
        assert sorted((read, start // 100) for read, start in map(locate, rows)) == tiles
    assert batches(chunks, [0])[0].targets is None


def test_offsets_are_new_each_epoch_and_uniform_over_what_the_tiles_leave_over(tmp_path):
    """Of each read for itself: those of two reads go together in no more of the epochs than chance has it."""
    chunks = Chunks([coded_store(tmp_path / "two", [216, 316])], 100, "training")
    offsets = np.zeros((1000, 2), int)
    for epoch in range(1000):
        reads, starts = chunks.places(0, epoch, 5)
        offsets[epoch, reads] = starts % 100
    for of_a_read in offsets.T:
        counts = Counter(of_a_read.tolist())
        assert counts.keys() == set(range(17)) and max(counts.values()) < 100  # of 59 expected; standard deviation 7.4
        assert np.mean(of_a_read[1:] == of_a_read[:-1]) < 0.1
    assert np.mean(offsets[:, 0] == offsets[:, 1]) < 0.1


def test_the_bases_of_a_chunk_are_those_that_start_in_it(coded):
    chunks = Chunks([coded], 100, "training", labelled=True)
    rows = 0
    for batch in [*batches(chunks, range(40)), *chunks.tiles(7)]:
        for signal, targets, length in zip(batch.signal, batch.targets, batch.target_lengths, strict=True):
            read, first = locate(signal)
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
    with pytest.raises(InputError, match="no training read among 6; give more reads"):
        Chunks([store], 100, "training")


def test_what_is_missing_is_said_and_without_validation_reads_there_is_none(tmp_path, monkeypatch, capsys):
    two, plain = coded_store(tmp_path / "two", [250, 90]), coded_store(tmp_path / "plain", [250], labelled=False)
    one = coded_store(tmp_path / "one", [250], split=1)
    for stores, labelled, length, message in (
        ([plain], True, 100, "plain: no labelled training read: none has bases; prepare_data.py makes labels"),
        ([plain, one], True, 100, "one: no labelled training read among 2; give more reads"),
        ([two], False, 300, "two: no training read of at least 300 samples (2 shorter); give a smaller --chunk-len"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            Chunks(stores, length, "training", labelled)
    found = set()
    for share in ("pretraining", "finetuning"):
        try:
            found.add(len(Chunks([plain], 100, "training", share=share)))
        except InputError as error:
            assert f"no training read for {share} among 1; give more reads" in str(error)
    assert found == {2}

    assert not capsys.readouterr().out
    for stores, labelled in (([two], False), ([two], True), ([plain, two], True)):
        chunks = Chunks(stores, 100, "validation", labelled)
        assert len(chunks) == chunks.number_of_reads == 0
        assert not [*chunks.tiles(4)] and not [*chunks.tiles(4, equal=True)] and not chunks.sequences()
        kind = "labelled " * labelled
        assert f"{stores[-1].path}: no {kind}validation read among {len(chunks.reads)}" in capsys.readouterr().out
    few = in_each_process(monkeypatch, 3, lambda: Chunks([one], 100, "validation"))
    assert [len(chunks) for chunks in few] == [0, 0, 0] and not [*few[0].tiles(4, equal=True)]
    assert "only 2 validation chunks for 3 processes" in capsys.readouterr().out
    assert in_each_process(monkeypatch, 3, lambda: len(Chunks([one], 100, "validation", labelled=True))) == [2, 2, 2]


def test_a_read_alone_is_pretrained_on(simulated, tmp_path):
    """Also one that would be for validation among others."""
    (store,) = open_data([simulated])
    for held_out in (False, True):
        path = tmp_path / f"{held_out}.hdf5"
        name = store.reads["id"][in_validation(store.reads) == held_out][0].decode()
        with h5py.File(simulated) as every, h5py.File(path, "w") as file:
            every.copy(f"Reads/{name}", file.require_group("Reads"))
        alone = open_data([path])
        assert Chunks(alone, 200, "training").number_of_reads == 1 and not len(Chunks(alone, 200, "validation"))
        assert Chunks(alone, 200, "validation", labelled=True).number_of_reads == held_out


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


# ----------------------------------------------------------------------------------------------------- several stores


def test_several_stores_are_one_set_of_reads(tmp_path):
    stores = [coded_store(tmp_path / name, [500], prefix=name) for name in ("a", "b")]
    both = Chunks([stores[0], coded_store(tmp_path / "c", [100, 300], prefix="c")], 100, "training")
    assert Counter(locate(row)[0] for row in both.batch(0, 0, 9).signal) == {0: 6, 1: 3}
    assert len(Chunks(stores, 100, "training")) == 10
    short = Chunks([coded_store(tmp_path / "d", [90]), stores[0]], 100, "training", labelled=True)
    assert len(short.batch(0, 0, 5).signal) == 5  # from the store that is long enough


def test_a_read_that_two_stores_have_is_drawn_once(tmp_path):
    """Also where one of them has it without bases, whichever comes first; but its bases are not lost by that."""
    labelled, more = (coded_store(tmp_path / name, lengths) for name, lengths in (("a", LENGTHS), ("b", [100, 205])))
    unlabelled = coded_store(tmp_path / "c", labelled=False)
    for stores in ([labelled, unlabelled], [unlabelled, labelled], [more, labelled], [labelled] * 3):
        drawn = batches(Chunks(stores, 100, "training"), range(4))
        assert Counter(locate(row)[0] for batch in drawn for row in batch.signal) == {0: 1, 1: 2, 2: 3, 4: 10, 5: 4}
        with_bases = Chunks(stores, 100, "training", labelled=True)
        assert len(with_bases) == 20 and (batches(with_bases, [0])[0].target_lengths > 0).all()


def bonito_store(folder, numbers, split=-1):
    """A store of chunks of 50 samples as Bonito's folders give them: numbers for ids."""
    folder.mkdir()
    store, rng = StoreWriter(folder), np.random.default_rng(0)
    store.add_bonito((f"chunk-{i}", rng.standard_normal(50), rng.integers(1, 5, 4), split) for i in numbers)
    store.close()
    return ReadStore(folder)


def test_bonitos_chunks_of_equal_numbers_in_two_folders_are_all_kept(tmp_path):
    """As well as those that indices.npy names more than once."""
    stores = [bonito_store(tmp_path / "a", range(20), split=0), bonito_store(tmp_path / "b", [3, 3, 7], split=0)]
    assert len(Chunks(stores, 50, "training", labelled=True)) == 23


def test_bonitos_chunks_cannot_be_cut_anew_and_are_split_by_their_numbers(tmp_path):
    store = bonito_store(tmp_path / "a", range(200))
    training, validation = (Chunks([store], 50, split, labelled=True) for split in ("training", "validation"))
    assert len(training) + len(validation) == 200 and 5 < len(validation) < 40
    with pytest.raises(InputError, match="--chunk-len 50"):
        Chunks([store], 40, "training", labelled=True)


def test_stores_of_different_sample_rates_are_said_aloud_once(tmp_path, capsys):
    stores = [coded_store(tmp_path / f"{i}", rates=rates) for i, rates in enumerate(((4000,), (5000, 4000, 0), (0,)))]
    open_data([store.path for store in stores])
    reads = "reads: 8 of unknown chemistry at 4 kHz; 8 of unknown chemistry; 2 of unknown chemistry at 5 kHz\n"
    expected = reads + "--data: chemistries or sample rates differ; a basecaller is for one of them\n"
    assert capsys.readouterr().out == expected
    open_data([stores[0].path, stores[2].path])  # of which one does not know its own
    assert "differ" not in capsys.readouterr().out


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
