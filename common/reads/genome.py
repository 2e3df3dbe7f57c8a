"""Labels from a genome: the calls of raw reads are aligned to it, and its bases placed in the signal.

Where a base begins is told by forced alignment: of all paths of the basecaller's CTC output that emit the genome's
bases, the most probable (Viterbi). Reads are split by where in the genome they come from, not by their ids: so no
validation read has a sequence that training reads hold, repeats of the genome apart.
"""

import contextlib
import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pysam

from common import InputError
from common.reads.bam import CODES, columns, in_signal_order
from common.reads.formats import Rejected
from common.reads.normalise import normalised

BAND = 128  # bases to either side of the call's own path that forced alignment looks at
AS_GOOD = 0.95  # a read is left out if another place of the genome has more than this share of its best place's matches
WINDOWS = 16_000, 100_000  # bases of the windows that are split, at least and at most; between them an eighth of all
ONE_IN = 8  # windows, of which the one is validation


def open_genome(path):
    """mappy's Aligner, with Bonito's scores and seeds short enough for calls of 70 % identity. InputError if none."""
    try:
        import mappy  # here, since it is optional
    except ImportError as error:
        raise InputError(
            "--reference: pip install mappy, which builds it: a C compiler and zlib have to be there"
        ) from error
    aligner = mappy.Aligner(str(path), preset="map-ont", k=10, w=4, min_chain_score=25, scoring=(5, 4, 4, 4))
    with contextlib.suppress(UnicodeDecodeError):  # names, of what is no text
        if aligner and aligner.seq_names:
            return aligner
    raise InputError(f"--reference {path}: cannot be read as FASTA, plain or gzipped")


def forced_alignment(log_probs, bases, near, band=BAND):
    """The step (B,) at which each of `bases` (B,) 1-4 begins on the most probable path of log_probs (S, 5) that emits
    them all; None if there is none.

    near (S,): the base that each step is likely at; paths farther from it than `band` bases are not looked at.
    """
    states = np.zeros(2 * len(bases) + 1, np.int64)  # the blank before each base, the base; at the end a blank
    states[1::2] = bases
    skip = np.full(len(states), -np.inf)  # a blank may be skipped between two bases that differ
    skip[3::2][bases[1:] != bases[:-1]] = 0
    width = min(4 * band, len(states))
    low = (2 * near - width // 2).astype(np.int64).clip(0, len(states) - width)  # the lowest state of each step's band
    shifts = np.diff(low, prepend=0).clip(0, width + 2).tolist()
    scores = np.full(2 * width + 4, -np.inf)  # of the band's states from scores[2] on
    scores[2] = 0
    moves = np.empty((len(log_probs), width), np.int8)  # by how many states the best path to each came on
    for step, (first, shift) in enumerate(zip(low.tolist(), shifts, strict=True)):
        best, one, two = (scores[shift + 2 - n : shift + 2 - n + width] for n in (0, 1, 2))
        two = two + skip[first : first + width]
        move = moves[step]
        np.greater(one, best, out=move, casting="unsafe")
        best = np.maximum(one, best)
        move[two > best] = 2
        np.maximum(two, best, out=best)
        best += log_probs[step].take(states[first : first + width])
        scores[2 : width + 2] = best
    state = int(scores[width : width + 2].argmax()) + width - 2  # within the band: the last base or the blank behind it
    if low[-1] + width < len(states) or scores[state + 2] == -np.inf:
        return None
    path = np.empty(len(log_probs), np.int64)
    state += int(low[-1])
    for step in range(len(log_probs) - 1, -1, -1):
        path[step] = state
        state -= int(moves[step, state - low[step]])
    return np.flatnonzero((path % 2 == 1) & (np.diff(path, prepend=0) > 0))


def merged(places):
    """{contig: [start, end] of each stretch} that `places`, some (contig, start, end), cover; in order, apart."""
    stretches = {}
    for contig, start, end in sorted(places):
        found = stretches.setdefault(contig, [])
        if found and start <= found[-1][1]:
            found[-1][1] = max(end, found[-1][1])
        else:
            found.append([start, end])
    return stretches


def windows(lengths):
    """Equal windows (contig, start, end) of a genome {contig: length}, and those of them that are validation."""
    size = min(max(sum(lengths.values()) // ONE_IN, WINDOWS[0]), WINDOWS[1])
    every = []
    for contig, length in lengths.items():
        borders = np.linspace(0, length, max(1, round(length / size)) + 1).astype(int).tolist()
        every += [(contig, start, end) for start, end in itertools.pairwise(borders)]
    by_hash = sorted(every, key=lambda window: hashlib.blake2b(f"{window[0]}:{window[1]}".encode()).digest())
    return every, by_hash[: max(1, len(every) // ONE_IN)] if len(every) > 1 else []


def region(text, lengths):
    """(contig, start, end) of CONTIG or CONTIG:FIRST-LAST, as samtools counts: from 1, the last one included."""
    if text in lengths:
        return text, 0, lengths[text]
    contig, _, place = text.rpartition(":")
    first, _, last = place.replace(",", "").partition("-")
    if contig not in lengths or not (first.isdecimal() and last.isdecimal()):
        known = ", ".join(list(lengths)[:5])
        raise InputError(f"--validation-region {text}: should be CONTIG or CONTIG:FIRST-LAST; contigs: {known}")
    if not 1 <= int(first) <= int(last) <= lengths[contig]:
        raise InputError(f"--validation-region {text}: {contig} has bases 1 to {lengths[contig]}")
    return contig, int(first) - 1, int(last)


class Genome:
    """Gives raw reads the bases of the genome that they come from.

    aligner: as mappy's. call: takes an iterator of (RawRead, normalised signal), and yields each RawRead with its
    log-probabilities (S, 5), the sequence called and the steps at which its bases begin, all in the order of the
    signal; a step has `stride` samples. regions: of the genome, as text, which are validation; windows by hash if none.
    """

    def __init__(self, aligner, call, stride, min_coverage, min_identity, regions=()):
        self.aligner, self.call, self.stride = aligner, call, stride
        self.min_coverage, self.min_identity, self.places = min_coverage, min_identity, {}
        self.lengths = {name: len(aligner.seq(name)) for name in aligner.seq_names}
        every, held = windows(self.lengths)
        self.split = f"{len(held)} of {len(every)} windows of about {sum(self.lengths.values()) // len(every)} bases"
        if regions:
            held, self.split = [region(text, self.lengths) for text in regions], ", ".join(regions)
        self.validation = merged(held)

    def labelled(self, raws):
        """Yields each of the RawReads `raws` with its bases, or Rejected."""
        rejected = []
        for raw, *called in self.call(self._usable(raws, rejected)):
            result = self._label(raw, *called)
            yield Rejected(raw.id, result) if isinstance(result, str) else result
        yield from rejected

    def _usable(self, raws, rejected):
        for raw in raws:
            result = raw.reason if isinstance(raw, Rejected) else normalised(raw)
            if isinstance(result, str):
                rejected.append(Rejected(raw.id, result))
            else:
                yield raw, result[0]

    def _label(self, raw, log_probs, sequence, starts):
        """The RawRead with its bases, or why it has none."""
        if not sequence:
            return "no base called"
        hits = sorted(self.aligner.map(sequence[::-1] if raw.rna else sequence), key=lambda hit: -hit.mlen)
        if not hits:
            return "not aligned to the genome"
        hit = hits[0]
        if any(not other.is_primary and other.mlen > AS_GOOD * hit.mlen for other in hits[1:]):
            return "aligned to several places as well"
        coverage, reverse = (hit.q_en - hit.q_st) / len(sequence), hit.strand < 0
        if coverage < self.min_coverage:
            return f"aligned over less than {self.min_coverage:.0%}"
        called = CODES[np.frombuffer(sequence.encode(), np.uint8)]
        bases = in_signal_order(self.aligner.seq(hit.ctg, hit.r_st, hit.r_en), reverse, raw.rna)
        if not bases.all():
            return "bases other than A, C, G and T"
        clip = len(sequence) - hit.q_en if reverse else hit.q_st
        query, reference, _, other = columns([(pysam.CSOFT_CLIP, clip), *((what, n) for n, what in hit.cigar)])
        if reverse != raw.rna:
            query, reference = len(called) - 1 - query[::-1], len(bases) - 1 - reference[::-1]
        identity = (called[query] == bases[reference]).sum() / (len(query) + other)
        if identity < self.min_identity:
            return f"identity below {self.min_identity:.0%}"
        inside = self._in_validation(hit.ctg, hit.r_st, hit.r_en)
        if 0 < inside < len(bases):
            return "across a border between training and validation"
        first, end = starts[query[0]], [*starts, len(log_probs)][query[-1] + 1]
        near = np.interp(np.arange(first, end), starts[query], reference)
        placed = forced_alignment(log_probs[first:end], bases, near)
        if placed is None:
            return "the genome's bases do not fit into the signal"
        base_starts = np.append(first + placed, end) * self.stride
        base_starts[-1] = min(base_starts[-1], len(raw.dacs))  # the last step may go on beyond the signal
        self.places[raw.id] = hit.ctg, hit.r_st, hit.r_en
        split = int(inside > 0)
        return replace(raw, bases=bases, base_starts=base_starts, identity=identity, coverage=coverage, split=split)

    def _in_validation(self, contig, start, end):
        """How many bases of a place are in the validation regions."""
        return sum(max(0, min(end, to) - max(start, since)) for since, to in self.validation.get(contig, ()))

    def report(self, reads):
        """Lines on the labels of `reads`, a table of READ_DTYPE: what they cover of the genome, and how it is split."""
        covered = merged(self.places[read_id.decode()] for read_id in reads["id"])
        share = sum(end - start for found in covered.values() for start, end in found) / sum(self.lengths.values())
        identity, held = reads["identity"].mean(), (reads["split"] == 1).sum()
        return (
            f"labels: {len(reads)} reads with the genome's bases, of mean identity {identity:.1%}; "
            f"they cover {share:.1%} of the genome\n"
            f"split by locus: {held} reads for validation, from {self.split}"
            + ("" if held else "; choose others with --validation-region")
        )

    def unused(self):
        """Basecalls without a read; there are none."""
        return {}
