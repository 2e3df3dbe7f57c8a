"""Compares labels from a genome with those that the same reads have in a mapped-signal HDF5, made another way.

python -m benchmark.genome_labels labelled_reads.hdf5 reads.pod5 genome.fasta basecaller.pt
python -m benchmark.genome_labels labelled_reads.hdf5 reads.pod5 genome.fasta [basecaller.pt] calls.bam
"""

import sys
from pathlib import Path

import numpy as np

from common import InputError
from common.reads.formats import Rejected, raw_reads
from prepare_data import Args, labels_of


def main(truth, reads, genome, *sources):
    truth = {raw.id: raw for raw in raw_reads(truth) if not isinstance(raw, Rejected)}
    bam = tuple(path for path in sources if path.suffix == ".bam")
    basecaller = next((path for path in sources if path not in bam), None)
    labels = labels_of(Args((reads,), Path(), bam=bam, reference=genome, basecaller=basecaller))
    labels.validation = {}  # no border
    labelled = [raw for raw in labels.labelled(raw_reads(reads)) if not isinstance(raw, Rejected) and raw.id in truth]
    bases = equal = 0
    distances = []
    for raw in labelled:
        other = truth[raw.id]
        middle = len(raw.bases) // 2  # 50 bases that are equal tell where the others stand
        place = other.bases.tobytes().find(raw.bases[middle : middle + 50].tobytes())
        bases += len(raw.bases)
        if place >= 0:
            first = max(0, middle - place)
            end = min(len(raw.bases), len(other.bases) + middle - place)
            there = slice(first + place - middle, end + place - middle)
            same = raw.bases[first:end] == other.bases[there]
            equal += same.sum()
            distances.append((raw.base_starts[first:end] - other.base_starts[there])[same])
    if not distances:
        raise InputError("no read has the same bases in both")
    distances = np.concatenate(distances)
    held = sum(len(raw.bases) for raw in truth.values())
    print(f"{len(labelled)} of {len(truth)} reads labelled, {bases} bases of {held}; {equal / bases:.2%} equal")
    print(
        f"starts: median distance {np.median(abs(distances)):.0f} samples, signed {np.median(distances):+.0f}; ", end=""
    )
    print(", ".join(f"{(abs(distances) <= n).mean():.1%} within {n}" for n in (10, 20, 50)))


if __name__ == "__main__":
    try:
        if len(sys.argv) not in (5, 6):
            raise InputError("give labelled_reads.hdf5 reads.pod5 genome.fasta and basecaller.pt, calls.bam or both")
        main(*map(Path, sys.argv[1:]))
    except InputError as error:
        sys.exit(f"genome_labels.py: {error}")
