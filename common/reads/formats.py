"""Reads from what sequencers and basecaller trainers write, the read store they are prepared into, and batches of it.

raw file or folder -> raw_reads() -> prepare() -> a read store on disk -> ReadStore -> Chunks -> batches.
"""

import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pod5
import torch
from tqdm import tqdm

from common import InputError
from common.distributed import all_gather_lists, part_of, world_size
from common.files import make_once, written_whole
from common.normalise import med_mad, picoamperes
from common.simulate import simulated_file

try:  # importing it registers the filter with h5py
    import vbz_h5py_plugin
except ImportError:
    vbz_h5py_plugin = None

ALPHABET = "NACGT"  # N, index 0, is the CTC blank and the padding
VALIDATION = 0.1  # the share of reads kept for validation
PRETRAINING = 5 / 6  # its share of data that pretraining and fine-tuning are both given (thesis section 5.1)
MOST_COMPRESSED = 1100  # times; gzip reaches 1032
SATURATED = 0.1  # a read with more than this share of samples on its highest or its lowest value is left out
SUFFIXES = (".pod5", ".fast5", ".hdf5", ".h5")
STORE_VERSION = 2
READ_DTYPE = np.dtype(
    [
        ("id", "S48"),
        ("start", "i8"),  # of the read's samples in signal.npy
        ("length", "i8"),
        ("sample_rate", "f4"),  # Hz, 0 if unknown
        ("shift", "f4"),  # pA; 0 and 1 where the signal came in normalised
        ("scale", "f4"),
        ("bases_start", "i8"),  # of the read's bases in bases.npy and base_starts.npy
        ("bases_length", "i8"),  # 0: unlabelled
        ("whole", "?"),  # labels belong to the read as a whole (Bonito): it cannot be cut
        ("split", "i1"),  # 0 training, 1 validation, -1 by the hash of the id
    ]
)


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass
class RawRead:
    """One read as the file has it; bases 1-4 = ACGT and the sample at which each starts, or None."""

    id: str
    dacs: np.ndarray  # (samples,) int16
    offset: float
    scale: float  # pA per unit: range / digitisation
    sample_rate: float
    rna: bool = False  # direct RNA passes the pore from 3' to 5'
    bases: np.ndarray | None = None  # (bases,) uint8
    base_starts: np.ndarray | None = None  # (bases + 1,) int64, the last is the end of the last base


class Rejected(NamedTuple):
    """A read, or a whole file, that cannot be used."""

    id: str
    reason: str


def raw_reads(path):
    """Yields the RawRead and Rejected of one POD5, FAST5 or mapped-signal HDF5 file. InputError if it is none."""
    try:
        if path.suffix == ".pod5":
            yield from _pod5_reads(path)
        else:
            with h5py.File(path) as file:
                yield from _hdf5_reads(file, path)
    except InputError:
        raise
    except Exception as error:  # a corrupt file can bring about any
        reason = first_line(error)
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({reason}); fetch or write it again") from error


def reads_of(path, named):
    """raw_reads(path), but a file that cannot be opened, and was not `named` itself, is passed over with a line."""
    try:
        yield from raw_reads(path)
    except InputError as error:
        if named:
            raise
        tqdm.write(f"passed over: {error}", file=sys.stderr)
        yield Rejected(str(path), "in files that cannot be read")


def count_reads(path):
    """How many reads a raw file says it has, for a progress bar; 0 if it cannot be told."""
    try:
        if path.suffix == ".pod5":
            with pod5.Reader(path) as reader:
                return reader.num_reads
        with h5py.File(path) as file:
            return len(_hdf5_layout(file)[0])
    except Exception:  # raw_reads says what is wrong
        return 0


def _pod5_reads(path):
    with pod5.Reader(path) as reader:
        for read in reader.reads():
            read_id = "without an id"
            try:
                read_id = str(read.read_id)
                yield RawRead(
                    read_id,
                    _pod5_signal(read),
                    float(read.calibration.offset),
                    float(read.calibration.scale),
                    float(read.run_info.sample_rate),
                    _is_rna(read.run_info.context_tags | {"kit": read.run_info.sequencing_kit}),
                )
            except Exception as error:
                yield Rejected(read_id, f"corrupt: {first_line(error)}")


def _pod5_signal(read):
    """The samples of a POD5 read; ValueError where its rows in the table of signal are not as long as it says."""
    rows = read.signal_rows
    # where a row has no bytes, pod5 takes what lies in memory for its samples
    if sum(row.sample_count for row in rows) != read.num_samples or not all(row.byte_count for row in rows):
        raise ValueError("the signal is not as long as the read says")
    return read.signal


def _hdf5_layout(file):
    """The names of an HDF5 file's reads, and the function that parses one."""
    if isinstance(file.get("Reads"), h5py.Group):
        return file["Reads"], _mapped_read
    if "Raw" in file:
        reads = file.get("Raw/Reads")
        return reads if isinstance(reads, h5py.Group) else (), _single_read
    return [name for name in file if isinstance(name, bytes) or name.startswith("read_")], _multi_read


def _hdf5_reads(file, path):
    groups, parse = _hdf5_layout(file)
    if not len(groups):
        raise InputError(f"{path}: holds neither FAST5 reads nor mapped-signal reads (a group Reads, Raw or read_...)")
    for name in groups:
        if isinstance(name, bytes):  # so h5py gives what is not UTF-8
            yield Rejected(repr(name), "corrupt: the name of the read is not UTF-8")
            continue
        try:
            yield parse(file, name)
        except OSError as error:
            if vbz_h5py_plugin is None and ("filter" in str(error) or "plugin" in str(error)):
                raise InputError(f"{path}: its signal is VBZ-compressed; pip install vbz-h5py-plugin") from error
            yield Rejected(name, f"corrupt: {first_line(error)}")
        except InputError:
            raise
        except Exception as error:
            yield Rejected(name, f"corrupt: {first_line(error)}")


def listed(counts):
    """{reason: count} in words."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"


def first_line(error):
    """What an exception says, fit to be part of a line: its first line, printable and short, or its name."""
    text = str(error).strip("'\" \n").splitlines() or [type(error).__name__]
    return "".join(letter if letter.isprintable() else "?" for letter in text[0])[:200]


def _is_rna(tags):
    """Whether the sequencer's context tags name a kit, or a sort of experiment, for direct RNA."""
    named = (tags.get(name, "") for name in ("kit", "sequencing_kit", "experiment_type", "experiment_kit"))
    return any("rna" in (name.decode() if isinstance(name, bytes) else str(name)).lower() for name in named)


def _row(data):
    """The values of a data set of HDF5; ValueError where it, or a chunk of it, is not as long as it says."""
    if data.size * data.dtype.itemsize > MOST_COMPRESSED * data.id.get_storage_size():
        raise ValueError("says it is longer than what is stored")
    created = data.id.get_create_plist()
    filters = [created.get_filter(i)[0] for i in range(created.get_nfilters())]
    if filters:
        length = data.chunks[0] * data.dtype.itemsize
        for first in range(0, data.size, data.chunks[0]):
            # HDF5 would take for values what lies in memory behind a chunk that is too short
            if _unpacked_length(*data.id.read_direct_chunk((first,)), filters, length) != length:
                raise ValueError("a chunk is not as long as it says")
    return data[:]


def _unpacked_length(skipped, packed, filters, length):
    """The bytes that a chunk of HDF5 really has; `length`, those that it should have, if its filters do not tell."""
    if skipped:  # its filters, as where they would have made it longer
        return len(packed)
    if h5py.h5z.FILTER_DEFLATE in filters:
        return len(zlib.decompressobj().decompress(packed, length + 1))
    if 32020 in filters:  # VBZ, which begins with it, and ends the process where it is missing
        return int.from_bytes(packed[:4], "little") if len(packed) >= 4 else 0
    return length


def _hdf5_raw(read_id, signal, calibration, sample_rate, context_tags=()):
    if signal.ndim != 1 or signal.dtype.kind not in "iu":
        raise ValueError("the signal is not a row of integers")
    if not {"range", "offset", "digitisation"} <= set(calibration):
        return Rejected(read_id, "no calibration")
    scale = float(calibration["range"]) / float(calibration["digitisation"] or np.nan)
    rna = _is_rna(dict(context_tags))
    return RawRead(read_id, _row(signal), float(calibration["offset"]), scale, float(sample_rate), rna)


def _multi_read(file, name):
    read = file[name]
    channel = read["channel_id"].attrs
    tags = read["context_tags"].attrs if "context_tags" in read else {}
    return _hdf5_raw(name.removeprefix("read_"), read["Raw/Signal"], channel, channel["sampling_rate"], tags)


def _single_read(file, name):
    raw = file["Raw/Reads"][name]
    read_id = raw.attrs["read_id"]
    channel = file["UniqueGlobalKey/channel_id"].attrs
    read_id = read_id.decode() if isinstance(read_id, bytes) else str(read_id)
    tags = file["UniqueGlobalKey/context_tags"].attrs if "UniqueGlobalKey/context_tags" in file else {}
    return _hdf5_raw(read_id, raw["Signal"], channel, channel["sampling_rate"], tags)


def _mapped_read(file, name):
    """taiyaki's mapped-signal format: Reference 0-3 = ACGT, Ref_to_signal the first sample of each base and the end."""
    read = file["Reads"][name]
    raw = _hdf5_raw(name, read["Dacs"], read.attrs, read.attrs.get("sample_rate", 0.0))
    if isinstance(raw, Rejected):
        return raw
    bases, starts = _row(read["Reference"]), _row(read["Ref_to_signal"])
    if bases.ndim != 1 or starts.ndim != 1 or bases.dtype.kind not in "iu" or starts.dtype.kind not in "iu":
        raise ValueError("Reference or Ref_to_signal is not a row of integers")
    starts = starts.astype(np.int64)
    if len(starts) != len(bases) + 1:
        raise ValueError("Ref_to_signal is not one longer than Reference")
    if len(bases) and (bases.min() < 0 or bases.max() > 3):
        raise ValueError("Reference has values other than 0 to 3")
    if (np.diff(starts) < 0).any():
        raise ValueError("Ref_to_signal goes backwards")
    if starts[0] < 0 or starts[-1] > len(raw.dacs):
        raise ValueError("Ref_to_signal leaves the signal")
    raw.bases, raw.base_starts = (bases + 1).astype(np.uint8), starts
    return raw


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


# ------------------------------------------------------------------------------------------------------- read store


class NpyWriter:
    """Appends rows to a .npy file of unknown length; plain writes, so that a full disk is an error and no crash."""

    def __init__(self, path, dtype, row=()):
        self.dtype, self.row, self.rows = np.dtype(dtype), tuple(row), 0
        self.file = open(path, "wb")  # noqa: SIM115
        self._header()

    def _header(self):
        # NumPy pads the header so that the number of rows can grow in place.
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self.file, header | {"shape": (self.rows, *self.row)})

    def append(self, array):
        array = np.ascontiguousarray(array, self.dtype).reshape(-1, *self.row)
        self.file.write(array)
        self.rows += len(array)

    def close(self):
        self.file.seek(0)
        self._header()
        self.file.close()


def hash_of(read_id, seed=0):
    """64 bits that depend on the read's id (bytes) and the seed alone: a read stays in its split when data is added.

    What follows a colon, the place of a part in a split read, does not count: parts stay with the read and each other.
    """
    salt = seed.to_bytes(16, "little")
    return int.from_bytes(hashlib.blake2b(read_id.partition(b":")[0], digest_size=8, salt=salt).digest(), "little")


def in_validation(reads):
    """Which rows of a table of READ_DTYPE belong to the validation split, (reads,) bool."""
    high = np.array([hash_of(read_id) >> 32 for read_id in reads["id"]]) / 2**32
    return np.where(reads["split"] < 0, high < VALIDATION, reads["split"] == 1)


class StoreWriter:
    """Writes the files of a read store into `folder` and counts what was kept and why the rest was not."""

    def __init__(self, folder):
        self.folder, self.reads, self.kept, self.left_out = folder, [], Counter(), Counter()
        self.ids, self.raw_reads, self.samples = set(), 0, 0
        self.signal = NpyWriter(folder / "signal.npy", np.float16)
        self.bases = NpyWriter(folder / "bases.npy", np.uint8)
        self.base_starts = NpyWriter(folder / "base_starts.npy", np.int32)

    def add(self, read_id, signal, bases=(), base_starts=(), sample_rate=0, shift=0, scale=1, whole=False, split=-1):
        row = (read_id.encode(), self.signal.rows, len(signal), sample_rate, shift, scale)
        self.reads.append((*row, self.bases.rows, len(bases), whole, split))
        self.signal.append(signal)
        self.bases.append(bases)
        self.base_starts.append(base_starts)
        self.kept["labelled" if len(bases) else "unlabelled"] += 1

    def add_raw(self, raw, min_len, labelled_only):
        """Normalises a RawRead over the whole read, cuts a labelled one to its mapped part, and keeps or counts it."""
        if isinstance(raw, Rejected):
            self.left_out[raw.reason] += 1
            return
        labelled = raw.bases is not None and len(raw.bases) > 0
        if not raw.id.isprintable() or len(raw.id.encode(errors="replace")) > READ_DTYPE["id"].itemsize:
            result = "id too long or not printable"
        elif (raw.id, labelled) in self.ids:
            result = "read twice"
        else:
            result = "unlabelled" if labelled_only and not labelled else normalised(raw)
        if not isinstance(result, str):
            signal, shift, scale = result
            bases, starts = (), ()
            if labelled:
                first, end = raw.base_starts[[0, -1]]
                signal, bases, starts = signal[first:end], raw.bases, raw.base_starts[:-1] - first
            if len(signal) >= min_len:
                self.add(raw.id, signal, bases, starts, raw.sample_rate, shift, scale)
                self.ids.add((raw.id, labelled))  # the same read with and without bases is of use for both
                return
            result = "empty" if min_len <= 1 else f"shorter than {min_len} samples"
        self.left_out[result] += 1

    def close(self, **info):
        for file in (self.signal, self.bases, self.base_starts):
            file.close()
        np.save(self.folder / "reads.npy", np.array(self.reads, READ_DTYPE))
        info |= {"version": STORE_VERSION, "reads_read": self.raw_reads, "samples_read": self.samples}
        info |= {"kept": dict(self.kept), "left_out": dict(self.left_out)}
        (self.folder / "store.json").write_text(json.dumps(info, indent=1))


def load_npy(path):
    """The array in a .npy file, memory-mapped; ValueError or OSError if there is none."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        raise
    except Exception as error:  # NumPy lets through what its parser of headers raises
        raise ValueError(f"{path.name} is no array") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path.name} is no array")
    return array


def is_store(path):
    return (path / "store.json").is_file()


def is_bonito(path):
    return (path / "chunks.npy").is_file()


def raw_files(path):
    """The raw files at `path`: itself, or those in the folder and below it."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if is_store(path):
        raise InputError(
            f"{path}: a read store, where raw reads are needed; training takes it, and prepare_data.py with --bonito"
        )
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path}: not a name this reads ({', '.join(SUFFIXES)}, or a folder)")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"{path}: no {', '.join(SUFFIXES)} file, Bonito chunks.npy or read store in this folder")
    return files


def prepare(paths, out, min_len=1, labelled_only=False, basecalls=None):
    """Reads raw files, folders of them and Bonito folders into a new read store, the folder `out`, and opens it.

    With the Basecalls of a BAM, reads get their bases from there, or are left out. InputError if a file that is named
    itself cannot be opened, or nothing can be kept; `out` appears when it is whole.
    """
    paths = [Path(path) for path in paths]
    files = [(file, file in paths) for path in paths for file in ([path] if is_bonito(path) else raw_files(path))]
    with written_whole(out) as folder:
        folder.mkdir()
        store = StoreWriter(folder)
        total = sum(count_reads(file) for file, _ in files if not is_bonito(file))
        with tqdm(desc=f"preparing {out.name}", unit=" reads", total=total) as bar:
            for file, named in files:
                if is_bonito(file):
                    _add_bonito(store, file)
                    continue
                for raw in reads_of(file, named):
                    store.raw_reads += 1
                    store.samples += 0 if isinstance(raw, Rejected) else len(raw.dacs)
                    for labelled in basecalls.label(raw) if basecalls else [raw]:
                        store.add_raw(labelled, min_len, labelled_only)
                    bar.update()
        if basecalls:
            store.left_out += basecalls.unused()
        if not store.reads:
            raise InputError(f"{', '.join(map(str, paths))}: no read can be used (left out: {listed(store.left_out)})")
        store.close(sources=[str(path) for path in paths])
    return ReadStore(out)


def _add_bonito(store, path):
    """Bonito's arrays: each chunk becomes a read that cannot be cut; validation/ becomes the validation split.

    indices.npy, if there is one, says which chunks to use, and how often.
    """
    parts = [(path, 0), (path / "validation", 1)] if is_bonito(path / "validation") else [(path, -1)]
    for folder, split in parts:
        try:
            chunks, references, lengths = (
                load_npy(folder / f"{name}.npy") for name in ("chunks", "references", "reference_lengths")
            )
            rows = np.arange(lengths.size)
            if (folder / "indices.npy").exists():
                rows = load_npy(folder / "indices.npy")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: not a folder of Bonito's training arrays ({first_line(error)})") from error
        shapes = chunks.shape, references.shape, lengths.shape
        if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) > 1:
            raise InputError(
                f"{folder}: wrong shapes: chunks {shapes[0]}, references {shapes[1]}, reference_lengths {shapes[2]}; "
                "they should be (N, L), (N, longest), (N,)"
            )
        kinds = chunks.dtype.kind + references.dtype.kind + lengths.dtype.kind
        if kinds[0] != "f" or not set(kinds[1:]) <= set("iu"):
            raise InputError(f"{folder}: chunks should hold floats, references and reference_lengths whole numbers")
        if len(lengths) and (lengths.min() < 0 or lengths.max() > references.shape[1] or references.max(initial=0) > 4):
            raise InputError(f"{folder}: reference_lengths outside references' width, or bases other than 1 to 4")
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or (len(rows) and rows.min() < 0):
            raise InputError(f"{folder}: indices.npy should be a row of whole numbers from 0, the chunks to use")
        for i in rows[rows < len(lengths)].tolist():  # as Bonito, which passes over numbers that are too large
            bases = references[i, : lengths[i]]
            with np.errstate(over="ignore"):
                signal = chunks[i].astype(np.float16)
            if not np.isfinite(signal).all() or (len(bases) and bases.min() < 1):
                store.left_out["not finite" if len(bases) == 0 or bases.min() > 0 else "corrupt: base 0"] += 1
                continue
            starts = np.zeros(len(bases))
            store.raw_reads += 1
            store.samples += chunks.shape[1]
            store.add(f"chunk-{i}", signal, bases, starts, whole=True, split=split)


class ReadStore:
    """A prepared folder, opened memory-mapped: `reads` (the table, READ_DTYPE), `signal`, `bases`, `base_starts`."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.info = json.loads((self.path / "store.json").read_text())
            if not isinstance(self.info, dict) or self.info.get("version") != STORE_VERSION:
                raise ValueError("written by another version")
            self.report()  # which needs all that should be there
            self.reads = np.array(load_npy(self.path / "reads.npy"))
            self.signal, self.bases, self.base_starts = (
                load_npy(self.path / f"{name}.npy") for name in ("signal", "bases", "base_starts")
            )
            arrays = [(x.dtype, x.ndim) for x in (self.reads, self.signal, self.bases, self.base_starts)]
            if arrays != [(np.dtype(kind), 1) for kind in (READ_DTYPE, "f2", "u1", "i4")]:
                raise ValueError("its files do not belong together")
            for start, length, array in (("start", "length", self.signal), ("bases_start", "bases_length", self.bases)):
                start, length = self.reads[start], self.reads[length]
                inside = (start >= 0) & (length >= 0) & (start <= len(array)) & (length <= len(array) - start)
                if not len(inside) or not inside.all() or len(self.bases) != len(self.base_starts):
                    raise ValueError("its files do not belong together")
            for read_id in self.reads["id"]:
                read_id.decode()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{self.path}: not a whole read store ({first_line(error)}); remove it and prepare it again"
            ) from error

    def report(self):
        """Lines that say what was read, what was kept, and what was left out and why."""
        kept, left_out = self.info["kept"], self.info["left_out"]
        return [
            f"read: {self.info['reads_read']} reads, {self.info['samples_read'] / 1e6:.1f} M samples",
            f"kept: {listed(kept)}",
            f"left out: {listed(left_out)}",
        ]


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poressl"


def open_data(paths):
    """A ReadStore for each of `paths`. Raw input is prepared once, into a cache keyed by its content and settings.

    No paths: simulated reads, said aloud.
    """
    if not paths:
        paths = [simulated_file(cache_folder())]
        print(f"no --data: simulated reads, {paths[0]}")
    stores = []
    for path in map(Path, paths):
        if is_store(path):
            stores.append(ReadStore(path))
            continue
        key = hashlib.blake2b(f"{STORE_VERSION} {SATURATED}".encode(), digest_size=16)
        files = sorted(path.rglob("*.npy")) if is_bonito(path) else raw_files(path)
        for file in files:
            try:
                key.update(str(file.relative_to(path)).encode())
                with open(file, "rb") as opened:
                    key.update(hashlib.file_digest(opened, "blake2b").digest())
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror})") from error
        cached = cache_folder() / f"{path.stem}-{key.hexdigest()}"
        make_once(cached, lambda path=path, cached=cached: prepare([path], cached))
        store = ReadStore(cached)
        print(f"{path}: {'; '.join(store.report())}; prepared in {cached}")
        stores.append(store)
    if len(set(all_gather_lists([tuple(zlib.crc32(store.reads.tobytes()) for store in stores)]))) > 1:
        raise InputError("--data: other reads on each host; give all the same")
    return stores


# ---------------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """N chunks. For unlabelled data targets are None."""

    signal: torch.Tensor  # (N, L) float32
    lengths: torch.Tensor  # (N,) int64, all L
    targets: torch.Tensor | None = None  # (N, longest) int64, 1-4, zero-padded
    target_lengths: torch.Tensor | None = None  # (N,) int64
    reads: tuple[str, ...] = ()  # ids of the reads that the chunks are of, also those of the other processes

    def to(self, device):
        return Batch(*(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in self))


class Chunks:
    """The chunks of one split of some stores; len() is how many an epoch has.

    split: "training" (a chunk starts anywhere in its read, anew each epoch) or "validation" (reads are tiled).
    labelled: only labelled reads, with their bases. share: "pretraining" or "finetuning" takes that share of the reads
    (five to one, by the hash of the id), None all. label_fraction: this share of the training reads, at least one;
    which, depends on label_seed.
    """

    def __init__(self, stores, chunk_len, split, labelled=False, share=None, label_fraction=1.0, label_seed=0):
        self.stores, self.chunk_len, self.split, self.labelled = stores, chunk_len, split, labelled
        self.reads = np.concatenate([store.reads for store in stores])
        self.store_of = np.repeat(np.arange(len(stores)), [len(store.reads) for store in stores])
        low = np.array([hash_of(read_id) % 2**32 for read_id in self.reads["id"]]) / 2**32
        keep = in_validation(self.reads) == (split == "validation")
        if share is not None and split == "training":
            keep &= (low < PRETRAINING) == (share == "pretraining")
        if labelled:
            keep &= self.reads["bases_length"] > 0
        names = ", ".join(str(store.path) for store in stores)
        uncut = set(self.reads["length"][keep & self.reads["whole"]].tolist()) - {chunk_len}
        if labelled and uncut:
            length = max(uncut)
            raise InputError(
                f"{names}: Bonito's chunks of {length} samples cannot be cut anew; add --chunk-len {length}"
            )
        long_enough = self.reads["length"] >= chunk_len
        self.too_short = int((keep & ~long_enough).sum())
        keep = np.flatnonzero(keep & long_enough)
        if label_fraction < 1:
            place = np.array([hash_of(read_id, label_seed) for read_id in self.reads["id"][keep]], np.uint64)
            keep = keep[np.argsort(place)][: max(1, round(label_fraction * len(keep)))]
        self.number_of_reads = len(keep)
        tiles = self.reads["length"][keep] // chunk_len
        self.read_of = np.repeat(keep, tiles)  # (chunks,) index in self.reads
        self.tile_of = np.arange(len(self.read_of)) - np.repeat(tiles.cumsum() - tiles, tiles)
        if not len(self.read_of):
            kind = "labelled " if labelled else ""
            raise InputError(
                f"{names}: no {kind}{split} read of at least {chunk_len} samples ({self.too_short} shorter); "
                "give more reads or a smaller --chunk-len"
            )
        if not labelled and len(self.read_of) < world_size():  # parts that are compared have to be equal
            raise InputError(f"{names}: only {len(self)} {split} chunks for {world_size()} processes; give more reads")
        self._epoch, self._order = -1, None

    def __len__(self):
        return len(self.read_of)

    def steps_per_epoch(self, batch_size):
        """How many whole batches an epoch has. InputError if none, or if processes cannot have equal parts of them."""
        if batch_size > len(self):
            raise InputError(f"--batch-size {batch_size}: more than the {len(self)} training chunks there are")
        if batch_size % world_size():
            raise InputError(f"--batch-size {batch_size}: cannot be split equally among {world_size()} processes")
        return len(self) // batch_size

    def batch(self, seed, step, batch_size):
        """This process's part of the training batch of this step; a remainder of the epoch is left out.

        The batch is a function of the arguments alone, `batch_size` the chunks of all processes.
        """
        epoch, place = divmod(step, len(self) // batch_size)
        if self._epoch != (seed, epoch):
            self._epoch, self._order = (seed, epoch), np.random.default_rng([seed, 0, epoch]).permutation(len(self))
        chosen = self.read_of[self._order[place * batch_size : (place + 1) * batch_size]]
        last = self.reads["length"][chosen] - self.chunk_len
        starts = np.random.default_rng([seed, 1, step]).integers(0, last + 1)
        part = part_of(batch_size)
        return self._cut(chosen[part], starts[part])._replace(reads=self._ids(chosen))

    def tiles(self, batch_size, equal=False):
        """Yields this process's part of all tiles, in order, in batches of at most batch_size in all processes.

        equal: batches of equally many chunks, so that their losses compare; what is left over, or too few for the
        processes to have equal parts, is left out.
        """
        end = len(self)
        if equal:
            batch_size = min(batch_size, len(self) // world_size() * world_size())
            end -= end % batch_size
        for first in range(0, end, batch_size):
            rows = np.arange(first, min(first + batch_size, end))
            rows = rows[part_of(len(rows))]
            if len(rows):
                yield self._cut(self.read_of[rows], self.tile_of[rows] * self.chunk_len)

    def bases(self, read, start):
        """Bases 1-4 (B,) of the chunk of row `read` that begins at sample `start`, and the chunk's sample of each."""
        table, store = self.reads[read], self.stores[self.store_of[read]]
        rows = slice(table["bases_start"], table["bases_start"] + table["bases_length"])
        bases, starts = np.asarray(store.bases)[rows], np.asarray(store.base_starts)[rows]  # slices of memmap are slow
        first, end = starts.searchsorted(np.array([start, start + self.chunk_len], starts.dtype))
        return bases[first:end], starts[first:end] - start

    def _cut(self, reads, starts):
        signal, first = np.empty((len(reads), self.chunk_len), np.float16), self.reads["start"][reads] + starts
        for number in np.unique(self.store_of[reads]):
            rows = self.store_of[reads] == number
            windows = np.lib.stride_tricks.sliding_window_view(self.stores[number].signal, self.chunk_len)
            signal[rows] = windows[first[rows]]  # a view of each stretch there is: these alone are read
        signal, lengths = torch.from_numpy(signal).float(), torch.full((len(reads),), self.chunk_len)
        if not self.labelled:
            return Batch(signal, lengths, reads=self._ids(reads))
        bases = [self.bases(read, start)[0] for read, start in zip(reads, starts, strict=True)]
        target_lengths = torch.tensor([len(row) for row in bases])
        targets = torch.zeros((len(reads), target_lengths.max()), dtype=torch.int64)
        for padded, row in zip(targets.numpy(), bases, strict=True):
            padded[: len(row)] = row
        return Batch(signal, lengths, targets, target_lengths, self._ids(reads))

    def _ids(self, reads):
        return tuple(read_id.decode() for read_id in self.reads["id"][reads])


def ctc_steps_needed(targets, target_lengths):
    """Time steps that CTC needs to spell each row of targets (N, S): a blank stands between equal neighbours."""
    inside = torch.arange(targets.shape[1], device=targets.device)[1:] < target_lengths[:, None]
    return target_lengths + ((targets[:, 1:] == targets[:, :-1]) & inside).sum(1)
