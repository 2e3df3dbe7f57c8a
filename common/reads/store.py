"""The read store: prepared reads in memory-mapped arrays, their table, and the cache of what scripts prepare.

raw file or folder -> raw_reads() -> prepare() -> a read store on disk -> ReadStore.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import InputError
from common.reads.bonito import bonito_reads
from common.reads.files import NpyWriter, load_npy, make_once, written_whole
from common.reads.formats import (
    Rejected,
    count_reads,
    first_line,
    is_bonito,
    is_store,
    listed,
    raw_files,
    reads_of,
)
from common.reads.normalise import SATURATED, normalised
from common.reads.simulate import simulated_file

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
        # of the basecall's alignment to the reference whose bases the read has, 0 if there was none:
        ("identity", "f4"),  # share of matches in the alignment
        ("coverage", "f4"),  # share of the called bases in the alignment
        ("kit", "S32"),  # product codes; empty if unknown
        ("flow_cell", "S16"),
        ("rna", "?"),  # known to be RNA
    ]
)
OLDER = [np.dtype(READ_DTYPE.descr[:columns]) for columns in (10, 12)]  # tables written before there were all columns


class StoreWriter:
    """Writes the files of a read store into `folder` and counts what was kept and why the rest was not."""

    def __init__(self, folder):
        self.folder, self.reads, self.kept, self.left_out = folder, [], Counter(), Counter()
        self.ids, self.raw_reads, self.samples = set(), 0, 0
        self.signal = NpyWriter(folder / "signal.npy", np.float16)
        self.bases = NpyWriter(folder / "bases.npy", np.uint8)
        self.base_starts = NpyWriter(folder / "base_starts.npy", np.int32)

    def add(self, read_id, signal, bases=(), base_starts=(), **columns):
        row = {"sample_rate": 0, "shift": 0, "scale": 1, "whole": False, "split": -1, "identity": 0, "coverage": 0}
        row |= {"kit": "", "flow_cell": "", "rna": False}
        row |= {"id": read_id.encode(), "start": self.signal.rows, "length": len(signal)}
        row |= {"bases_start": self.bases.rows, "bases_length": len(bases)} | columns
        self.reads.append(tuple(row[name] for name in READ_DTYPE.names))
        self.signal.append(signal)
        self.bases.append(bases)
        self.base_starts.append(base_starts)
        self.kept["labelled" if len(bases) else "unlabelled"] += 1

    def counted(self, raws, bar):
        """Yields `raws`, counted as read."""
        for raw in raws:
            self.raw_reads += 1
            self.samples += 0 if isinstance(raw, Rejected) else len(raw.dacs)
            yield raw
            bar.update()

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
                columns = ("sample_rate", "split", "identity", "coverage", "kit", "flow_cell", "rna")
                columns = {name: getattr(raw, name) for name in columns}
                self.add(raw.id, signal, bases, starts, shift=shift, scale=scale, **columns)
                self.ids.add((raw.id, labelled))  # the same read with and without bases is of use for both
                return
            result = "empty" if min_len <= 1 else f"shorter than {min_len} samples"
        self.left_out[result] += 1

    def add_bonito(self, chunks):
        """Keeps Bonito's chunks as reads that cannot be cut, and counts those that are Rejected."""
        for chunk in chunks:
            if isinstance(chunk, Rejected):
                self.left_out[chunk.reason] += 1
                continue
            read_id, signal, bases, split = chunk
            self.raw_reads += 1
            self.samples += len(signal)
            self.add(read_id, signal, bases, np.zeros(len(bases)), whole=True, split=split)

    def close(self, **info):
        for file in (self.signal, self.bases, self.base_starts):
            file.close()
        np.save(self.folder / "reads.npy", np.array(self.reads, READ_DTYPE))
        info |= {"version": STORE_VERSION, "reads_read": self.raw_reads, "samples_read": self.samples}
        info |= {"kept": dict(self.kept), "left_out": dict(self.left_out)}
        (self.folder / "store.json").write_text(json.dumps(info, indent=1))


def prepare(paths, out, min_len=1, labelled_only=False, labels=None):
    """Reads raw files, folders of them and Bonito folders into a new read store, the folder `out`, and opens it.

    labels: the Basecalls of a BAM or a Genome, which gives reads their bases, or says why they are left out. InputError
    if a file that is named itself cannot be opened, or nothing can be kept; `out` appears when it is whole.
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
                    store.add_bonito(bonito_reads(file))
                    continue
                raws = store.counted(reads_of(file, named), bar)
                for raw in labels.labelled(raws) if labels else raws:
                    store.add_raw(raw, min_len, labelled_only)
        if labels:
            store.left_out += labels.unused()
        if not store.reads:
            why = f"no read can be used (left out: {listed(store.left_out)})" if store.left_out else "no read in it"
            short = "; give a smaller --chunk-len" if f"shorter than {min_len} samples" in store.left_out else ""
            raise InputError(f"{', '.join(map(str, paths))}: {why}{short}")
        store.close(sources=[str(path) for path in paths])
    return ReadStore(out)


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
            if self.reads.dtype in OLDER:
                table = np.zeros(self.reads.shape, READ_DTYPE)
                table[list(self.reads.dtype.names)] = self.reads
                self.reads = table
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


def open_stores(paths):
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
        key = hashlib.blake2b(f"{STORE_VERSION} {SATURATED} {READ_DTYPE.names}".encode(), digest_size=16)
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
    return stores
