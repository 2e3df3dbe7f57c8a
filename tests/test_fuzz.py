"""Good files of every format, mutated: each ends as a store or as an InputError of one line that names the file.

Never another exception, a crash of the interpreter, a hang (CPU time is bounded) or memory beyond MEMORY. A worker, a
process of its own, does the cases, so that one which kills it is known; hypothesis makes them, the same in each run.

What holds of the signal: reads that a mutation did not touch come out bit by bit as they were. A read of which other
than the samples was touched is left out, or its signal is a piece of what it was. Samples that were flipped are found
out where there is a checksum (gzip, BGZF); elsewhere (POD5, VBZ, uncompressed HDF5, .npy) that read's, and only that
read's, may be other numbers. Flips in the structure of a file without checksums (HDF5, POD5, .npy headers, the table of
the read store) may do more; there it only has to end well, with a store that is whole and can be used.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import struct
import tempfile
import traceback
import zlib
from array import array
from pathlib import Path

import h5py
import hypothesis.configuration
import numpy as np
import pod5
import pyarrow as pa
import pysam
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common import InputError
from common.chunks import Chunks, open_data
from common.reads.bam import Basecalls
from common.reads.store import prepare
from tests.test_bam import aligned, make, unaligned, write_bam, write_fasta
from tests.test_formats import some_reads, wander, write_fast5, write_mapped, write_pod5

hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "poressl-hypothesis")  # not in the tree
MEMORY = 400 * 2**20  # bytes over what the worker begins with
CPU = 10  # seconds a case
fuzzed = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a shrunken case is worth less than the minutes it takes
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
VBZ = {"compression": 32020, "compression_opts": (0, 2, 1, 1)}  # as MinKNOW writes it
KINDS = ["mapped.hdf5", "multi.fast5", "single.fast5", "reads.pod5", "bonito", "store", "called.bam", "md.bam"]
KINDS += ["reference.bam", "vbz.fast5"]


# ------------------------------------------------------------------------------------------------------- good files


def make_good(folder):
    """One good input of each kind in `folder`."""
    reads = some_reads()
    write_mapped(folder / "mapped.hdf5", reads, sample_rate=4000.0)
    write_fast5(folder / "multi.fast5", reads)
    write_fast5(folder / "single.fast5", some_reads(1), single=True)
    write_fast5(folder / "vbz.fast5", reads)
    with h5py.File(folder / "vbz.fast5", "r+") as file:
        for name, data, _ in hdf5_reads(file, "vbz.fast5"):
            del file[data]
            file.create_dataset(data, data=reads[name], chunks=(1000,), **VBZ)
    write_pod5(folder / "reads.pod5", reads)
    (folder / "bonito").mkdir()
    rng = np.random.default_rng(0)
    chunks, references = rng.standard_normal((12, 500)).astype(np.float16), rng.integers(1, 5, (12, 9)).astype("u1")
    arrays = {"chunks": chunks, "references": references, "reference_lengths": np.full(12, 9, np.uint16)}
    for name, values in arrays.items():
        np.save(folder / "bonito" / f"{name}.npy", values)
    prepare([folder / "mapped.hdf5"], folder / "store")
    made = {read_id: make(seed, length=250) for seed, read_id in enumerate(reads)}
    write_pod5(folder / "called.pod5", {read_id: wander(rng, read.samples) for read_id, read in made.items()})
    write_bam(folder / "called.bam", [unaligned(read, read_id) for read_id, read in made.items()])
    contigs = {}
    records = [aligned(read, read_id, contigs, reverse=i % 2) for i, (read_id, read) in enumerate(made.items())]
    write_bam(folder / "md.bam", records, contigs)
    for record in records:
        record.set_tag("MD", None)
    write_bam(folder / "reference.bam", records, contigs)
    write_fasta(folder / "reference.fasta", contigs)
    pysam.faidx(str(folder / "reference.fasta"))


def opened(path, good):
    """The store that the input at `path` gives."""
    if path.name == "store":
        return open_data([path])[0]
    out, basecalls = path.parent / "out", None
    if path.suffix == ".bam":
        basecalls = Basecalls([path], good / "reference.fasta" if path.name == "reference.bam" else None)
        path = good / "called.pod5"
    return prepare([path], out, labels=basecalls)


def content(store, whole=True):
    """{id: (signal, bases, base_starts)} of a store; its table has to be right, and if `whole` its labels, too."""
    found = {}
    for row in store.reads:
        first, length, first_base, bases = (int(row[k]) for k in ("start", "length", "bases_start", "bases_length"))
        assert min(first, length, first_base, bases) >= 0, "negative place in the store"
        assert first + length <= len(store.signal) and first_base + bases <= len(store.bases), "beyond the store"
        read = (
            store.signal[first : first + length],
            *(x[first_base : first_base + bases] for x in (store.bases, store.base_starts)),
        )
        read_id = row["id"].decode()
        assert read_id not in found, f"twice in the store: {read_id}"
        assert not whole or read_id.isprintable(), f"id not printable: {read_id!r}"
        assert not whole or not bases or (read[1].min() >= 1 and read[1].max() <= 4), "bases other than 1 to 4"
        inside = not bases or 0 <= read[2][0] <= read[2][-1] <= length
        assert not whole or (inside and (np.diff(read[2]) >= 0).all()), "base starts out of order"
        found[read_id] = tuple(map(np.array, read))
    return found


def used(store):
    """Takes every chunk of a store, as training does."""
    store.report()
    for split in ("training", "validation"):
        for labelled in (False, True):
            with contextlib.suppress(InputError):
                list(Chunks([store], 500, split, labelled).tiles(8))


def is_piece(signal, whole):
    """Whether a signal is a piece of another, up to the rounding of another calibration."""
    if len(signal) > len(whole):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(whole.astype(np.float32), max(len(signal), 1))
    return not len(signal) or np.isclose(windows, signal.astype(np.float32), rtol=2**-9, atol=2**-9).all(1).any()


# --------------------------------------------------------------------------------------------------------- mutations
# Each changes the copy at `path` and returns what it Touched.


class Touched:
    """What a mutation may change: samples of some reads, other than that of some ("all": of each), or anything."""

    def __init__(self, samples=(), rest=(), anything=False):
        self.samples, self.rest, self.anything = set(samples), set(rest), anything


def places_of_samples(path, kind):
    """{id: [(first byte, end)]} of the samples in a file."""
    places = {}
    if kind.endswith("pod5"):
        whole = path.read_bytes()
        with pod5.Reader(path) as reader:
            for read in reader.reads():
                packed = bytes(pod5.signal_tools.vbz_compress_signal(read.signal))
                places[str(read.read_id)] = [(whole.index(packed), whole.index(packed) + len(packed))]
    elif kind.endswith(("hdf5", "fast5")):
        with h5py.File(path) as file:
            for name, data, _ in hdf5_reads(file, kind):
                data = file[data].id
                chunks = (
                    [data.get_chunk_info(i) for i in range(data.get_num_chunks())] if data.get_offset() is None else []
                )
                places[name] = [(chunk.byte_offset, chunk.byte_offset + chunk.size) for chunk in chunks]
                if not chunks:
                    places[name] = [(data.get_offset(), data.get_offset() + data.get_storage_size())]
    elif path.name == "chunks.npy":
        places = {f"chunk-{i}": [(128 + 1000 * i, 128 + 1000 * (i + 1))] for i in range(12)}
    elif path.name == "signal.npy":
        table = np.load(path.parent / "reads.npy")
        places = {
            row["id"].decode(): [(128 + 2 * row["start"], 128 + 2 * (row["start"] + row["length"]))] for row in table
        }
    return places


def hdf5_reads(file, kind):
    """The id, the path of the samples and the path of the group of each read in an HDF5 file."""
    if kind == "mapped.hdf5":
        return [(name, f"Reads/{name}/Dacs", f"Reads/{name}") for name in file["Reads"]]
    if kind != "single.fast5":
        return [(name.removeprefix("read_"), f"{name}/Raw/Signal", name) for name in file]
    read_id = file["Raw/Reads/Read_7"].attrs["read_id"].decode()
    return [(read_id, "Raw/Reads/Read_7/Signal", "/")]


def part_of(path, which):
    """A file of a folder, or the file."""
    if path.is_file():
        return path
    files = sorted(path.iterdir())
    return files[which % len(files)]


def changed_bytes(whole, mutation):
    """The bytes after a mutation, and the set of the places that it changed."""
    kind, *values = mutation
    whole, before = bytearray(whole), whole
    if kind == "cut":
        return bytes(whole[: values[0] * len(whole) >> 20]), None
    if kind == "insert":
        place = values[0] * len(whole) >> 20
        return bytes(whole[:place] + values[1] + whole[place:]), None
    if kind == "flip":
        for place, value in values[0]:
            whole[place * len(whole) >> 20] ^= value
    if kind == "fill":
        place = values[0] * len(whole) >> 20
        length = min(values[1], len(whole) - place)
        whole[place : place + length] = bytes([values[2]]) * length
    if kind == "rename":
        whole = bytearray(bytes(whole).replace(values[0], values[0][::-1]))
    return bytes(whole), {i for i, (a, b) in enumerate(zip(before, whole, strict=True)) if a != b}


PLACES = st.integers(0, 2**20 - 1)  # in 2**20ths of the file
NAMES = [b"offset", b"range", b"digitisation", b"Dacs", b"Signal", b"Reads", b"Reference", b"read_id", b"samples"]
NAMES += [b"calibration_offset", b"signal", b"minknow.vbz", b"run_info", b"sample_rate", b"channel_id", b"ARROW1"]
NAMES += [b"sampling_rate", b"num_samples", b"calibration_scale", b"minknow.uuid"]
FLIPS = st.lists(st.tuples(PLACES, st.integers(1, 255)), min_size=1, max_size=6)
BYTES = st.one_of(
    st.tuples(st.just("flip"), FLIPS),
    st.tuples(st.just("fill"), PLACES, st.integers(1, 64), st.sampled_from([0, 0x7F, 0x80, 0xFF])),
    st.tuples(st.just("cut"), PLACES),
    st.tuples(st.just("insert"), PLACES, st.sampled_from([b"\0", b"\xff" * 8, b"read_" * 20])),
    st.tuples(st.just("rename"), st.sampled_from(NAMES)),
)


def mutate_bytes(path, which, mutation):
    """Cuts, flips, fills, inserts; a file of which the bytes are all in the samples is known to be so."""
    file = part_of(path, which)
    places = places_of_samples(file, path.name)
    whole, changed = changed_bytes(file.read_bytes(), mutation)
    file.write_bytes(whole)
    if changed is None:
        return Touched(anything=True)
    samples = {name for name, spans in places.items() for a, b in spans if any(a <= i < b for i in changed)}
    inside = {i for spans in places.values() for a, b in spans for i in changed if a <= i < b}
    if path.suffix == ".bam":
        return Touched()  # it has checksums
    return Touched(samples, anything=inside != changed)


def mutate_bam_bytes(path, which, mutation):
    """The same within the blocks of a BAM, checksums renewed."""
    with pysam.BGZFile(str(path)) as file:
        whole = file.read()
    whole, _ = changed_bytes(whole, mutation)
    blocks = b""
    for block in [*(whole[i : i + 60_000] for i in range(0, len(whole), 60_000)), b""]:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        packed = packer.compress(block) + packer.flush()
        blocks += struct.pack("<4BI2BH2B2H", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(packed) + 25)
        blocks += packed + struct.pack("<2I", zlib.crc32(block), len(block))
    path.write_bytes(blocks)
    return Touched(rest=["all"])


ODD_DATA = {
    "floats": np.linspace(0, 1000, 3000),
    "nan": np.full(3000, np.nan),
    "2-D": np.arange(3000, dtype=np.int16).reshape(2, -1),
    "scalar": np.int16(5),
    "text": "text",
    "bytes": np.full(101, b"abc"),
    "objects": np.array(["a", "b"] * 50, h5py.string_dtype()),
    "empty": np.zeros(0, np.int16),
    "null": h5py.Empty("i2"),
    "extremes": np.array([-(2**63), 2**63 - 1] * 60),
    "unsigned": np.full(101, 2**64 - 1, np.uint64) - np.arange(101, dtype=np.uint64),
    "bool": np.arange(101) % 2 == 0,
    "complex": np.ones(101, np.complex64),
    "compound": np.zeros(101, [("a", "i4"), ("b", "f4")]),
    "negative": -np.arange(101, dtype=np.int32),
    "long": np.arange(5000, dtype=np.int32),
    "short": np.arange(7, dtype=np.int16),
    "big-endian": np.arange(3000).astype(">i4"),
}
DECLARED = {"declared 512 MiB": 2**28, "declared 8 TiB": 2**42, "declared 2**62": 2**62}
ODD_LINKS = ["missing", "group", "dangling", "loop", "elsewhere", *DECLARED, "declared and contiguous"]
ODD_NUMBERS = {
    "nan": np.nan, "inf": np.inf, "-inf": -np.inf, "zero": 0.0, "negative": -1.0, "1e300": 1e300, "tiny": 5e-324,
    "text": "text", "not UTF-8": np.bytes_(b"\xff\xfe"), "two": np.array([1.0, 2.0]), "none": np.zeros(0),
    "null": h5py.Empty("f8"), "integer": 2**63 - 1, "bool": True, "complex": 1j, "missing": None,
    "1e17": 1e17, "2-D": np.ones((2, 2)), "long text": "a\n" * 5000,
}  # fmt: skip
ODD_READ_NAMES = [b"\xff\xfe", b"a" * 60, b"a" + "é".encode() * 30, b" ", b"a\nb", b"read_", b"\x1b[31m"]


def put_data(file, path, value):
    """Puts another thing in the place of a data set, or a group."""
    del file[path]
    if value == "group":
        file.create_group(path)
    elif value == "dangling":
        file[path] = h5py.SoftLink("/nowhere")
    elif value == "elsewhere":
        file[path] = h5py.ExternalLink("nowhere.hdf5", "/a")
    elif value == "loop":
        file[path] = h5py.SoftLink(path)
    elif value == "declared and contiguous":
        file.create_dataset(path, (2**34,), "i2")
    elif value in DECLARED:
        file.create_dataset(path, (DECLARED[value],), "i2", chunks=(2**16,), compression="gzip")
    elif value != "missing":
        file[path] = ODD_DATA[value]


def mutate_hdf5(path, which, target, value):
    """Changes one thing of one read: an attribute, a data set, a group, or its name."""
    with h5py.File(path, "r+") as file:
        reads = hdf5_reads(file, path.name)
        name, samples, group = reads[which % len(reads)]
        if value in ODD_READ_NAMES:
            if path.name == "single.fast5":
                file["Raw/Reads/Read_7"].attrs["read_id"] = np.bytes_(value)
            else:
                new = file[group].parent.id, value if path.name == "mapped.hdf5" else b"read_" + value
                new[0].links.move(group.split("/")[-1].encode(), new[0], new[1])
            return Touched([name])
        things, attributes = [], []

        def note(place, thing):
            things.append(place)
            attributes.extend((place, attribute) for attribute in thing.attrs)

        file[group].visititems(note)
        attributes += [("", attribute) for attribute in file[group].attrs]
        if value in ODD_DATA or value in ODD_LINKS:
            place = f"{group}/{things[target % len(things)]}"
            put_data(file, place, value)
            return Touched([name] if samples.strip("/").startswith(place.strip("/")) else (), [name])
        place, attribute = attributes[target % len(attributes)]
        attrs = file[f"{group}/{place}"].attrs
        del attrs[attribute]
        value = ODD_NUMBERS[value.removeprefix("attribute ")]
        if value is not None:
            attrs[attribute] = value
        # the id is in an attribute of a single read
        return Touched([name] if attribute == "read_id" and path.name == "single.fast5" else (), [name])


HDF5 = st.tuples(
    st.integers(0, 3),
    st.integers(0, 11),
    st.sampled_from([*ODD_DATA, *ODD_LINKS, *(f"attribute {name}" for name in ODD_NUMBERS), *ODD_READ_NAMES]),
)


def mutate_pod5(path, which, field, value):
    """Writes the reads again, one of them with an odd value."""
    with pod5.Reader(path) as reader:
        reads = [read.to_read() for read in reader.reads()]
    read = reads[which % len(reads)]
    if field == "signal":
        read.signal = np.resize(np.array(value, np.int16), 3000) if value else np.zeros(0, np.int16)
    elif field == "sample_rate":
        read.run_info = dataclasses.replace(read.run_info, sample_rate=value)
    else:
        calibration = {"offset": read.calibration.offset, "scale": read.calibration.scale} | {field: value}
        read.calibration = pod5.Calibration(**calibration)
    path.unlink()
    with pod5.Writer(path) as writer:
        writer.add_reads(reads)
    name = str(read.read_id)
    return Touched([name] if field == "signal" else (), [name])


POD5 = st.tuples(
    st.integers(0, 3),
    st.sampled_from(
        [(field, value) for field in ("offset", "scale") for value in (np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, 1e-45)]
        + [("offset", 1e17), ("sample_rate", 0), ("sample_rate", 65535)]
        + [("signal", value) for value in ([], [0], [32767, -32768], list(range(500)))]
    ),
).map(lambda drawn: (drawn[0], *drawn[1]))


def packed_chunk(samples, vbz):
    """A chunk of HDF5 that holds these samples."""
    if not vbz:
        return zlib.compress(samples.tobytes())
    with h5py.File.in_memory() as file:
        return file.create_dataset("a", data=samples, chunks=samples.shape, **VBZ).id.read_direct_chunk((0,))[1]


def zeros(number):
    """zlib.compress(bytes(number)), quicker: of the same block of a MiB over and over."""
    if number % 2**20:
        return zlib.compress(bytes(number))
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\x01" + block * (number // 2**20) + b"\x03\0" + struct.pack(">I", (number % 65521 << 16) + 1)


def mutate_chunk(path, which, chunk, how, value):
    """Changes a compressed chunk of the samples of one read in a FAST5: its bytes, or the lengths that it says."""
    vbz = path.name == "vbz.fast5"
    with h5py.File(path, "r+") as file:
        reads = hdf5_reads(file, path.name)
        name, samples, _ = reads[which % len(reads)]
        samples = file[samples]
        place = (chunk % samples.id.get_num_chunks() * samples.chunks[0],)
        skipped, packed = samples.id.read_direct_chunk(place)
        if how == "bytes":
            packed, _ = changed_bytes(packed, value)
        elif how == "first bytes":
            packed = packed[:value]
        elif how == "holds":  # so many samples
            packed = packed_chunk(np.resize(samples[:], value), vbz)
        elif how == "zeros":  # so many bytes
            packed = packed[:4] + pa.compress(bytes(value), "zstd", asbytes=True) if vbz else zeros(value)
        elif how == "not compressed":
            skipped, packed = 1, samples[:value].tobytes()
        elif how == "length":
            packed = struct.pack("<I", value % 2**32) + packed[4:]
        elif how == "zstd length":  # in 8 bytes, instead of 2
            assert packed[8] == 0x60
            packed = packed[:8] + b"\xe0" + struct.pack("<Q", value % 2**64) + packed[11:]
        elif how == "keys":  # how many bytes each sample has, two bits for each, before these bytes
            content = pa.CompressedInputStream(pa.BufferReader(packed[4:]), "zstd").read()
            content = bytes([value]) * (samples.chunks[0] // 4) + content[samples.chunks[0] // 4 :]
            packed = packed[:4] + pa.compress(content, "zstd", asbytes=True)
        samples.id.write_direct_chunk(place, packed or b"\0", skipped)  # an empty one cannot be written
    return Touched(samples=[name] if how == "bytes" else (), rest=[name])


LENGTHS = [0, 1, 2, 4, 1998, 1999, 2001, 2002, 4000, 20_000, 2**26, 2**31 - 2, 2**31, -2, -8]  # the true one is 2000
CHUNKS = [("first bytes", value) for value in range(1, 18)]
CHUNKS += [("holds", value) for value in (1, 2, 500, 999, 1001, 10**5)]
CHUNKS += [("zeros", value) for value in (1, 10**5, 2**26)]  # not more: VBZ's filter unpacks all that there truly is
CHUNKS += [("not compressed", value) for value in (1, 500, 999)]
VBZ_CHUNKS = CHUNKS + [("length", value) for value in LENGTHS]
VBZ_CHUNKS += [("zstd length", value) for value in (0, 1, 10**5, 2**31, 2**32 + 5, 2**40, -1, -2)]
VBZ_CHUNKS += [("keys", value) for value in (0, 0x55, 0xAA, 0xFF)]


def chunk_mutations(kinds):
    """A read, one of its chunks, and what is done to it."""
    done = st.one_of(st.tuples(st.just("bytes"), BYTES), st.sampled_from(kinds))
    return st.tuples(st.integers(0, 3), st.integers(0, 2), done).map(lambda drawn: (*drawn[:2], *drawn[2]))


def put_table(path, name, change):
    """Writes one of the tables of a POD5 ("read", "run_info", "signal") anew: change(batch) gives schema and batches.

    It comes behind the others; the footer, which has the place of each, is made to point there.
    """
    with pod5.Reader(path) as reader:
        place = getattr(reader.inner_file_reader, f"get_file_{name}_table_location")()
    whole = path.read_bytes()
    schema, batches = change(pa.ipc.open_file(whole[place.offset : place.offset + place.length]).get_batch(0))
    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    table, footer = out.getvalue().to_pybytes(), whole.rindex(b"FOOTER")
    old, new = struct.pack("<2q", place.offset, place.length), struct.pack("<2q", footer, len(table))
    assert footer % 8 == 0 and whole.count(old, footer) == 1
    path.write_bytes(whole[:footer] + table + bytes(-len(table) % 8) + whole[footer:].replace(old, new))


ODD_COLUMNS = {
    "missing": lambda old: None,
    "all null": lambda old: pa.nulls(len(old), old.type),
    "nulls": lambda old: pa.nulls(len(old)),
    "floats": lambda old: pa.array([np.nan, 1e300, -1.0, 0.0][: len(old)]),
    "int8": lambda old: pa.array([-1, 0, 1, 2][: len(old)], pa.int8()),
    "int64": lambda old: pa.array([-(2**63), 2**63 - 1, 0, 2300][: len(old)]),
    "text": lambda old: pa.array(["a"] * len(old)),
    "bytes": lambda old: pa.array([b"abc"] * len(old)),
    "lists": lambda old: pa.array([[1]] * len(old), pa.list_(pa.int16())),
    "large lists": lambda old: pa.array([[1]] * len(old), pa.large_list(pa.int16())),  # uncompressed signal
    "structs": lambda old: pa.array([{"a": 1}] * len(old)),
    "dictionary": lambda old: pa.array(["a"] * len(old)).dictionary_encode(),
    "bool": lambda old: pa.array([True] * len(old)),
    "times": lambda old: pa.array([2**62] * len(old), pa.timestamp("ns")),
}
ODD_BATCHES = {
    "no batch": lambda batch: [],
    "an empty batch": lambda batch: [batch[:0]],
    "an empty batch first": lambda batch: [batch[:0], batch],
    "unequal batches": lambda batch: [batch[:1], batch[1:3], batch[3:]],
    "twice": lambda batch: [batch, batch],
    "cut": lambda batch: [batch[:2]],
}
ODD_VALUES = {
    ("read", "read_id"): [None, bytes(16), b"\xff" * 16],
    ("read", "num_samples"): [0, 1, 2**31, 2**64 - 1, None],
    ("read", "signal"): [None, [], [None], [4], [2**31], [2**63], [2**64 - 1], [0] * 5, [0, 1], [0] * 100_000],
    ("read", "calibration_offset"): [np.nan, np.inf, None],
    ("read", "calibration_scale"): [np.nan, -np.inf, 0.0, None],
    ("read", "run_info"): [-1, 1, 2**15 - 1, None],  # in these three, places in a dictionary
    ("read", "end_reason"): [-1, 99, None],
    ("read", "pore_type"): [-1, 99, None],
    ("signal", "read_id"): [None, bytes(16)],
    ("signal", "samples"): [0, 1, 1999, 102_400, 2**31, 2**32 - 1, None],
    ("signal", "signal"): [None, b"", b"a", bytes(5000), b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 9],
    ("run_info", "acquisition_id"): [None, "", "a\n" * 5000],
    ("run_info", "sample_rate"): [0, 65535, None],
    ("run_info", "sequencing_kit"): [None, "", "rna", "a\n" * 5000],
    ("run_info", "flow_cell_product_code"): [None, "", "FLO-\x1b", "a\n" * 5000],
    ("run_info", "context_tags"): [None, [], [("kit", None)], [("a", "a")] * 5000],
    ("run_info", "acquisition_start_time"): [2**62, None],
}


def mutate_arrow(path, which, table, column, how, value=None):
    """Changes one of the Arrow tables in a POD5, a column of it, or one value in that."""
    with pod5.Reader(path) as reader:
        names = [str(read.read_id) for read in reader.reads()]  # each has a row of signal, too

    def change(batch):
        if how in ODD_BATCHES:
            return batch.schema, ODD_BATCHES[how](batch)
        place, row = batch.schema.get_field_index(column), which % len(batch)
        field, old = batch.schema.field(place), batch.column(place)
        batch = batch.remove_column(place)
        if how in ODD_COLUMNS:
            new = ODD_COLUMNS[how](old)
            if new is not None:
                batch = batch.add_column(place, pa.field(column, new.type, metadata=field.metadata), new)
            return batch.schema, [batch]
        in_dictionary = pa.types.is_dictionary(old.type)
        plain = old.indices if in_dictionary else old.cast(pa.int64()) if pa.types.is_timestamp(old.type) else old
        values = plain.to_pylist()
        values[row] = values[row - 1] if how == "that of another" else value
        if in_dictionary:
            new = pa.DictionaryArray.from_arrays(pa.array(values, pa.int16()), old.dictionary, safe=False)
        else:
            new = pa.array(values, old.type)
        batch = batch.add_column(place, field, new)
        return batch.schema, [batch]

    put_table(path, table, change)
    name, before = names[which % len(names)], names[which % len(names) - 1]
    if how == "that of another" and (table, column) == ("read", "read_id"):
        return Touched(samples=[before], rest=[name, before])  # of two reads of one id the first is taken
    return Touched(rest=["all"] if how in ODD_COLUMNS or how in ODD_BATCHES or table == "run_info" else [name])


ARROW = st.tuples(
    st.integers(0, 3),
    st.sampled_from(
        [(*place, "value", value) for place, values in ODD_VALUES.items() for value in values]
        + [(*place, "that of another") for place in ODD_VALUES]
        + [(*place, how) for place in ODD_VALUES for how in ODD_COLUMNS]
        + [(table, "", how) for table in ("read", "signal", "run_info") for how in ODD_BATCHES]
    ),
).map(lambda drawn: (drawn[0], *drawn[1]))


ODD_ARRAYS = {
    "f8": np.full((12, 500), 1e300),
    "nan": np.full((12, 500), np.nan, np.float16),
    "f4": np.linspace(0, 1, 6000, dtype=np.float32).reshape(12, 500),
    "text": np.full((12, 500), b"abc"),
    "3-D": np.zeros((12, 5, 100), np.float16),
    "scalar": np.float16(3),
    "none": np.zeros((0, 500), np.float16),
    "no width": np.zeros((12, 0), np.float16),
    "no bases": np.zeros((12, 0), np.uint8),
    "no lengths": np.zeros(12, np.uint8),
    "zeros": np.zeros((12, 9), np.uint8),
    "negative": np.full((12, 9), -1),
    "huge lengths": np.full(12, 2**64 - 1, np.uint64),
    "negative lengths": np.full(12, -(2**63)),
    "long": np.ones(10_000, np.int64),
    "bool": np.ones(12, bool),
    "complex": np.ones((12, 500), np.complex64),
    "objects": np.array([{}] * 12),
    "dates": np.zeros(12, "M8[s]"),
    "fortran": np.asfortranarray(np.linspace(0, 1, 6000).reshape(12, 500)),
    "compound": np.zeros(12, [("a", "i4"), ("b", "f4")]),
}
ODD_HEADERS = [
    "{'descr': '<f2', 'fortran_order': False, 'shape': (1099511627776,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000000000000000000000,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (-12, 500), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (12, 500.0), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': 12, }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (12,), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (12,), }",
    "{'descr': '|S2147483647', 'fortran_order': False, 'shape': (12,), }",
    "{'descr': '<q9', 'fortran_order': False, 'shape': (12,), }",
    "{'descr': [], 'fortran_order': False, 'shape': (12,), }",
    "{'descr': '<f2', 'fortran_order': 3, 'shape': (12,), }",
    "{'descr': '<f2', 'shape': (12,), }",
    "{'descr': (((((",
    "'''",
    "-" * 9000 + "1",
    "[" * 3000,
    "\\",
    "  a\n b",
    "",
]
ODD_FILES = {
    "empty": b"",
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x04N.",
    "npy": b"\x93NUMPY",
    "text": b"text",
}
ODD_JSON = [
    "[]",
    "null",
    "3",
    '"a"',
    "{}",
    "[" * 100_000,
    "\x00",
    "NaN",
    '{"version": %d}',
    '{"version": %d, "kept": []}',
]


def mutate_npy(path, which, value):
    """Puts another array, a header or no array at all in the place of one of a folder's files."""
    file = part_of(path, which)
    if value in ODD_ARRAYS:
        with open(file, "wb") as out:
            np.save(out, ODD_ARRAYS[value])
    elif value in ODD_FILES:
        file.write_bytes(ODD_FILES[value])
    elif value in ODD_JSON:
        version = json.loads((path / "store.json").read_text())["version"] if (path / "store.json").exists() else 0
        file.write_text(value.replace("%d", str(version)))
    elif value == "missing":
        file.unlink()
    elif value == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(value) + 1) + f"{value}\n".encode() + bytes(24000))
    return Touched(anything=True)


NPY = st.tuples(
    st.integers(0, 4), st.sampled_from([*ODD_ARRAYS, *ODD_HEADERS, *ODD_FILES, *ODD_JSON, "missing", "folder"])
)


def mutate_table(path, which, field, value):
    """Changes one value in the table of a store."""
    table = np.load(path / "reads.npy")
    with np.errstate(over="ignore"):
        table[field][which % len(table)] = value
    np.save(path / "reads.npy", table)
    return Touched(anything=True)


ODD_PLACES = [-1, -(2**63), 2**63 - 1, 2**40, 10**4, 1, 0]
TABLE = st.tuples(
    st.integers(0, 3),
    st.sampled_from(
        [(field, value) for field in ("start", "length", "bases_start", "bases_length") for value in ODD_PLACES]
        + [("sample_rate", np.nan), ("shift", np.inf), ("id", b"\xff\xfe"), ("id", b""), ("split", 7), ("split", -128)]
        + [("id", "é".encode()[:1]), ("whole", True), ("kit", b"\xff\xfe"), ("flow_cell", b"FLO-\n")]
    ),
).map(lambda drawn: (drawn[0], *drawn[1]))


BIG = 2**28 - 1  # the longest operation in a CIGAR
ODD_TAGS = {
    "mv A": ("mv", "a", "A"),
    "mv int": ("mv", 5, "i"),
    "mv text": ("mv", "5,1,0", "Z"),
    "mv floats": ("mv", array("f", [5, 1, 0, 1]), None),
    "mv short": ("mv", array("b", [5]), None),
    "mv stride 0": ("mv", array("b", [0, 1, 0]), None),
    "mv negative": ("mv", array("b", [-5, 1, 0]), None),
    "mv wide": ("mv", array("I", [2**32 - 1] * 400), None),
    "mv missing": ("mv", None, None),
    "MD empty": ("MD", "", "Z"),
    "MD number": ("MD", 7, "i"),
    "MD long number": ("MD", "9" * 5000, "Z"),
    "MD letters": ("MD", "0" + "A0" * 5000, "Z"),
    "MD missing": ("MD", None, None),
    "pi": ("pi", "a", "Z"),
    "pi number": ("pi", 5, "i"),
    "sp": ("sp", 3, "i"),
    "dx text": ("dx", "a", "Z"),
    "dx 1": ("dx", 1, "i"),
    "not ASCII": ("RG", "\xe9", "Z"),
} | {
    f"{tag} {value}": (tag, value, {int: "i", float: "f", str: "Z"}.get(type(value)))
    for tag in ("ts", "ns")
    for value in (-1, 2**31 - 1, -(2**31), np.nan, "text", None)
}
ODD_CIGARS = {
    "deleted": lambda n: f"1M{BIG}D{n - 1}M",
    "deleted much": lambda n: "1M" + f"{BIG}D" * 7 + f"{n - 1}M",
    "skipped much": lambda n: "1M" + f"{BIG}N" * 7 + f"{n - 1}M",
    "only clips": lambda n: f"{n}S",
    "only insertion": lambda n: f"{n}I",
    "hard clips": lambda n: f"{BIG}H{n}M",
    "too long": lambda n: f"{n + 5}M",
    "too short": lambda n: f"{n - 5}M",
    "padding": lambda n: f"{n // 2}M{BIG}P{n - n // 2}M",
    "matched": lambda n: f"{n}M",
}
ODD_FIELDS = {
    "no contig": ("reference_id", -1),
    "beyond the contig": ("reference_start", 100_000),
    "almost at its end": ("reference_start", 200),
    "no place": ("reference_start", -1),
    "no sequence": ("query_sequence", None),
    "letters": ("query_sequence", "NNNNACGT=RY"),
    "unmapped": ("flag", 4),
    "mapped": ("flag", 0),
    "reverse": ("flag", 16),
    "supplementary": ("flag", 2048),
    "all flags": ("flag", 0x6FF),
    "other name": ("query_name", "another"),
    "no name": ("query_name", "*"),
}
ODD_BAM_HEADERS = ["@PG without ID", "@PG without PN", "no @RG", "odd version", "@CO not ASCII"]


def mutate_records(path, which, value):
    """Changes one thing of one record of a BAM, or of its header."""
    with pysam.AlignmentFile(path, check_sq=False) as file:
        header, records = file.header.to_dict(), list(file)
    record = records[which % len(records)]
    name, touched = record.query_name, Touched(rest=[record.query_name])
    if value in ODD_TAGS:
        tag, content, kind = ODD_TAGS[value]
        record.set_tag(tag, content, kind)
    elif value in ODD_CIGARS:
        record.cigarstring = ODD_CIGARS[value](record.query_length)
    elif value in ODD_FIELDS:
        setattr(record, *ODD_FIELDS[value])
    elif value == "twice":
        records.append(record)
    elif value == "@PG without ID":
        del header["PG"][-1]["ID"]
        touched = Touched()
    elif value == "@PG without PN":
        del header["PG"][-1]["PN"]
    elif value == "no @RG":
        del header["RG"]
    elif value == "odd version":
        header["PG"][-1]["VN"] = "9" * 5000 + ".1"
    else:
        header["CO"] = ["é"]
    if value == "other name":
        touched = Touched(rest=[name, "another"])
    text = pysam.AlignmentHeader.from_dict(header)
    with pysam.AlignmentFile(path, "wb", header=text) as file:
        for record in records:
            file.write(record)
    return touched


RECORDS = st.tuples(
    st.integers(0, 3), st.sampled_from([*ODD_TAGS, *ODD_CIGARS, *ODD_FIELDS, *ODD_BAM_HEADERS, "twice"])
)
MUTATIONS = {name: thing for name, thing in globals().items() if name.startswith("mutate_")}


# ----------------------------------------------------------------------------------------------------------- worker


def run_case(good, expected, kind, mutation, *values):
    """Mutates a copy of a good input, opens it, and raises AssertionError if what comes out is not as it should be."""
    folder = Path(tempfile.mkdtemp(dir=good.parent))
    path = folder / kind
    try:
        (shutil.copytree if (good / kind).is_dir() else shutil.copy)(good / kind, path)
        touched = MUTATIONS[mutation](path, *values)
        before = set(folder.rglob("*"))
        try:
            store = opened(path, good)
        except InputError as error:
            # a file with one bad read is not refused
            message = str(error)
            assert "\n" not in message and len(message) < 2000, f"not one line: {message[:300]!r}"
            assert str(path) in message or str(good / "called.pod5") in message, f"names no file: {message}"
            assert message.isprintable(), f"not printable: {message!r}"
            assert set(folder.rglob("*")) == before, "it left files"
            whole = kind in ("bonito", "store", "single.fast5") or kind.endswith("bam")
            whole = whole or "all" in touched.rest
            assert touched.anything or whole, f"refused for one read: {message}"
            return
        assert not [left for left in folder.iterdir() if ".part-" in left.name], "it left files"
        found = content(store, kind != "store")  # that has no checksums
        used(store)
        json.dumps(store.report()).encode()
        "\n".join(store.report()).encode()
        if touched.anything:
            return
        for name, wanted in expected[kind].items():
            if name in touched.samples or "all" in touched.rest or name in touched.rest:
                continue
            assert name in found, f"an untouched read is lost: {name}, {store.info['left_out']}"
            same = [a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(found[name], wanted, strict=True)]
            assert all(same), f"an untouched read has another signal, bases or base starts: {name}, {same}"
        for name in found.keys() & expected["whole"][kind].keys():
            if name in touched.samples:
                continue
            assert is_piece(found[name][0], expected["whole"][kind][name]), f"silently another signal: {name}"
        if kind in ("multi.fast5", "single.fast5") and mutation in ("mutate_bytes", "mutate_chunk"):
            for name in touched.samples & found.keys():
                assert np.array_equal(found[name][0], expected[kind][name][0]), f"gzip's checksum passed over: {name}"
    finally:
        shutil.rmtree(folder)


def work(pipe, good, expected):
    """The worker: runs the cases it is sent and answers with what was wrong, or None."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while True:
        case = pipe.recv()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(usage.ru_utime + usage.ru_stime) + 1 + CPU
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        wrong = None
        try:
            run_case(good, expected, *case)
        except BaseException as error:
            wrong = "".join(traceback.format_exception(error, limit=-4))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first) * 1024
        if grown > MEMORY:
            wrong = f"memory grew by {grown / 2**20:.0f} MiB; {wrong or ''}"
        pipe.send(wrong)
        if wrong:
            return  # the next one begins anew


class Worker:
    """Runs cases in a process of its own, and a new one after each that went wrong."""

    def __init__(self, good, expected):
        self.args, self.process = (good, expected), None

    def __call__(self, *case):
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, end = context.Pipe()
            self.process = context.Process(target=work, args=(end, *self.args), daemon=True)
            self.process.start()
            end.close()
        self.pipe.send(case)
        try:
            # only against a lock: what runs on is ended by its CPU time
            wrong = self.pipe.recv() if self.pipe.poll(300) else "hangs without using the CPU"
        except EOFError:
            self.process.join()
            wrong = f"the interpreter died with exit code {self.process.exitcode}"
        if wrong:
            self.close()
        assert not wrong, f"{case}: {wrong}"

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a case: (kind, mutation, values...)."""
    good = tmp_path_factory.mktemp("fuzz") / "good"
    good.mkdir()
    make_good(good)
    expected = {"whole": {}}
    for kind in KINDS:
        place = good.parent / f"expected-{kind}"
        place.mkdir()
        path = place / kind
        path.symlink_to(good / kind)
        expected[kind] = content(opened(path, good))
        expected["whole"][kind] = {name: read[0] for name, read in expected[kind].items()}
    signal = content(prepare([good / "called.pod5"], good.parent / "called"))
    unlabelled = content(prepare([good / "reads.pod5"], good.parent / "unlabelled"))
    for kind in ("called.bam", "md.bam", "reference.bam"):
        assert expected[kind].keys() == signal.keys()
        expected["whole"][kind] = {name: read[0] for name, read in signal.items()}
    expected["whole"]["mapped.hdf5"] = {name: read[0] for name, read in unlabelled.items()}
    worker = Worker(good, expected)
    yield worker
    worker.close()


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("kind", KINDS)
@given(which=st.integers(0, 4), mutation=BYTES)
@fuzzed
def test_bytes(run, kind, which, mutation):
    run(kind, "mutate_bytes", which, mutation)


@pytest.mark.parametrize("kind", ["called.bam", "md.bam", "reference.bam"])
@given(mutation=BYTES)
@fuzzed
def test_bytes_within_the_blocks_of_a_bam(run, kind, mutation):
    run(kind, "mutate_bam_bytes", 0, mutation)


@pytest.mark.parametrize("kind", ["mapped.hdf5", "multi.fast5", "single.fast5"])
@given(values=HDF5)
@fuzzed
def test_a_read_in_hdf5(run, kind, values):
    run(kind, "mutate_hdf5", *values)


@given(values=chunk_mutations(CHUNKS))
@fuzzed
def test_a_chunk_of_gzip(run, values):
    run("multi.fast5", "mutate_chunk", *values)


@given(values=chunk_mutations(VBZ_CHUNKS))
@fuzzed
def test_a_chunk_of_vbz(run, values):
    run("vbz.fast5", "mutate_chunk", *values)


@given(values=POD5)
@fuzzed
def test_a_read_in_pod5(run, values):
    run("reads.pod5", "mutate_pod5", *values)


@given(values=ARROW)
@settings(fuzzed, max_examples=120)
def test_a_table_of_a_pod5(run, values):
    run("reads.pod5", "mutate_arrow", *values)


@pytest.mark.parametrize("kind", ["bonito", "store"])
@given(values=NPY)
@fuzzed
def test_an_array(run, kind, values):
    run(kind, "mutate_npy", *values)


@given(values=TABLE)
@fuzzed
def test_the_table_of_a_store(run, values):
    run("store", "mutate_table", *values)


@pytest.mark.parametrize("kind", ["called.bam", "md.bam", "reference.bam"])
@given(values=RECORDS)
@fuzzed
def test_a_record_of_a_bam(run, kind, values):
    run(kind, "mutate_records", *values)


# Failing cases that this file has found in common/reads/, the smallest of each kind
FOUND = {
    "HDF5 read that says it has 8 TiB": ("multi.fast5", "mutate_hdf5", 1, 1, "declared 8 TiB"),
    "HDF5 read that says it has 512 MiB": ("mapped.hdf5", "mutate_hdf5", 1, 0, "declared 512 MiB"),
    "HDF5 bases that say they are 8 TiB": ("mapped.hdf5", "mutate_hdf5", 1, 2, "declared 8 TiB"),
    "HDF5 calibration of complex 0": ("mapped.hdf5", "mutate_hdf5", 1, 0, "attribute complex"),
    "HDF5 offset that drowns the samples": ("mapped.hdf5", "mutate_hdf5", 1, 1, "attribute 1e17"),
    "HDF5 read name that is not UTF-8": ("mapped.hdf5", "mutate_hdf5", 1, 0, b"\xff\xfe"),
    "FAST5 read name that is not UTF-8": ("multi.fast5", "mutate_hdf5", 1, 0, b"\xff\xfe"),
    "HDF5 read name cut within a letter": ("mapped.hdf5", "mutate_hdf5", 1, 0, b"a" + "é".encode() * 30),
    "FAST5 whose Raw/Reads is a scalar": ("single.fast5", "mutate_hdf5", 0, 1, "scalar"),
    "FAST5 whose Raw/Reads is a row of numbers": ("single.fast5", "mutate_hdf5", 0, 1, "floats"),
    "FAST5 whose Raw/Reads is an endless row": ("single.fast5", "mutate_hdf5", 0, 1, "declared 8 TiB"),
    "gzip chunk that holds too little": ("multi.fast5", "mutate_chunk", 1, 0, "holds", 500),
    "gzip chunk that was not compressed": ("multi.fast5", "mutate_chunk", 1, 0, "not compressed", 500),
    "gzip chunk that holds 512 MiB": ("multi.fast5", "mutate_chunk", 1, 0, "zeros", 2**29),
    "VBZ chunk of three bytes": ("vbz.fast5", "mutate_chunk", 1, 0, "first bytes", 3),
    "VBZ chunk that holds too little": ("vbz.fast5", "mutate_chunk", 1, 0, "holds", 500),
    "VBZ chunk that was not compressed": ("vbz.fast5", "mutate_chunk", 1, 0, "not compressed", 500),
    "POD5 offset that drowns the samples": ("reads.pod5", "mutate_pod5", 1, "offset", 1e17),
    "POD5 that cannot be counted": ("reads.pod5", "mutate_bytes", 4, ("fill", 893501, 35, 255)),
    "POD5 read without calibration": ("reads.pod5", "mutate_arrow", 1, "read", "calibration_offset", "value"),
    "POD5 read without id": ("reads.pod5", "mutate_arrow", 1, "read", "read_id", "value"),
    "POD5 signal of another read": ("reads.pod5", "mutate_arrow", 1, "read", "signal", "that of another"),
    "POD5 read of 100,000 times one row": ("reads.pod5", "mutate_arrow", 1, "read", "signal", "value", [0] * 100_000),
    "POD5 signal without bytes": ("reads.pod5", "mutate_arrow", 1, "signal", "signal", "value", b""),
    "POD5 signal in unequal batches": ("reads.pod5", "mutate_arrow", 1, "signal", "", "unequal batches"),
    ".npy that is empty": ("bonito", "mutate_npy", 0, "empty"),
    ".npy with an unfinished header": ("bonito", "mutate_npy", 0, "'''"),
    ".npy with a header too deep": ("bonito", "mutate_npy", 0, "-" * 9000 + "1"),
    ".npy that is a zip file": ("store", "mutate_npy", 2, "zip"),
    "table of a store that says it has 2 TiB": ("store", "mutate_npy", 2, ODD_HEADERS[0]),
    "store with scalar signal": ("store", "mutate_npy", 3, "scalar"),
    "store without bases": ("store", "mutate_npy", 1, "none"),
    "store.json that is a list": ("store", "mutate_npy", 4, "[]"),
    "store.json that is too deep": ("store", "mutate_npy", 4, "[" * 100_000),
    "store.json without the counts": ("store", "mutate_npy", 4, '{"version": %d}'),
    "store read that starts at -1": ("store", "mutate_table", 1, "start", -1),
    "store read that overflows": ("store", "mutate_table", 1, "length", 2**63 - 1),
    "store read id that is not UTF-8": ("store", "mutate_table", 1, "id", b"\xff\xfe"),
    "BAM mv tag that is a letter": ("called.bam", "mutate_records", 1, "mv A"),
    "BAM tag that is not ASCII": ("called.bam", "mutate_records", 1, "not ASCII"),
    "BAM @PG without ID": ("called.bam", "mutate_records", 1, "@PG without ID"),
    "BAM compressed by another method": ("md.bam", "mutate_bytes", 2, ("flip", [(7394, 1)])),
    "BAM MD number of 5000 digits": ("md.bam", "mutate_records", 1, "MD long number"),
    "BAM alignment beyond the contig": ("reference.bam", "mutate_records", 1, "almost at its end"),
    "BAM deletion of 2**28 bases": ("reference.bam", "mutate_records", 1, "deleted"),
    "BAM mapped without a contig": ("reference.bam", "mutate_records", 1, "no contig"),
    "BAM mapped without a place": ("reference.bam", "mutate_records", 1, "no place"),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(run, name):
    run(*FOUND[name])
