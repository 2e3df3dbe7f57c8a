"""Basecall raw reads of any length with a fine-tuned basecaller: FASTQ, or SAM or BAM with move tables, also aligned.

A read is normalised as a whole, as in training, and cut into chunks that overlap; the log-probabilities of the chunks
are joined in the middle of each overlap, and the read is decoded as one. A frame attends only to those near it: so
chunks may be longer than in training, and what is called hardly depends on where they begin. (Not at all, if the
overlap is twice the attention window times the layers, and 32 samples more.)

The quality of a base is Q = -10 log10(1 - p), p its highest probability before the next base begins. It is not fitted
to anything; docs/results/basecalling.md compares it with the errors made.

    python basecall.py runs/RUN/basecaller.pt reads/ -o calls.fastq
    python basecall.py runs/RUN/basecaller.pt reads.pod5 -o calls.bam
    python basecall.py runs/RUN/basecaller.pt reads.pod5 --reference genome.fasta -o calls.bam
"""

import contextlib
import gzip
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pysam
import torch
import tyro
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from common import InputError
from common.args import parse_args
from common.ctc import ALPHABET, best_path
from common.device import autocast, copied_to, pick_device
from common.pore_model import HOP, frames_of, load_tensors
from common.reads.chemistry import in_words
from common.reads.files import written_whole
from common.reads.formats import Rejected, count_reads, listed, raw_files, reads_of
from common.reads.genome import MIN_IDENTITY, open_genome
from common.reads.normalise import normalised
from finetune_basecaller import STEPS_PER_FRAME, Basecaller

STRIDE = HOP // STEPS_PER_FRAME  # samples a time step
BASES = bytes.maketrans(ALPHABET.encode(), bytes(range(len(ALPHABET))))  # letters to their places in ALPHABET
COMPLEMENT = str.maketrans("ACGT", "TGCA")
SAM = {".bam": "wb", ".sam": "w"}  # with pysam's mode
FORMATS = (".fastq", ".fq", ".fastq.gz", ".fq.gz", *SAM)
TAG_TYPES = {int: "i", float: "f", str: "Z"}


@dataclass
class Args:
    weights: tyro.conf.Positional[Path]
    """a basecaller.pt of finetune_basecaller.py"""
    data: tyro.conf.Positional[tuple[Path, ...]]
    """raw reads: POD5, FAST5, BLOW5, mapped-signal HDF5, or folders of them"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """the file to write: .fastq, .fastq.gz, .bam or .sam; - writes FASTQ to standard output"""
    reference: Path | None = None
    """FASTA of a genome: aligns the calls to it, for .bam and .sam; needs mappy"""
    beam_size: PositiveInt = 1
    """1 decodes greedily; 5 is a little more accurate, but places some bases too early, with too low a quality, and
    needs fast-ctc-decode"""
    attention_window: PositiveInt | None = None
    """samples to either side that a frame attends to; if not given, half of the chunk length in training, out of the
    args.json beside the weights, or 600 where there is none"""
    chunk_len: PositiveInt = 3600
    """samples per chunk"""
    overlap: NonNegativeInt = 400
    """samples that neighbouring chunks share"""
    batch_size: PositiveInt = 64
    """chunks at a time, of as many reads as it takes; as large as the memory allows is fastest on a GPU"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it"""


class Call(NamedTuple):
    """A basecalled read. `starts` are the time steps, in the order of the signal, at which a base begins."""

    read_id: str
    sequence: str  # 5' to 3'
    qualities: np.ndarray  # (bases,) phred
    starts: np.ndarray
    steps: int  # time steps in all
    samples: int
    tags: dict  # SAM tags
    run: dict  # fields of the SAM read group, of which ID is the run


def chunk_starts(length, chunk_len, overlap):
    """The first samples of the chunks that cover `length` samples; the last chunk ends with them."""
    if length <= chunk_len:
        return [0]
    last = HOP * frames_of(length - chunk_len)
    return [*range(0, last, chunk_len - overlap), last]


def chunks_of(reads, chunk_len, overlap):
    """Yields (read, signal of a chunk, slice of its time steps to keep, whether it is the last) for (read, signal)s."""
    for read, signal in reads:
        starts = chunk_starts(len(signal), chunk_len, overlap)
        joins = [(start + chunk_len + after) // 2 // HOP for start, after in itertools.pairwise(starts)]
        joins = [0, *joins, frames_of(len(signal))]
        for start, (first, end) in zip(starts, itertools.pairwise(joins), strict=True):
            keep = slice(STEPS_PER_FRAME * (first - start // HOP), STEPS_PER_FRAME * (end - start // HOP))
            yield read, signal[start : start + chunk_len], keep, start == starts[-1]


@torch.no_grad()
def log_probabilities(model, reads, args, device):
    """Yields (read, log-probabilities (S, 5)) for each (read, normalised signal (L,)); batches fill across reads."""
    model.eval()
    chunks, kept = chunks_of(reads, args.chunk_len, args.overlap), []
    while batch := list(itertools.islice(chunks, args.batch_size)):
        signals = [torch.from_numpy(signal).float() for _, signal, _, _ in batch]
        lengths = torch.tensor([len(signal) for signal in signals])
        signal = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)
        whole = lengths.min() == lengths.max()  # no padding, and no mask to slow attention down
        with autocast(device, args.precision):
            log_probs, _ = model(copied_to(device, signal), None if whole else copied_to(device, lengths))
        for row, (read, _, keep, last) in zip(log_probs.cpu(), batch, strict=True):
            kept.append(row[keep])
            if last:
                yield read, torch.cat(kept)
                kept = []


def decode(log_probs, beam_size):
    """log_probs (S, 5) -> the sequence of ACGT, the steps (B,) at which its bases begin, their qualities (B,)."""
    probs = np.ascontiguousarray(log_probs.exp().numpy())
    if beam_size == 1:
        sequence, starts = best_path(log_probs)
    else:  # its path has the step at which a prefix came up first; the lower the threshold, the earlier
        import fast_ctc_decode  # here, since it is optional

        sequence, path = fast_ctc_decode.beam_search(probs, ALPHABET, beam_size, 0.1)
        starts = np.array(path, np.int64)
    if not sequence:
        return sequence, starts, np.zeros(0, np.uint8)
    highest = np.maximum.reduceat(probs, starts)  # (B, 5)
    bases = np.frombuffer(sequence.encode().translate(BASES), np.uint8)
    error = 1 - highest[np.arange(len(starts)), bases]
    return sequence, starts, (-10 * np.log10(error.clip(1e-5, 1))).round().astype(np.uint8)


def usable_reads(files, left_out, chemistries, bar):
    """Yields ((id, samples, whether RNA, tags, run), normalised signal) of the reads in {file: whether named itself}.

    Counts those that cannot be used in `left_out`, by reason, and the others in `chemistries`.
    """
    for file, named in files.items():
        for raw in reads_of(file, named):
            bar.update()
            result = raw.reason if isinstance(raw, Rejected) else normalised(raw)
            if isinstance(result, str):
                left_out[result] += 1
            else:
                chemistries[raw.chemistry] += 1
                signal, shift, scale = result
                tags = raw.tags | {"sm": shift, "sd": scale, "sv": "med_mad"}  # how normalised, in pA
                if raw.sample_rate > 0:
                    tags["du"] = len(raw.dacs) / raw.sample_rate
                yield (raw.id, len(raw.dacs), raw.rna, tags, raw.run), signal


def basecalls(model, reads, args, device):
    """Yields the Call of each of `reads`, as usable_reads has them, in their order."""
    for (read_id, samples, rna, *origin), log_probs in log_probabilities(model, reads, args, device):
        log_probs = log_probs[: -(-samples // STRIDE)]  # the last frame may go on beyond the signal
        sequence, starts, qualities = decode(log_probs, args.beam_size)
        if rna:  # the signal runs from 3' to 5'
            sequence, qualities = sequence[::-1], qualities[::-1]
        yield Call(read_id, sequence, qualities, starts, len(log_probs), samples, *origin)


def fastq(call):
    return f"@{call.read_id}\n{call.sequence}\n+\n{(call.qualities + 33).tobytes().decode()}\n"


def sam_record(call, header, hit=None):
    """The record of a call as Dorado writes it, aligned where mappy's `hit` says, or unaligned.

    On either strand the move table is in the order of the signal, as Dorado's (its issue 1083).
    """
    record = pysam.AlignedSegment(header)
    record.query_name, record.flag = call.read_id, 4
    sequence, qualities = call.sequence, call.qualities
    if hit:
        clips, record.flag = [hit.q_st, len(sequence) - hit.q_en], 0
        if hit.strand < 0:
            record.flag, clips = 16, clips[::-1]
            sequence, qualities = sequence.translate(COMPLEMENT)[::-1], qualities[::-1]
        record.reference_id, record.reference_start = header.get_tid(hit.ctg), hit.r_st
        record.mapping_quality = hit.mapq
        cigar = [(clips[0], pysam.CSOFT_CLIP), *hit.cigar, (clips[1], pysam.CSOFT_CLIP)]
        record.cigartuples = [(operation, count) for count, operation in cigar if count]
        record.set_tag("NM", hit.NM, "i")
        record.set_tag("MD", hit.MD, "Z")
    record.query_sequence, record.query_qualities = sequence, array("B", qualities.tobytes())
    for tag, value in call.tags.items():
        record.set_tag(tag, value, TAG_TYPES[type(value)])
    first = call.starts[0]
    moves = np.zeros(call.steps - first, np.int8)  # the first move is the first base
    moves[call.starts - first] = 1
    record.set_tag("mv", array("b", [STRIDE, *moves.tolist()]))
    record.set_tag("ts", int(STRIDE * first), "i")
    record.set_tag("ns", call.samples, "i")
    record.set_tag("qs", -10 * np.log10(np.mean(10 ** (call.qualities / -10))), "f")
    return record


@contextlib.contextmanager
def sam_writer(path, mode, model, aligner):
    """A function that writes a Call and mappy's hit of it to a BAM or SAM file, with a read group for each run.

    All runs are known, and can be told in the header, only in the end: records are in a file aside till then.
    """
    program = {"ID": "basecaller", "PN": "poressl", "CL": shlex.join(sys.argv)}
    contigs = [{"SN": name, "LN": len(aligner.seq(name))} for name in aligner.seq_names] if aligner else []
    content = {"HD": {"VN": "1.6", "SO": "unknown"}, "SQ": contigs, "PG": [program]}
    header, groups = pysam.AlignmentHeader.from_dict(content), {}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}-") as aside:
        with pysam.AlignmentFile(aside.name, "wbu", header=header) as file:

            def write(call, hit=None):
                record, run = sam_record(call, header, hit), call.run.get("ID")
                if run:
                    name = f"{run}_{model}"
                    group = call.run | {"ID": name, "PL": "ONT", "DS": f"basecall_model={model} runid={run}"}
                    record.set_tag("RG", groups.setdefault(name, group)["ID"])
                file.write(record)

            yield write
        header = pysam.AlignmentHeader.from_dict(content | {"RG": [*groups.values()]})
        with (
            pysam.AlignmentFile(aside.name, check_sq=False) as records,
            pysam.AlignmentFile(path, mode, header=header) as file,
        ):
            for record in records:
                file.write(record)


@contextlib.contextmanager
def writer(path, model="unknown", aligner=None):
    """A function that writes a Call to `path`, which appears when all are written; to BAM and SAM with mappy's hit.

    model: its name, in BAM and SAM.
    """
    if str(path) == "-":
        try:
            yield lambda call, hit=None: sys.stdout.write(fastq(call))
            sys.stdout.flush()
        except BrokenPipeError:  # head, say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        return
    with written_whole(path, name=f"--out {path}") as part:
        if path.suffix in SAM:
            with sam_writer(part, SAM[path.suffix], model, aligner) as write:
                yield write
        else:
            with gzip.open(part, "wt") if path.suffix == ".gz" else open(part, "w") as file:
                yield lambda call, hit=None: file.write(fastq(call))


def n50(lengths):
    """The length of which half of all bases are in reads so long or longer."""
    lengths = np.sort(lengths)[::-1]
    return lengths[np.searchsorted(lengths.cumsum(), lengths.sum() / 2)]


def trained_chunk_len(path):
    """The chunk length that the args.json of a fine-tuning run has; that of tiny and small where there is none."""
    try:
        return json.loads(path.read_text())["chunk_len"]
    except (OSError, ValueError, KeyError, TypeError):
        return 1200


def open_basecaller(weights, attention_window, device):
    """The Basecaller of the file `weights`. attention_window: as in Args, in samples, or None."""
    try:
        model = Basecaller.from_state_dict(load_tensors(weights)).to(device)
    except ValueError as error:
        raise InputError(f"{weights}: {error}; give the basecaller.pt of a fine-tuning run") from error
    if attention_window is None:
        attention_window = trained_chunk_len(weights.parent / "args.json") // 2
    model.pore_model.window = attention_window // HOP
    return model


def main(args):
    if not args.data:
        raise InputError("no input; name raw files or folders of them")
    if str(args.out) != "-":
        if not args.out.name.endswith(FORMATS):
            raise InputError(f"--out {args.out}: should end in .fastq, .fastq.gz, .bam or .sam, or be -")
        if args.out.exists():
            raise InputError(f"--out {args.out}: exists; choose another name or remove it")
    if args.chunk_len % HOP or args.overlap % HOP or args.overlap >= args.chunk_len:
        raise InputError(f"--chunk-len, --overlap: should be multiples of {HOP}, and the overlap the smaller")
    if args.beam_size > 1 and not importlib.util.find_spec("fast_ctc_decode"):
        raise InputError(f"--beam-size {args.beam_size}: pip install fast-ctc-decode, or leave it out")
    if args.reference and args.out.suffix not in SAM:
        raise InputError(f"--reference: aligned calls need an --out that ends in .bam or .sam, not {args.out}")
    device = pick_device(args.device)
    model = open_basecaller(args.weights, args.attention_window, device)
    aligner = open_genome(args.reference) if args.reference else None
    files = {file: file in args.data for path in args.data for file in raw_files(path)}  # whether named itself
    total = sum(map(count_reads, files))

    left_out, chemistries = Counter(), Counter()
    lengths, identities, coverages = array("q"), array("f"), array("f")
    name = re.sub("[^!-~]", "_", f"{args.weights.absolute().parent.name}_{args.weights.stem}")
    with tqdm(desc="basecalling", unit=" reads", total=total) as bar, writer(args.out, name, aligner) as write:
        for call in basecalls(model, usable_reads(files, left_out, chemistries, bar), args, device):
            if not call.sequence:
                left_out["no base called"] += 1
                continue
            hit = next(aligner.map(call.sequence, MD=True), None) if aligner else None
            if hit and hit.mlen < MIN_IDENTITY * hit.blen:
                hit = None  # by chance
            write(call, hit)
            lengths.append(len(call.sequence))
            if hit:
                identities.append(hit.mlen / hit.blen)
                coverages.append((hit.q_en - hit.q_st) / len(call.sequence))
        others = {one: number for one, number in chemistries.items() if one.differs(model.chemistry)}
        if others:
            tqdm.write(
                f"{args.weights}: is for {model.chemistry}; {sum(others.values())} of {chemistries.total()} reads are "
                f"of another chemistry ({in_words(others)}): expect wrong bases in them, or none",
                file=sys.stderr,
            )
        elif left_out["no base called"] > len(lengths):
            tqdm.write(
                f"{args.weights}: calls no base in most reads; are they of the chemistry that it was trained on?",
                file=sys.stderr,
            )
        if not lengths:
            why = f"no read was called (left out: {listed(left_out)})" if left_out else "no read in it"
            raise InputError(f"{', '.join(map(str, args.data))}: {why}")
    print(f"reads: {in_words(chemistries)}; the basecaller is for {model.chemistry}", file=sys.stderr)
    print(f"called: {len(lengths)} reads, {sum(lengths)} bases, N50 {n50(lengths)}", file=sys.stderr)
    if aligner:
        aligned = f"aligned: {len(identities)} of {len(lengths)} reads"
        if identities:
            aligned += f", median identity {np.median(identities):.1%}, median coverage {np.median(coverages):.1%}"
        print(aligned, file=sys.stderr)
    print(f"left out: {listed(left_out)}", file=sys.stderr)


if __name__ == "__main__":
    main(parse_args(Args))
