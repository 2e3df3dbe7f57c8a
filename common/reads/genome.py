"""Labels from a genome: the calls of raw reads are aligned to it, and its bases placed in the signal.

The calls are a basecaller's own or those of a BAM. Where a base begins is told by the BAM's move tables or, with a
basecaller, by forced alignment: of all paths of its CTC output that emit the genome's bases, the most probable
(Viterbi). Reads are split by where in the genome they come from, not by their ids: so no validation read has a sequence
that training reads hold, repeats of the genome apart.
"""

import contextlib
import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pysam

from common import InputError
from common.reads.bam import CODES, columns, compared, moved
from common.reads.formats import Rejected
from common.reads.normalise import normalised

BAND = 128  # bases to either side of the call's own path that forced alignment looks at
AS_GOOD = 0.95  # a read is left out if another place of the genome has more than this share of its best place's matches
MIN_IDENTITY = 0.6  # of a call to the genome: such short seeds find places for reads of other genomes too, below 0.58
WINDOWS = 16_000, 100_000  # bases of the windows that are split, at least and at most; between them an eighth of all
IN_SIGNAL = 0.55  # identity of a basecaller's own call to the genome under a BAM's; wrong bases reach 0.54
ONE_IN = 8  # windows, of which the one is validation


def open_aligner(**options):
    """mappy's Aligner, with Bonito's scores."""
    try:
        import mappy  # here, since it is optional
    except ImportError as error:
        raise InputError(
            "--reference: pip install mappy, which builds it: a C compiler and zlib have to be there"
        ) from error
    return mappy.Aligner(preset="map-ont", scoring=(5, 4, 4, 4), **options)


def open_genome(path):
    """The Aligner to a FASTA file, its seeds short enough for calls of 70 % identity. InputError if it is none."""
    aligner = open_aligner(fn_idx_in=str(path), k=10, w=4, min_chain_score=25)
    with contextlib.suppress(UnicodeDecodeError):  # names, of what is no text
        if aligner and aligner.seq_names:
            return aligner
    raise InputError(f"--reference {path}: cannot be read as FASTA, plain or gzipped")


def letters(bases):
    """Bases 0-4 as a string of NACGT."""
    return np.frombuffer(b"NACGT", np.uint8)[bases].tobytes().decode()


def in_signal(bases, own):
    """The positions (columns,) in a basecaller's `own` call and in `bases` of the genome that are aligned, and the
    identity; (None, None, 0) if nothing is. Both bases are in the order of the signal, which is known to hold those of
    the genome: so seeds can be shorter than for all of it."""
    hits = open_aligner(seq=letters(bases), k=7, w=2, min_chain_score=20).map(letters(own))
    hit = max((hit for hit in hits if hit.strand > 0), key=lambda hit: hit.mlen, default=None)
    if hit is None:
        return None, None, 0.0
    place = columns([(pysam.CSOFT_CLIP, hit.q_st), *((what, n) for n, what in hit.cigar)])
    _, query, reference, identity = compared(own, letters(bases[hit.r_st : hit.r_en]), place, False, False)
    return query, hit.r_st + reference, identity


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
    calls: Basecalls, which tell where in the genome a read is; if they are aligned, aligner is not used. With move
    tables, call is not used, either.
    """

    def __init__(self, aligner, call, stride, min_coverage, min_identity, regions=(), calls=None):
        self.aligner, self.stride, self.calls = aligner, stride, calls
        self.call = call or (lambda reads: ([raw] for raw, _ in reads))
        self.min_coverage, self.min_identity, self.places = min_coverage, min_identity, {}
        if calls and calls.aligned:
            self.lengths = dict(zip(calls.reference.references, calls.reference.lengths, strict=True))
        else:
            self.lengths = {name: len(aligner.seq(name)) for name in aligner.seq_names}
        every, held = windows(self.lengths)
        self.split = f"{len(held)} of {len(every)} windows of about {sum(self.lengths.values()) // len(every)} bases"
        if regions:
            held, self.split = [region(text, self.lengths) for text in regions], ", ".join(regions)
        self.validation = merged(held)

    def labelled(self, raws):
        """Yields each of the RawReads `raws` with its bases, or Rejected; of a split read each part."""
        rejected = []
        for raw, *output in self.call(self._usable(raws, rejected)):
            result = self._label(raw, *output)
            yield Rejected(raw.id, result) if isinstance(result, str) else result
        yield from rejected

    def _usable(self, raws, rejected):
        for raw in raws:
            for one in self.calls.label(raw) if self.calls else [raw]:
                result = one.reason if isinstance(one, Rejected) else normalised(one)
                if isinstance(result, str):
                    rejected.append(Rejected(one.id, result))
                else:
                    yield one, result[0]

    def _label(self, raw, log_probs=None, sequence="", starts=None):
        """The RawRead with its bases, or why it has none."""
        own = CODES[np.frombuffer(sequence.encode(), np.uint8)]
        if not raw.locus:
            found = self._locate(raw, raw.bases if self.calls else own)
            if isinstance(found, str):
                return found
            raw, query, reference = found
        contig, start, end, backwards = raw.locus
        inside = self._in_validation(contig, start, end)
        if 0 < inside < end - start:
            return "across a border between training and validation"
        if log_probs is None:
            base_starts = moved(raw.base_starts, query, reference)
        else:
            if self.calls:
                query, reference, identity = in_signal(raw.bases, own)
                if identity < IN_SIGNAL or len(query) < self.min_coverage * len(raw.bases):
                    return "not found in the signal by --basecaller"
                first, last = reference[0], reference[-1] + 1
                start, end = (end - last, end - first) if backwards else (start + first, start + last)
                raw, reference = replace(raw, bases=raw.bases[first:last]), reference - first
            first, last = starts[query[0]], [*starts, len(log_probs)][query[-1] + 1]
            near = np.interp(np.arange(first, last), starts[query], reference)
            placed = forced_alignment(log_probs[first:last], raw.bases, near)
            if placed is None:
                return "the genome's bases do not fit into the signal"
            base_starts = np.append(first + placed, last) * self.stride
            base_starts[-1] = min(base_starts[-1], len(raw.dacs))  # the last step may go on beyond the signal
        self.places[raw.id] = contig, start, end
        return replace(raw, base_starts=base_starts, split=int(inside > 0))

    def _locate(self, raw, called):
        """The RawRead with the genome's bases under `called`, 0-4 in the order of the signal, and the positions
        (columns,) in both that are aligned; or why there are none."""
        if not len(called):
            return "no base called"
        hits = sorted(self.aligner.map(letters(called[::-1] if raw.rna else called)), key=lambda hit: -hit.mlen)
        if not hits:
            return "not aligned to the genome"
        hit = hits[0]
        if any(not other.is_primary and other.mlen > AS_GOOD * hit.mlen for other in hits[1:]):
            return "aligned to several places as well"
        coverage, reverse = (hit.q_en - hit.q_st) / len(called), hit.strand < 0
        if coverage < self.min_coverage:
            return f"aligned over less than {self.min_coverage:.0%}"
        clip = len(called) - hit.q_en if reverse else hit.q_st
        place = columns([(pysam.CSOFT_CLIP, clip), *((what, n) for n, what in hit.cigar)])
        there = self.aligner.seq(hit.ctg, hit.r_st, hit.r_en)
        bases, query, reference, identity = compared(called, there, place, reverse, raw.rna)
        if not bases.all():
            return "bases other than A, C, G and T"
        if identity < self.min_identity:
            return f"identity below {self.min_identity:.0%}"
        locus = hit.ctg, hit.r_st, hit.r_en, reverse != raw.rna
        return replace(raw, bases=bases, identity=identity, coverage=coverage, locus=locus), query, reference

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
        """Counts, by reason, of the basecalls of which no raw read came."""
        return self.calls.unused() if self.calls else {}
