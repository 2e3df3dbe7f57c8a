"""Raw reads as sequencers and trainers write them: POD5, FAST5, BLOW5, mapped-signal HDF5 -> RawRead."""

import contextlib
import sys
import zlib
from collections import ChainMap
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pod5
from tqdm import tqdm

from common import InputError
from common.reads.chemistry import Chemistry, product_code

try:  # importing it registers the filter with h5py
    import vbz_h5py_plugin
except ImportError:
    vbz_h5py_plugin = None

MOST_COMPRESSED = 1100  # times; gzip reaches 1032
SUFFIXES = (".pod5", ".fast5", ".blow5", ".hdf5", ".h5")


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
    identity: float = 0.0  # of the basecall that the bases come from to the reference; 0 if there was no alignment
    coverage: float = 0.0
    split: int = -1  # 0 training, 1 validation, -1 by the hash of the id
    locus: tuple | None = None  # of the bases in a reference: contig, start, end, and whether they run backwards in it
    run: dict = field(default_factory=dict)  # of its SAM read group ID (the run's), PU, PM, DT, LB and SM, where known
    tags: dict = field(default_factory=dict)  # its SAM tags ch, mx, rn, st and fn, as Dorado's, where known
    kit: str = ""  # product codes, as SQK-LSK109 and FLO-MIN106; empty if unknown
    flow_cell: str = ""

    @property
    def chemistry(self):
        return Chemistry.of(self.kit, self.flow_cell, self.rna, self.sample_rate)


class Rejected(NamedTuple):
    """A read, or a whole file, that cannot be used."""

    id: str
    reason: str


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


def raw_reads(path):
    """Yields the RawRead and Rejected of one file whose name ends in one of SUFFIXES. InputError if it is none."""
    try:
        if path.suffix == ".pod5":
            yield from _pod5_reads(path)
        elif path.suffix == ".blow5":
            yield from _blow5_reads(path)
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
        if path.suffix == ".blow5":
            return _blow5_records(path)
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
                info = read.run_info
                tags = {"kit": info.sequencing_kit, "flow_cell_product_code": info.flow_cell_product_code}
                yield RawRead(
                    read_id,
                    _pod5_signal(read),
                    float(read.calibration.offset),
                    float(read.calibration.scale),
                    float(info.sample_rate),
                    **_from_tags(info.context_tags | tags),
                    **_origin(path, *_pod5_attributes(read)),
                )
            except Exception as error:
                yield Rejected(read_id, f"corrupt: {first_line(error)}")


def _pod5_attributes(read):
    """Those of the run and of the read, under the names that FAST5 has for them."""
    info, pore = read.run_info, read.pore
    run = {"run_id": info.acquisition_id, "flow_cell_id": info.flow_cell_id, "device_id": info.sequencer_position}
    run |= {"sample_id": info.sample_id, "exp_start_time": info.acquisition_start_time.isoformat()}
    of_read = {"channel_number": pore.channel, "start_mux": pore.well, "read_number": read.read_number}
    return run, of_read | {"start_time": read.start_sample, "sampling_rate": info.sample_rate}


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


def _from_tags(tags):
    """What the sequencer's tags say of the kit, the flow cell, and whether a kit or an experiment is of direct RNA."""
    named = [tags.get(name, "") for name in ("kit", "sequencing_kit", "experiment_type", "experiment_kit")]
    rna = any("rna" in (name.decode() if isinstance(name, bytes) else str(name)).lower() for name in named)
    kit = product_code(tags.get("kit")) or product_code(tags.get("sequencing_kit"))
    flow_cell = product_code(tags.get("flow_cell_product_code")) or product_code(tags.get("flowcell_type"))
    return {"rna": rna, "kit": kit, "flow_cell": flow_cell}


def _text(value):
    """An attribute as SAM may hold it: printable ASCII."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)


def _origin(path, run, read):
    """`run` and `tags` of a RawRead, from attributes with FAST5's names; what they do not tell is left out."""
    names = {"ID": "run_id", "PU": "flow_cell_id", "PM": "device_id", "LB": "sample_id", "SM": "sample_id"}
    group = {field: text for field, name in names.items() if (text := _text(run.get(name)))}
    tags = {"fn": _text(Path(path).name)}
    for tag, name in {"ch": "channel_number", "mx": "start_mux", "rn": "read_number"}.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # it is not there, or no number
            if 0 <= int(read.get(name)) < 2**31:
                tags[tag] = int(read.get(name))
    with contextlib.suppress(TypeError, ValueError, ArithmeticError, OSError):  # OSError of a year far off
        began = _text(run.get("exp_start_time"))  # ISO 8601, or the seconds since 1970
        began = datetime.fromtimestamp(int(began), UTC) if began.isdecimal() else datetime.fromisoformat(began)
        began = began.astimezone(UTC) if began.tzinfo else began.replace(tzinfo=UTC)
        group["DT"] = began.isoformat(timespec="milliseconds")
        began += timedelta(seconds=int(read.get("start_time")) / float(read.get("sampling_rate")))
        tags["st"] = began.isoformat(timespec="milliseconds")
    return {"run": group, "tags": tags}


def _blow5_records(path):
    """How many reads a BLOW5 file has. ValueError if it is none, or a part of one, which pyslow5 would not say."""
    with open(path, "rb") as file:
        first, end = file.read(6), file.seek(-5, 2)
        if first != b"BLOW5\1" or file.read() != b"5WOLB":
            raise ValueError("not a BLOW5 file, or not a whole one")
        file.seek(64)  # the size of the header, and then of each record, stands before it
        place, number = 68 + int.from_bytes(file.read(4), "little"), 0
        while place < end:
            file.seek(place)
            place, number = place + 8 + int.from_bytes(file.read(8), "little"), number + 1
    if place != end:
        raise ValueError("its records do not end with it")
    return number


def _blow5_reads(path):
    try:
        import pyslow5  # here, since it is optional
    except ImportError as error:
        raise InputError(f"{path}: pip install pyslow5, which reads BLOW5") from error
    left = _blow5_records(path)
    file = pyslow5.Open(str(path), "r")
    groups = [file.get_all_headers(read_group=group) for group in range(file.get_num_read_groups())]
    for read in file.seq_reads(aux="all"):
        left, run = left - 1, groups[read["read_group"]]
        origin = _from_tags(run) | _origin(path, run, read)
        scale = read["range"] / (read["digitisation"] or np.nan)
        yield RawRead(read["read_id"], read["signal"], read["offset"], scale, read["sampling_rate"], **origin)
    for _ in range(left):  # pyslow5 ends at the first that it cannot read
        yield Rejected(str(path), "corrupt, or behind a corrupt one")


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


def _hdf5_raw(read_id, signal, calibration, sample_rate, attributes, **origin):
    if signal.ndim != 1 or signal.dtype.kind not in "iu":
        raise ValueError("the signal is not a row of integers")
    if not {"range", "offset", "digitisation"} <= set(calibration):
        return Rejected(read_id, "no calibration")
    scale = float(calibration["range"]) / float(calibration["digitisation"] or np.nan)
    origin |= _from_tags(attributes)
    return RawRead(read_id, _row(signal), float(calibration["offset"]), scale, float(sample_rate), **origin)


def _tags(group):
    """The sequencer's tags in FAST5; those of old MinKNOWs have the flow cell among the context tags."""
    return ChainMap(*(group[name].attrs for name in ("context_tags", "tracking_id") if name in group))


def _multi_read(file, name):
    read = file[name]
    channel = read["channel_id"].attrs
    tags = _tags(read)
    origin = _origin(file.filename, tags, ChainMap(read["Raw"].attrs, channel))
    return _hdf5_raw(name.removeprefix("read_"), read["Raw/Signal"], channel, channel["sampling_rate"], tags, **origin)


def _single_read(file, name):
    raw = file["Raw/Reads"][name]
    read_id = raw.attrs["read_id"]
    channel = file["UniqueGlobalKey/channel_id"].attrs
    read_id = read_id.decode() if isinstance(read_id, bytes) else str(read_id)
    tags = _tags(file["UniqueGlobalKey"])
    origin = _origin(file.filename, tags, ChainMap(raw.attrs, channel))
    return _hdf5_raw(read_id, raw["Signal"], channel, channel["sampling_rate"], tags, **origin)


def _mapped_read(file, name):
    """taiyaki's mapped-signal format: Reference 0-3 = ACGT, Ref_to_signal the first sample of each base and the end."""
    read = file["Reads"][name]
    raw = _hdf5_raw(name, read["Dacs"], read.attrs, read.attrs.get("sample_rate", 0.0), read.attrs)
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
