"""Labels out of a basecalled run: the bases of each raw read, at their places in its signal, from a BAM, a
SAM or a CRAM.

Dorado (with --emit-moves) and Guppy write, for each read that they call, its move table `mv` (the stride in samples,
then for each stride of the signal 1 if a base begins there, else 0), in the order of the signal; `ts`, the samples
before the first stride; `ns`, the samples in all, or up to where the end was trimmed. A part of a split read has the id
of the raw read in `pi` and its first sample there in `sp`, from which ts and ns count. What the tags mean: dorado's
documentation/SAM.md and its issues 1372 (aligners add a ts of their own), 1428, 1613 (sp was wrong before 2.1).
"""

import contextlib
import functools
import re
import tempfile
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pysam
from tqdm import tqdm

from common import InputError
from common.reads.formats import Rejected, first_line, listed

CODES = np.zeros(256, np.uint8)  # of letters: 1-4 = ACGT, 0 for any other
CODES[np.frombuffer(b"ACGTacgt", np.uint8)] = [1, 2, 3, 4] * 2
SUFFIXES = (".bam", ".sam", ".cram")
ALIGNED = (pysam.CMATCH, pysam.CEQUAL, pysam.CDIFF)
RNA_MODEL = re.compile(r"\brna(00\d)?_(r9|\d+bps)")  # rna_r9.4.1_70bps_hac, rna004_130bps_sup@v5.1.0

pysam.set_verbosity(0)  # its errors come as exceptions, too


def bam_files(paths):
    """The BAM, SAM and CRAM files that `paths` name or hold."""
    files = []
    for path in paths:
        if not path.exists():
            raise InputError(f"--bam {path}: no such file or folder")
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise InputError(f"--bam {path}: no {', '.join(SUFFIXES)} file in this folder")
        files += found
    return files


class Bam(NamedTuple):
    """An open BAM, SAM or CRAM file and what its header says."""

    file: pysam.AlignmentFile
    aligned: bool
    rna: bool
    dorado: tuple[int, int]  # the lowest version of Dorado that called; 0, 0 if another program did


def _open(path):
    try:
        file = pysam.AlignmentFile(path, check_sq=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(reason if "EOF" in reason else "none of these") from error
    programs = file.header.to_dict().get("PG", [])
    callers = [p for p in programs if p.get("PN") == "dorado" and p.get("ID", "").startswith("basecaller")]
    versions = [re.match(r"(\d+)\.(\d+)", program.get("VN", "")) for program in callers]
    dorado = min(((int(version[1]), int(version[2])) if version else (0, 0) for version in versions), default=(0, 0))
    return Bam(file, file.nreferences > 0, bool(RNA_MODEL.search(str(file.header))), dorado)


def _write_bam(path, cram, reference, out):
    """Writes the records of a SAM or CRAM file to the BAM `out`: only there is each found again by its place."""
    fasta = ("--reference", str(reference)) if cram and reference else ()
    try:
        pysam.samtools.quickcheck("-u", str(path))  # a CRAM has to have its end
        pysam.samtools.view("-b", "--no-PG", *fasta, "-o", str(out), str(path), catch_stdout=False)
    except pysam.SamtoolsError as error:
        reason = first_line(error.value.partition("stderr=")[2])
        if cram and "EOF" not in reason:
            advice = "cannot be read with this --reference" if reference else "has its bases in a --reference"
            raise InputError(f"--bam {path}: CRAM, {advice}; give the FASTA that it was written with") from error
        raise ValueError(f"{reason}, or no room in {out.parent}") from error


class Basecalls:
    """The basecalls in some BAM, SAM or CRAM files, found by the raw read that they were made of.

    reference: the FASTA file that aligned ones are aligned to; not needed if they have MD tags, but for CRAM. Aligned
    reads of which less than the share min_coverage of the called bases is aligned, or with a lower share min_identity
    of matches among all columns, are rejected.
    called: take the called bases, even where they are aligned. moves: if not, reads get bases without their places in
    the signal, and need no move tables.
    """

    def __init__(self, paths, reference=None, min_coverage=0.0, min_identity=0.0, called=False, moves=True):
        self.min_coverage, self.min_identity, self.keep_called, self.moves = min_coverage, min_identity, called, moves
        self.files, self.places, self.found = bam_files(paths), {}, set()
        self.bams, self.folder = list(self.files), tempfile.TemporaryDirectory()  # of BAMs made of SAM and CRAM
        self.open = functools.lru_cache(64)(_open)  # runs come in thousands of files
        kinds = {}  # a file of each: aligned and unaligned
        for number, path in enumerate(tqdm(self.files, desc="indexing BAM", unit=" files")):
            try:
                kinds[self._index(number, path, reference)] = path
            except InputError:
                raise
            except Exception as error:  # a corrupt file can bring about any
                reason = first_line(error)
                raise InputError(
                    f"--bam {path}: cannot be read as BAM, SAM or CRAM ({reason}); fetch or write it again"
                ) from error
        if len(kinds) == 2:
            raise InputError(f"--bam: {kinds[True]} is aligned and {kinds[False]} is not; give BAMs of one kind")
        self.aligned, self.reference = True in kinds, None
        if reference and self.aligned:
            try:
                self.reference = pysam.FastaFile(reference)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"--reference {reference}: cannot be read as FASTA, plain or bgzipped, or not indexed beside it; "
                    "samtools faidx tells more"
                ) from error
        reasons = Counter(place for places in self.places.values() for place in places if isinstance(place, str))
        if sum(reasons.values()) == sum(map(len, self.places.values())):
            names = ", ".join(map(str, paths))
            raise InputError(
                f"--bam {names}: no basecall can be used (left out: {listed(reasons)}); "
                "basecall with --emit-moves, or give --reference and --basecaller as well"
            )

    def _index(self, number, path, reference):
        """Notes the place of each basecall in the file, or why it cannot be used; says whether they are aligned."""
        file, aligned, _, _ = _open(path)
        if not file.is_bam:
            self.bams[number] = Path(self.folder.name) / f"{number}.bam"
            _write_bam(path, file.is_cram, reference, self.bams[number])
            file = _open(self.bams[number]).file
        try:
            self._note(number, file)
        finally:
            with contextlib.suppress(OSError):  # of a corrupt file, which has been said
                file.close()
        return aligned

    def _note(self, number, file):
        while True:
            place = number, file.tell()
            record = next(file, None)
            if record is None:
                return
            if record.is_secondary or record.is_supplementary:
                continue  # the primary alignment of the read is elsewhere
            if record.has_tag("dx") and record.get_tag("dx") == 1:
                place = "duplex, called from two reads"
            elif self.moves and not record.has_tag("mv"):
                place = "no move table"
            elif not self.moves and record.has_tag("pi"):  # its bases may be in the signal of another part as well
                place = "part of a split read, which --basecaller cannot place"
            raw_id = record.get_tag("pi") if record.has_tag("pi") else record.query_name
            self.places.setdefault(str(raw_id), []).append(place)

    def labelled(self, raws):
        """Yields each of `raws` with its bases, or Rejected; of a split read each part."""
        for raw in raws:
            yield from self.label(raw)

    def label(self, raw):
        """A list of the RawRead `raw` with its bases, or Rejected; one for each part of a split read."""
        self.found.add(raw.id)
        if isinstance(raw, Rejected):
            return [raw]
        return [self._label_or_reject(raw, place) for place in self.places.get(raw.id, ["not in the BAM"])]

    def _label_or_reject(self, raw, place):
        try:
            return self._label(raw, place)
        except InputError:
            raise
        except Exception:  # a corrupt record can bring about any
            return Rejected(raw.id, "corrupt in the BAM")

    def _label(self, raw, place):
        if isinstance(place, str):
            return Rejected(raw.id, place)
        path = self.files[place[0]]
        bam = self.open(self.bams[place[0]])
        bam.file.seek(place[1])
        record = next(bam.file)
        rna = raw.rna or bam.rna
        starts = _base_starts(record, len(raw.dacs), bam.dorado) if self.moves else None
        if isinstance(starts, str):
            return Rejected(raw.id, starts)
        bases = in_signal_order(record.query_sequence or "", record.is_reverse, rna)
        identity, coverage, locus = 0.0, 0.0, None
        if bam.aligned and not self.keep_called:
            labels = self._reference_bases(record, bases, starts, rna, path)
            if isinstance(labels, str):
                return Rejected(raw.id, labels)
            bases, starts, identity = labels
            coverage = record.query_alignment_length / len(record.query_sequence)
            backwards = record.is_reverse != rna
            locus = record.reference_name, record.reference_start, record.reference_end, backwards
        if not bases.all():
            return Rejected(raw.id, "bases other than A, C, G and T")
        # what follows the colon does not count for the split: parts stay with their parent
        read_id = f"{raw.id}:{record.get_tag('sp')}" if record.has_tag("pi") else raw.id
        about = {"identity": identity, "coverage": coverage, "locus": locus}
        return replace(raw, id=read_id, rna=rna, bases=bases, base_starts=starts, **about)

    def _reference_bases(self, record, called, starts, rna, path):
        """The reference's bases 1-4, the first sample of each and the end, and the identity; or why there are none."""
        if record.is_unmapped:
            return "unaligned"
        contig = record.reference_id >= 0 and record.header.get_reference_length(record.reference_name)
        if record.reference_start < 0 or (record.reference_end or 0) > contig:
            return "aligned beyond the end of the reference"
        place = query, reference, length, _ = columns(record.cigartuples or [])
        if not len(query):
            return "aligned without a match"
        if self.reference is not None:
            sequence = self._from_fasta(record, path)
            if sequence is None:
                return "aligned to what --reference lacks"
        elif record.has_tag("MD"):
            sequence = _from_md(record, query, reference, length)
            if sequence is None:
                return "MD tag that does not fit the alignment"
        else:
            raise InputError(f"--bam {path}: aligned, without MD tags; give the --reference it was aligned to")
        bases, query, reference, identity = compared(called, sequence, place, record.is_reverse, rna)
        if record.query_alignment_length < self.min_coverage * len(called):
            return f"aligned over less than {self.min_coverage:.0%}"
        if identity < self.min_identity:
            return f"identity below {self.min_identity:.0%}"
        if self.moves:
            starts = moved(starts, query, reference)
        return bases[reference[0] : reference[-1] + 1], starts, identity

    def _from_fasta(self, record, path):
        """The reference under an alignment, as letters, introns left out; None if --reference lacks it."""
        name, length = record.reference_name, record.header.get_reference_length(record.reference_name)
        try:
            found = self.reference.get_reference_length(name)
        except KeyError:
            return None
        if found != length:
            raise InputError(f"--reference: its {name} is not as long as that which {path} is aligned to ({length})")
        place, pieces = record.reference_start, []
        for operation, count in record.cigartuples:
            if operation in ALIGNED or operation == pysam.CDEL:
                pieces.append(self.reference.fetch(name, place, place + count))
            if operation in ALIGNED or operation in (pysam.CDEL, pysam.CREF_SKIP):
                place += count
        return "".join(pieces)

    def report(self, reads):
        """A line that says where the labels of `reads`, a table of READ_DTYPE, come from."""
        identities = reads["identity"][reads["coverage"] > 0]
        mean = f", of mean identity {100 * identities.mean():.1f} %" if len(identities) else ""
        called = len(reads) - len(identities)
        return f"labels: {called} reads with called bases, {len(identities)} with the reference's{mean}"

    def unused(self):
        """Counts, by reason, of the basecalls of which no raw read came; call it after all reads."""
        places = [place for raw_id, places in self.places.items() if raw_id not in self.found for place in places]
        without = "in the BAM, without signal in the raw files"
        return Counter(place if isinstance(place, str) else without for place in places)


def _base_starts(record, samples, dorado):
    """The sample of the raw read at which each called base starts, in signal order, and the end; or what is wrong."""
    # pysam gives both where an aligner has added ts:A, the strand of a transcript
    tags = {tag: value for tag, value, kind in record.get_tags(with_value_type=True) if kind != "A"}
    if "mv" not in tags:
        return "no move table"
    if not isinstance(tags.get("ts"), int) or not isinstance(tags.get("ns"), int):
        return "no ts or ns tag"
    if not isinstance(tags["mv"], array) or tags["mv"].typecode == "f" or len(tags["mv"]) == 0:
        return "no move table"
    first, trimmed, end = 0, tags["ts"], tags["ns"]
    if "pi" in tags:
        if not isinstance(tags.get("sp"), int):
            return "part of a split read, without sp tag"
        if dorado < (2, 1):
            return "part of a read split by other than Dorado from 2.1 on"
        first, end = tags["sp"], tags["sp"] + tags["ns"]
    stride, moves = int(tags["mv"][0]), np.asarray(tags["mv"][1:])
    if end >= samples + max(stride, 1):  # Dorado counts the last stride as whole where it has trimmed
        return "ns tag beyond the signal"
    end = min(end, samples)
    starts = first + trimmed + np.flatnonzero(moves) * stride
    if len(starts) == 0 or record.query_sequence is None or len(starts) != len(record.query_sequence):
        return "move table and sequence of different lengths"
    if stride < 1 or min(first, trimmed) < 0 or starts[-1] >= end:
        return "move table beyond the signal"
    return np.append(starts, min(first + trimmed + len(moves) * stride, end))


def in_signal_order(letters, reverse, rna):
    """Letters of the read or the reference, as the BAM has them, as bases 1-4 in the order they passed the pore.

    A read on the reverse strand stands in the BAM as its complement, backwards. RNA passes the pore from 3' to 5'.
    """
    bases = CODES[np.frombuffer(letters.encode(), np.uint8)]
    if reverse:
        bases = np.where(bases > 0, 5 - bases, 0).astype(np.uint8)
    return bases[::-1] if reverse != rna else bases


def columns(cigar):
    """The positions (columns,) in read and reference that a CIGAR, some (operation, count), aligns to each other.

    They count as the BAM has them: the read with its soft clips, the reference from the alignment's first base on,
    without introns. Then the length of that reference, and the number of inserted and deleted bases.
    """
    query, reference, q, r, other = [np.zeros(0, int)], [np.zeros(0, int)], 0, 0, 0
    for operation, count in cigar:
        if operation in ALIGNED:
            query.append(np.arange(q, q + count))
            reference.append(np.arange(r, r + count))
            q, r = q + count, r + count
        elif operation in (pysam.CINS, pysam.CSOFT_CLIP):
            q += count
        elif operation == pysam.CDEL:
            r += count
        other += count * (operation in (pysam.CINS, pysam.CDEL))
    return np.concatenate(query), np.concatenate(reference), r, other


def compared(called, letters, place, reverse, rna):
    """What a call, bases 0-4 in the order of the signal, is aligned to, by what columns() says of its CIGAR.

    The reference's bases, out of its `letters`, in that order as well; the positions (columns,) in the call and in
    them; and the identity: the share of matches in all columns, insertions and deletions included.
    """
    query, reference, length, other = place
    bases = in_signal_order(letters, reverse, rna)
    if reverse != rna:
        query, reference = len(called) - 1 - query[::-1], length - 1 - reference[::-1]
    return bases, query, reference, (called[query] == bases[reference]).sum() / (len(query) + other)


def moved(starts, query, reference):
    """The first samples of the reference's bases from the first column to the last, and the end.

    starts: those of the call's bases. A deleted base has its share of the gap between its neighbours; an insertion's
    signal goes to the base before.
    """
    first, end = reference[0], reference[-1] + 1
    of_query = np.interp(np.arange(first, end + 1), [*reference, end], [*query, query[-1] + 1])
    return np.interp(of_query, np.arange(len(starts)), starts).round().astype(np.int64)


def _from_md(record, query, reference, length):
    """The reference under an alignment, as letters, from the read and its MD tag; None if they do not fit.

    pysam's get_reference_sequence does not look whether they fit, and writes beyond its memory.
    """
    letters = np.zeros(length, np.uint8)
    letters[reference] = np.frombuffer(record.query_sequence.encode(), np.uint8)[query]
    tag, place = str(record.get_tag("MD")), 0
    if not re.fullmatch(r"\d+((\^[A-Za-z]+|[A-Za-z])\d+)*", tag):
        return None
    for equal, deleted, other in re.findall(r"(\d+)|\^([A-Za-z]+)|([A-Za-z])", tag):
        if equal:
            place += int(equal)
            continue
        changed = letters[place : place + len(deleted or other)]
        if len(changed) < len(deleted or other) or (changed > 0).any() == bool(deleted):
            return None
        changed[:] = np.frombuffer((deleted or other).encode(), np.uint8)
        place += len(changed)
    return letters.tobytes().decode() if place == length and letters.all() else None
