"""Draw a stretch of a read: its current, the bases at their places in it, and the chunks that validation cuts it into.

    python -m benchmark.draw_read picture.png reads/
    python -m benchmark.draw_read picture.png reads.hdf5 --read ID --start 5000 --bam called=calls.bam

The reference's bases are those of mapped-signal HDF5; called ones come from BAM, SAM or CRAM files with move tables.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field, NonNegativeInt, PositiveInt

from common import InputError
from common.args import parse_args
from common.reads.bam import Basecalls
from common.reads.formats import Rejected, raw_files, reads_of
from common.reads.normalise import normalised
from common.reads.pictures import draw_read


@dataclass
class Args:
    picture: tyro.conf.Positional[Path]
    """the file to write: .png, .pdf or .svg"""
    data: tyro.conf.Positional[Path]
    """raw reads: POD5, FAST5, BLOW5, mapped-signal HDF5, or a folder of them"""
    read: str | None = None
    """id of the read; the first that can be drawn if not given"""
    start: NonNegativeInt | None = None
    """first sample to draw; if not given, shortly before a chunk border near the middle of the read"""
    samples: Annotated[int, Field(ge=1, le=20_000)] = 1500
    """how many samples to draw"""
    chunk_len: PositiveInt = 3600
    """samples per chunk of validation, which tiles a read from its first labelled base on"""
    bam: tuple[str, ...] = ()
    """basecalls of the read with move tables, one row each: name=calls.bam; SAM and CRAM, too"""
    reference: Path | None = None
    """FASTA that the CRAM was written with"""


def rows_of(raw, calls):
    """The rows of draw_read for a read, from its file and from {name: Basecalls}; or why it cannot be drawn."""
    rows = {}
    if raw.bases is not None and len(raw.bases):
        rows["reference"] = raw.bases, raw.base_starts
    for name, basecalls in calls.items():
        parts = basecalls.label(raw)
        called = [part for part in parts if not isinstance(part, Rejected)]
        if not called:
            return f"{name}: {parts[0].reason}"
        longest = max(called, key=lambda part: len(part.bases))  # of a split read
        rows[name] = longest.bases, longest.base_starts
    return rows


def find_read(data, read_id, calls):
    """The first read, or the one of that id, with its normalised current and its rows."""
    reason = "no such read in"
    for file in raw_files(data):
        for raw in reads_of(file, named=file == data):
            if read_id not in (None, raw.id):
                continue
            current = raw.reason if isinstance(raw, Rejected) else normalised(raw)
            rows = current if isinstance(current, str) else rows_of(raw, calls)
            if not isinstance(rows, str):
                return raw, current[0], rows
            reason = f"cannot be drawn ({rows}), of"
            if read_id:
                break
    raise InputError(f"--read {read_id}: {reason} {data}" if read_id else f"{data}: no read that can be drawn")


def main(args):
    if args.picture.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"{args.picture}: the picture comes first, and should end in .png, .pdf or .svg")
    named = {(name or Path(path).stem): path for name, _, path in (word.rpartition("=") for word in args.bam)}
    calls = {name: Basecalls([Path(path)], args.reference, called=True) for name, path in named.items()}
    raw, current, rows = find_read(args.data, args.read, calls)

    first = int(next(iter(rows.values()))[1][0]) if rows else 0  # labelled reads are kept from their first base on
    start = args.start
    if start is None:
        chunk = (len(current) - first) // 2 // args.chunk_len
        start = max(first + chunk * args.chunk_len - min(200, args.samples // 2), first)
    if start >= len(current):
        raise InputError(f"--start {start}: the read {raw.id} has {len(current)} samples")
    stretch = current[start : start + args.samples]
    end = start + len(stretch)
    figure = draw_read(stretch, start, rows, range(first, end, args.chunk_len))
    time = f", {1000 * len(stretch) / raw.sample_rate:.0f} ms" if raw.sample_rate else ""
    figure.suptitle(f"read {raw.id}, samples {start} to {end} of {len(current)}{time}", fontsize=10)
    figure.savefig(args.picture, dpi=130)
    print(f"{args.picture}: read {raw.id}, samples {start} to {end} of {len(current)}{time}")


if __name__ == "__main__":
    main(parse_args(Args))
