"""Labelled reads to tune and to test on, whose sequence no training read holds: written from the real reads.

    python -m benchmark.unseen_reads ../shared/data runs/unseen

Writes lambda_first.hdf5 and lambda_second.hdf5, the two halves of lambda's genome, reads across its middle cut there;
ecoli.hdf5, without nine reads whose labels fit the signal badly; and unlabelled_unseen.pod5, to pretrain on, without
the seven reads of lambda and of E. coli's locus. Prints how many of the 21-mers of the first three, of the same strand
and of either, the Klebsiella reads hold.
"""

import sys
from pathlib import Path

import h5py
import numpy as np
import pod5

from common import InputError
from common.reads.files import written_whole
from common.reads.kmers import K, shared_kmers

BADLY_LABELLED = (  # median correlation of signal and level below 0.94, or a lost run of 500 bases
    "0eb7ac67", "c65d1bb9", "f432cb50", "4dbe677b", "c2cfeb47", "9a1776fd", "7baacba0", "458e15d1", "77635ef8"
)  # fmt: skip
TESTED = (  # of the unlabelled reads, those of lambda and of E. coli's locus
    "3fa4862f-bf61-4f3d-a13e-18b24be3b2a3", "3fa4862f-bf61-4f3d-a13e-18b24be3b2a4",
    "6841b4db", "b3123159", "bc5615d7", "c06dd5a2", "e133fe6f",
)  # fmt: skip


def bases_of(read):
    return "".join("ACGT"[base] for base in read["Reference"][:])


def position_of(bases, genome):
    """Where bases begin in the genome, and their strand: "+" or "-". InputError if they are not there exactly."""
    place = genome.find(bases)
    if place >= 0:
        return place, "+"
    place = genome.find(bases[::-1].translate(str.maketrans("ACGT", "TGCA")))
    if place < 0:
        raise InputError("a read whose bases are not the genome's")
    return place, "-"


def copy_part(read, file, name, first, end):
    """Adds to `file`, under a name of its own, the bases first ... end - 1 of a read, and their samples."""
    starts = read["Ref_to_signal"][first : end + 1]
    group = file.create_group(f"Reads/{name}")
    group.create_dataset("Dacs", data=read["Dacs"][starts[0] : starts[-1]], compression="gzip", compression_opts=1)
    group.create_dataset("Reference", data=read["Reference"][first:end])
    group.create_dataset("Ref_to_signal", data=(starts - starts[0]).astype(np.int32))
    group.attrs.update(read.attrs)
    group.attrs["read_id"] = name


def split_by_genome(source, genome, folder):
    """Writes the parts of the reads of `source` that lie in either half of `genome` (a string)."""
    middle = len(genome) // 2
    with (
        h5py.File(source) as reads,
        written_whole(folder / "lambda_first.hdf5") as first, h5py.File(first, "w") as before,
        written_whole(folder / "lambda_second.hdf5") as second, h5py.File(second, "w") as after,
    ):  # fmt: skip
        for name, read in reads["Reads"].items():
            bases = bases_of(read)
            place, strand = position_of(bases, genome)
            left = min(max(0, middle - place), len(bases))  # bases of the first half
            if strand == "+":
                parts = (before, 0, left), (after, left, len(bases))
            else:
                parts = (after, 0, len(bases) - left), (before, len(bases) - left, len(bases))
            for file, start, end in parts:
                if end - start >= 100:
                    copy_part(read, file, name, start, end)


def copy_without(source, ids, target):
    with h5py.File(source) as reads, written_whole(target) as part, h5py.File(part, "w") as file:
        for name, read in reads["Reads"].items():
            if not name.startswith(ids):
                reads.copy(read, file.require_group("Reads"))


def copy_raw_without(source, ids, target):
    with pod5.Reader(source) as reader, written_whole(target) as part, pod5.Writer(part) as writer:
        writer.add_reads([read.to_read() for read in reader.reads() if not str(read.read_id).startswith(ids)])


def sequences(path):
    """The bases 1-4 (B,) of each read of a file."""
    with h5py.File(path) as file:
        return [read["Reference"][:] + 1 for read in file["Reads"].values()]


def main(data, folder):
    folder.mkdir(parents=True, exist_ok=True)
    lines = (data / "lambda_genome.fasta").read_text().upper().split("\n")
    split_by_genome(data / "lambda_r941_mapped.hdf5", "".join(lines[1:]), folder)
    copy_without(data / "ecoli_r94_mapped.hdf5", BADLY_LABELLED, folder / "ecoli.hdf5")
    copy_raw_without(data / "unlabelled_r94.pod5", TESTED, folder / "unlabelled_unseen.pod5")
    held = sequences(data / "kleb_r94_mapped.hdf5")
    for name in ("lambda_first", "lambda_second", "ecoli"):
        same, either = shared_kmers(sequences(folder / f"{name}.hdf5"), held)
        print(f"{name}: Klebsiella's reads hold {same:.2%} of the {K}-mers (same strand), {either:.2%} (either)")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
