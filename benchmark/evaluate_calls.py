"""How right basecalls are: their identity with the bases of labelled reads, and whether their qualities come true.

    python -m benchmark.evaluate_calls calls.fastq labelled_reads.hdf5 --picture qualities.png

Each called read is aligned as a whole to the bases that its labels have. For DNA.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pysam
import tyro
from tqdm import tqdm

from common import InputError
from common.args import parse_args
from common.chunks import in_validation, open_data
from common.ctc import ALPHABET, align, aligned_identity
from common.reads.bam import SUFFIXES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LONGEST = 40_000  # bases; an alignment of two such takes 3 GB and a minute
EDGES = [0, 2, 4, 6, 8, 10, 12, 15, 20, 30, 51]  # of the bins of quality


@dataclass
class Args:
    calls: tyro.conf.Positional[Path]
    """basecalls of those reads: .fastq, .fastq.gz, .bam, .sam, or .cram with its reference where it says"""
    data: tyro.conf.Positional[tuple[Path, ...]]
    """labelled reads: mapped-signal HDF5, read stores"""
    all_reads: bool = False
    """all reads, not only those of the validation split; for reads that the basecaller was not trained on"""
    picture: Path | None = None
    """a PNG file to draw predicted and observed quality to"""


def read_calls(path):
    """{read id: (sequence, qualities)} of a FASTQ, BAM, SAM or CRAM file."""
    try:
        if path.suffix in SUFFIXES:
            with pysam.AlignmentFile(path, check_sq=False) as file:
                reads = (read for read in file.fetch(until_eof=True) if not read.is_secondary | read.is_supplementary)
                return {read.query_name: (read.get_forward_sequence(), read.get_forward_qualities()) for read in reads}
        with pysam.FastxFile(path) as file:
            return {read.name: (read.sequence, read.get_quality_array()) for read in file}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as FASTQ, BAM, SAM or CRAM ({error})") from error


def matches(aligned, length):
    """For each of the `length` called bases 1 if aligned to an equal one, 0 if not, -1 outside of the alignment."""
    result = np.full(length, -1)
    if aligned is not None:
        columns = [base == called for base, called in zip(aligned[0], aligned[1], strict=True) if called != "-"]
        first = aligned.coordinates[1, 0]
        result[first : first + len(columns)] = columns
    return result


def phred(error):
    return -10 * np.log10(error)


def draw(rows, path):
    """Observed against predicted quality of bases; rows of (lowest, highest, bases, predicted, observed)."""
    figure, axis = plt.subplots(figsize=(5, 4.5), layout="constrained")
    _, _, bases, predicted, observed = np.array(rows).T
    top = max(predicted.max(), observed.max()) + 2
    axis.plot([0, top], [0, top], ":", color="#666666", label="qualities that come true")
    axis.plot(predicted, observed, "-", color="#0072B2", linewidth=1)
    axis.scatter(
        predicted, observed, 10 + 200 * bases / bases.max(), color="#0072B2", label="called bases; area: how many"
    )
    axis.set(xlabel="predicted quality (phred)", ylabel="observed quality (phred)", xlim=(0, top), ylim=(0, top))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def main(args):
    if args.picture and args.picture.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--picture {args.picture}: should end in .png, .pdf or .svg")
    calls = read_calls(args.calls)
    identities, qualities, right, missing, too_long = [], [], [], 0, 0
    for store in open_data(args.data):
        reads = store.reads[(store.reads["bases_length"] > 0) & (args.all_reads | in_validation(store.reads))]
        for read in tqdm(reads, desc="aligning", unit=" reads"):
            called, quality = calls.get(read["id"].decode().partition(":")[0], ("", None))
            bases = store.bases[read["bases_start"] :][: read["bases_length"]]
            reference = "".join(ALPHABET[base] for base in bases)
            missing += not called
            if max(len(called), len(reference)) > LONGEST:
                too_long += 1
                continue
            aligned = align(called, reference)
            identities.append(aligned_identity(aligned, reference))
            if called and quality is not None:
                qualities.append(np.asarray(quality))
                right.append(matches(aligned, len(called)))
    if missing == len(identities) + too_long and missing:
        raise InputError(f"{args.calls}: none of the {missing} labelled reads is in it; is it of other reads?")
    if not identities:
        raise InputError(f"{', '.join(map(str, args.data))}: no labelled read to compare with; see --all-reads")
    print(f"{len(identities)} reads, {missing} of them not called; {too_long} too long to align")
    print(f"identity: mean {np.mean(identities):.2f} %, median {np.median(identities):.2f} %")
    if not right:
        return
    quality, right = np.concatenate(qualities), np.concatenate(right)
    quality, right = quality[right >= 0], right[right >= 0]
    print("| quality | bases | predicted | observed |\n|---|---|---|---|")
    rows = []
    for low, high in itertools.pairwise(EDGES):
        chosen = (quality >= low) & (quality < high)
        wrong = (right[chosen] == 0).sum()
        if wrong >= 20:  # fewer say nothing
            predicted = phred(np.mean(10 ** (quality[chosen] / -10)))
            rows.append((low, high, chosen.sum(), predicted, phred(wrong / chosen.sum())))
            print(f"| {low} to {high - 1} | {rows[-1][2]} | {rows[-1][3]:.1f} | {rows[-1][4]:.1f} |")
    if args.picture and rows:
        draw(rows, args.picture)


if __name__ == "__main__":
    main(parse_args(Args))
