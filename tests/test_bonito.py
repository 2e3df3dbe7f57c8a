"""Bonito's training arrays both ways, against its loader's rules as written out here; Bonito itself is not needed."""

import h5py
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import finetune_basecaller
from benchmark.plot_runs import read_metrics
from common import InputError
from common.chunks import Chunks, hash_of, open_data
from common.reads.store import prepare
from tests.test_formats import without_bases
from tests.test_store import entries

LENGTH = 200  # samples per chunk
NAMES = ("chunks", "references", "reference_lengths")


# ------------------------------------------------------------------------------------------------- its loader's rules


def load(folder):
    """The chunks, targets and lengths of one folder."""
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES]
    if (folder / "indices.npy").exists():
        rows = np.load(folder / "indices.npy", mmap_mode="r")
        rows = rows[rows < len(arrays[2])]
        arrays = [array[rows] for array in arrays]
    return arrays


def load_both(folder):
    """{split: (chunks, targets, lengths)}: validation is a folder of its own, or the last 3 % of the chunks."""
    training = load(folder)
    if (folder / "validation").exists():
        return {"training": training, "validation": load(folder / "validation")}
    first = int(len(training[0]) * 0.97)
    return {"training": [a[:first] for a in training], "validation": [a[first:] for a in training]}


def items(chunks, targets, lengths):
    """What its model and loss are given, one by one: (1, L) float32, (longest,) int64, int64."""
    for chunk, target, length in zip(chunks, targets, lengths, strict=True):
        yield chunk[None].astype(np.float32), target.astype(np.int64), length.astype(np.int64)


# ------------------------------------------------------------------------------------------------------ what we write


def tiles_of(path):
    """{split: [(signal, bases)]} of each tile with bases, in float64 and straight from the mapped-signal HDF5."""
    tiles = {"training": [], "validation": []}
    with h5py.File(path) as file:
        for read_id, read in file["Reads"].items():
            current = (read["Dacs"][:] + read.attrs["offset"]) * read.attrs["range"] / read.attrs["digitisation"]
            median = np.median(current)
            signal = (current - median) / (1.4826 * np.median(np.abs(current - median)))
            bases, starts = read["Reference"][:] + 1, read["Ref_to_signal"][:]
            split = "validation" if hash_of(read_id.encode()) < 0.1 * 2**64 else "training"
            for first in range(starts[0], starts[-1] - LENGTH + 1, LENGTH):
                inside = bases[(starts[:-1] >= first) & (starts[:-1] < first + LENGTH)].tolist()
                if inside:
                    tiles[split].append((signal[first : first + LENGTH], inside))
    return tiles


@pytest.mark.parametrize("kind", ["raw", "store"])
def test_what_we_write_opens_by_its_rules(simulated, tmp_path, command, kind, capsys):
    source = simulated if kind == "raw" else prepare([simulated], tmp_path / "store").path
    command(source, "-o", tmp_path / "arrays", "--chunk-len", LENGTH, "--bonito")
    assert " of chunks " in capsys.readouterr().out  # the audit
    written = sorted(str(path.relative_to(tmp_path / "arrays")) for path in (tmp_path / "arrays").rglob("*.*"))
    assert written == sorted(f"{part}{name}.npy" for part in ("", "validation/") for name in NAMES)
    expected = tiles_of(simulated)
    for split, (chunks, targets, lengths) in load_both(tmp_path / "arrays").items():
        tiles = expected[split]
        assert all(isinstance(array, np.memmap) and array.flags.c_contiguous for array in (chunks, targets, lengths))
        assert (chunks.dtype, targets.dtype, lengths.dtype) == (np.float16, np.uint8, np.uint16)
        assert chunks.shape == (len(tiles), LENGTH) and lengths.shape == (len(tiles),)
        assert targets.shape == (len(tiles), max(len(bases) for _, bases in tiles))
        for (chunk, target, length), (signal, bases) in zip(items(chunks, targets, lengths), tiles, strict=True):
            assert chunk.shape == (1, LENGTH)
            np.testing.assert_allclose(chunk[0], signal, rtol=2**-10, atol=1e-4)  # float16 keeps 11 bits
            assert target.tolist() == bases + [0] * (targets.shape[1] - length)


def test_there_and_back(simulated, tmp_path, command):
    """Training on what we write sees its very chunks, and writing them again gives the same files."""
    command(simulated, "-o", tmp_path / "arrays", "--chunk-len", LENGTH, "--bonito")
    stores = open_data([tmp_path / "arrays"])
    for split, (chunks, targets, lengths) in load_both(tmp_path / "arrays").items():
        (batch,) = Chunks(stores, LENGTH, split, labelled=True).tiles(10**6)
        np.testing.assert_array_equal(batch.signal, chunks)
        np.testing.assert_array_equal(batch.targets, targets)
        np.testing.assert_array_equal(batch.target_lengths, lengths)
    command(tmp_path / "arrays", "-o", tmp_path / "again", "--chunk-len", LENGTH, "--bonito")
    for part in ("", "validation/"):
        for name in NAMES:
            first, second = (tmp_path / folder / f"{part}{name}.npy" for folder in ("arrays", "again"))
            assert first.read_bytes() == second.read_bytes()


def test_reads_without_bases_are_refused(simulated, tmp_path, command):
    (tmp_path / "reads.hdf5").write_bytes(simulated.read_bytes())
    with h5py.File(tmp_path / "reads.hdf5", "r+") as file:
        for read in file["Reads"].values():
            without_bases(read)
    with pytest.raises(InputError, match="no labelled training read"):
        command(tmp_path / "reads.hdf5", "-o", tmp_path / "out", "--chunk-len", LENGTH, "--bonito")
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------------------------------------- what we read


def easy_arrays(number, seed, longest=24):
    """chunks, targets and lengths: each base has a level, stays for 8 to 12 samples and follows another one."""
    rng = np.random.default_rng(seed)
    chunks, targets, lengths = np.zeros((number, LENGTH)), np.zeros((number, longest), np.int64), np.zeros(number, int)
    for row in range(number):
        bases = 1 + (rng.integers(4) + rng.integers(1, 4, 30).cumsum()) % 4
        signal = np.repeat(bases, rng.integers(8, 13, 30))[:LENGTH]
        lengths[row] = 1 + (np.diff(signal) != 0).sum()
        targets[row, : lengths[row]] = bases[: lengths[row]]
        chunks[row] = 0.9 * (signal - 2.5) + rng.normal(0, 0.1, LENGTH)
    return chunks, targets, lengths


def write(folder, arrays, indices=None):
    folder.mkdir()
    for name, array in zip(NAMES, arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    if indices is not None:
        np.save(folder / "indices.npy", np.array(indices))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(finetune_basecaller, "draw_calls", lambda *_: Figure())


UNCHANGED = dict.fromkeys(("gain_jitter", "offset_jitter", "time_warp", "mask_chance"), 0.0)  # the chunks, in training


def finetune(folder, run, **changes):
    settings = {"size": "tiny", "device": "cpu", "chunk_len": LENGTH, "batch_size": 8, "epochs": 1, "warmup_steps": 0}
    finetune_basecaller.main(finetune_basecaller.Args(data=(folder,), run_dir=run, **settings | changes))


@pytest.fixture
def given(monkeypatch):
    """{split: [(signal, bases)]} that the model and the loss of finetune_basecaller.py are given, filled by its run."""
    given = {"training": [], "validation": []}
    forward, ctc_per_base = finetune_basecaller.Basecaller.forward, finetune_basecaller.ctc_per_base
    seen = []

    def spy_on_model(self, signal, *rest):
        seen.append(("training" if self.training else "validation", signal))
        return forward(self, signal, *rest)

    def spy_on_loss(log_probs, lengths, targets, target_lengths):
        assert targets.dtype == target_lengths.dtype == torch.int64
        split, signal = seen.pop()
        assert signal.dtype == torch.float32 and targets.shape[1] == target_lengths.max()
        for row, target, length in zip(signal, targets, target_lengths.tolist(), strict=True):
            assert not target[length:].any()
            given[split].append((row.tolist(), target[:length].tolist()))
        return ctc_per_base(log_probs, lengths, targets, target_lengths)

    monkeypatch.setattr(finetune_basecaller.Basecaller, "forward", spy_on_model)
    monkeypatch.setattr(finetune_basecaller, "ctc_per_base", spy_on_loss)
    return given


def pairs(arrays):
    """(signal as float16 has it, bases) of each chunk, by the loader's rules."""
    return [(c[0].astype(np.float16).tolist(), t[:n].tolist()) for c, t, n in items(*arrays)]


@pytest.mark.parametrize(
    "types, order, parts",  # of each part, training and validation: how many chunks, indices, how many are to be used
    [
        (("f2", "u1", "u2"), "C", [(20, None, 20), (7, None, 7)]),
        (("f4", "i8", "i8"), "F", [(20, None, 20), (7, None, 7)]),
        (("f2", "i2", "i4"), "F", [(20, [17, 3, 3, 99, *range(5, 14), 20], 12), (7, [4, 1, 7, 2], 3)]),
        (("f4", "u1", "u2"), "C", [(40, None, 40)]),
        (("f2", "i8", "u1"), "C", [(40, range(39, 7, -1), 32)]),
        ((">f4", ">i2", ">u4"), "C", [(20, None, 20), (7, [6, 0], 2)]),
    ],
    ids=["float16", "float32-fortran", "indices", "no-validation", "no-validation-indices", "big-endian"],
)
def test_the_model_is_given_the_arrays(tmp_path, given, types, order, parts):
    """In an epoch every chunk of training once, and all of validation, whatever the arrays' types and order."""
    folders = tmp_path / "arrays", tmp_path / "arrays" / "validation"
    for folder, (number, indices, used) in zip(folders, parts, strict=False):
        arrays = [a.astype(kind, order=order) for a, kind in zip(easy_arrays(number, number), types, strict=True)]
        write(folder, arrays, indices)
        assert len(load(folder)[0]) == used
    expected = {split: pairs(arrays) for split, arrays in load_both(folders[0]).items()}
    batch_size = 4 if len(parts) == 2 else 1  # so that no chunk is left over
    finetune(folders[0], tmp_path / "run", batch_size=batch_size, **UNCHANGED)
    if len(parts) == 2:
        assert given["validation"] == expected["validation"]
        assert sorted(given["training"]) == sorted(expected["training"])
    else:  # by the hash of the chunk's number, not the last 3 %
        assert 0 < len(given["validation"]) < parts[0][2] / 3
        assert sorted(given["training"] + given["validation"]) == sorted(expected["training"] + expected["validation"])
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["validation/loss"])


def test_batches_are_of_whole_chunks_padded_to_their_longest(tmp_path, given):
    write(tmp_path / "arrays", easy_arrays(40, 1))
    write(tmp_path / "arrays/validation", easy_arrays(5, 2))
    finetune(tmp_path / "arrays", tmp_path / "run", **UNCHANGED, max_steps=3)
    known = pairs(load(tmp_path / "arrays"))
    assert len(given["training"]) == 24 and all(pair in known for pair in given["training"])


def test_the_cache_knows_indices(tmp_path):
    write(tmp_path / "arrays", easy_arrays(40, 1))
    sizes = []
    for indices in (None, range(30), range(20)):
        if indices is not None:
            np.save(tmp_path / "arrays" / "indices.npy", np.array(indices))
        sizes.append(len(open_data([tmp_path / "arrays"])[0].reads))
    assert sizes == [40, 30, 20]


@pytest.mark.parametrize(
    "indices",
    [np.array([3, -1]), np.arange(5.0), np.arange(4).reshape(2, 2), np.ones(40, bool), np.array([{}]), np.array(3)],
    ids=["negative", "float", "2-D", "bool", "object", "0-D"],
)
@pytest.mark.parametrize("part", ["", "validation"])
def test_indices_that_make_no_sense(tmp_path, cache, indices, part):
    write(tmp_path / "arrays", easy_arrays(40, 1))
    write(tmp_path / "arrays/validation", easy_arrays(40, 2))
    np.save(tmp_path / "arrays" / part / "indices.npy", indices)
    with pytest.raises(InputError, match=f"^{tmp_path / 'arrays' / part}: ") as error:
        open_data([tmp_path / "arrays"])
    assert "\n" not in str(error.value) and not entries(cache)


def test_indices_that_leave_nothing(tmp_path):
    write(tmp_path / "arrays", easy_arrays(40, 1), [40, 41])
    with pytest.raises(InputError, match="arrays: no read in it"):
        open_data([tmp_path / "arrays"])


def test_chunks_that_float16_cannot_hold_are_left_out(tmp_path):
    chunks, *labels = easy_arrays(40, 1)
    chunks[3, 5], chunks[4, 6], chunks[5, 7] = 1e5, np.nan, -np.inf
    write(tmp_path / "arrays", [chunks.astype("f4"), *labels])
    store = open_data([tmp_path / "arrays"])[0]
    assert store.info["left_out"] == {"not finite": 3} and len(store.reads) == 37
