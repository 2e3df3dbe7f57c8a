"""common/reads/bam.py and prepare_data.py --bam, against reads that are made base by base, and on real ones."""

import array
import gzip
import itertools
import json
import multiprocessing
import re
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pysam
import pytest

from common import InputError
from common.chunks import hash_of
from common.reads.bam import Basecalls
from common.reads.formats import RawRead, Rejected, raw_reads
from common.reads.normalise import normalised
from common.reads.simulate import kmer_levels
from common.reads.store import ReadStore
from tests.test_formats import wander, write_pod5

STRIDE, TRIMMED = 5, 7
PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
TRUE_FALSE = [False, True]


def letters(rng, number):
    return "".join(rng.choice(list("ACGT"), number))


def make(seed, clips=(0, 0), length=60, edits=(0.06, 0.06, 0.08, 0.03)):
    """A read, made base by base in the order in which it passes the pore.

    columns: (CIGAR operation, reference's base, called base); truth: for each of the reference's bases (base, first
    sample, end) of the base that was called for it, None where none was; called: (base, first sample).
    edits: the chances of a substitution, a deletion, an insertion before the base, an intron before it.
    """
    rng = np.random.default_rng(seed)
    substituted, deleted, inserted, intron = edits
    columns = [("S", "", base) for base in letters(rng, clips[0])]
    for i, base in enumerate(letters(rng, length)):
        inside = 0 < i < length - 1
        while inside and rng.random() < inserted:
            columns.append(("I", "", letters(rng, 1)))
        if inside and rng.random() < intron:
            columns.append(("N", letters(rng, rng.integers(2, 80)), ""))
        if inside and rng.random() < deleted:
            columns.append(("D", base, ""))
        elif rng.random() < substituted:
            columns.append(("X", base, rng.choice([other for other in "ACGT" if other != base])))
        else:
            columns.append(("=", base, base))
    columns += [("S", "", base) for base in letters(rng, clips[1])]

    moves, truth, called, end = [], [], [], None
    for operation, base, letter in columns:
        first = TRIMMED + STRIDE * len(moves)
        if letter:
            moves += [1] + [0] * rng.integers(0, 3)
            called.append((letter, first))
        after = TRIMMED + STRIDE * len(moves)
        if operation in "=X":
            truth.append((base, first, after))
            end = after
        if operation == "D":
            truth.append((base, None, None))
    samples = TRIMMED + STRIDE * len(moves) + int(rng.integers(0, 40))  # some may be trimmed at the end
    return SimpleNamespace(columns=columns, moves=moves, truth=truth, called=called, end=end, samples=samples)


def unaligned(read, name, rna=False, **tags):
    """The record of a read in the BAM; a tag that is None is left out."""
    record = pysam.AlignedSegment()
    sequence = "".join(base for base, _ in read.called)
    record.query_name, record.flag, record.query_sequence = name, 4, sequence[::-1] if rna else sequence
    tags = {"mv": array.array("b", [STRIDE, *read.moves]), "ts": TRIMMED, "ns": read.samples} | tags
    record.set_tags([(tag, value) for tag, value in tags.items() if value is not None])
    return record


def aligned(read, name, contigs, reverse=False, rna=False, minimap=False, **tags):
    """The record of a read, aligned to a contig of its own, which is added to `contigs` {name: sequence}."""
    columns = read.columns
    if reverse:
        columns = [(o, "".join(PAIRS[b] for b in base), PAIRS.get(letter, "")) for o, base, letter in columns]
    if reverse != rna:
        columns = [(operation, base[::-1], letter) for operation, base, letter in columns[::-1]]
    record = unaligned(read, name, **tags)
    record.query_sequence = "".join(letter for *_, letter in columns)
    before = "ACGTTGCA"[: 3 + len(contigs) % 5]
    record.flag, record.reference_id, record.reference_start = 16 * reverse, len(contigs), len(before)
    contigs[f"contig-{len(contigs)}"] = before + "".join(base for _, base, _ in columns) + "GATC"
    cigar, md, same, previous = [], "", 0, ""
    for operation, base, _ in columns:
        one = "M" if operation in "=X" else operation
        if cigar and cigar[-1][1] == one:
            cigar[-1][0] += len(base) or 1
        else:
            cigar.append([len(base) or 1, one])
        if operation == "=":
            same += 1
        elif operation == "X":
            md, same = f"{md}{same}{base}", 0
        elif operation == "D":
            md, same = md + (base if previous == "D" else f"{same}^{base}"), 0
        previous = operation
    record.cigarstring = "".join(f"{number}{operation}" for number, operation in cigar)
    if "MD" not in tags:
        record.set_tag("MD", f"{md}{same}")
    record.set_tags([("ts", "+", "A")] * minimap + record.get_tags())  # minimap2 adds the strand of a transcript
    return record


def write_bam(path, records, contigs=None, program="dorado 2.1.0", model="dna_r10.4.1_e8.2_400bps_sup@v5", **kind):
    name, version = program.split()
    header = {"HD": {"VN": "1.6"}, "RG": [{"ID": "run", "DS": f"basecall_model={model}"}]}
    header["PG"] = [{"ID": "aligner", "PN": "minimap2", "VN": "2.28"}, {"ID": "basecaller", "PN": name, "VN": version}]
    header["SQ"] = [{"SN": contig, "LN": len(sequence)} for contig, sequence in (contigs or {}).items()]
    with pysam.AlignmentFile(path, **{"mode": "wb", "header": header} | kind) as file:
        for record in records:
            file.write(record)
    return path


def write_fasta(path, contigs):
    text = ""
    for name, sequence in contigs.items():
        lines = [sequence[i : i + 50] for i in range(0, len(sequence), 50)]
        text += "\n".join([f">{name} a contig", lines[0].lower(), *lines[1:], ""])
    path.write_text(text)
    return path


def raw_read(name, read, rna=False):
    return RawRead(name, np.zeros(read.samples, np.int16), 0.0, 1.0, 4000.0, rna)


def spelled(raw):
    return "".join("NACGT"[base] for base in raw.bases)


def is_called(raw, read):
    """Whether the labels are the called bases."""
    end = min(TRIMMED + STRIDE * len(read.moves), read.samples)
    assert spelled(raw) == "".join(base for base, _ in read.called)
    assert raw.base_starts.tolist() == [first for _, first in read.called] + [end]


def is_true(raw, read):
    """Whether the labels are the reference's bases, each at the samples of the base that was called for it."""
    assert spelled(raw) == "".join(base for base, *_ in read.truth)
    starts = raw.base_starts.tolist()
    assert len(starts) == len(read.truth) + 1 and starts[-1] == read.end and starts == sorted(starts)
    known = [i for i, (_, first, _) in enumerate(read.truth) if first is not None]
    assert [starts[i] for i in known] == [read.truth[i][1] for i in known]
    for left, right in itertools.pairwise(known):
        (_, first, end), (_, following, _) = read.truth[left], read.truth[right]
        if end == following:  # no insertion: deleted bases share the signal of the base before evenly
            for i in range(left + 1, right):
                assert abs(starts[i] - first - (following - first) * (i - left) / (right - left)) <= 0.5 + 1e-6


@pytest.fixture
def one(tmp_path):
    """label() of one read, given its record."""

    def label(record, samples, contigs=None, rna=False, options=None, **header):
        path = write_bam(tmp_path / "one.bam", [record], contigs, **header)
        name = record.get_tag("pi") if record.has_tag("pi") else record.query_name
        raw = RawRead(name, np.zeros(samples, np.int16), 0.0, 1.0, 4000.0, rna)
        (labelled,) = Basecalls([path], **(options or {})).label(raw)
        return labelled

    return label


# ------------------------------------------------------------------------------------------------- right labels


@pytest.mark.parametrize("clips", [(0, 0), (8, 3)])
@pytest.mark.parametrize("rna", TRUE_FALSE)
@pytest.mark.parametrize("reverse", TRUE_FALSE)
def test_labels_are_the_references_bases_where_they_passed(tmp_path, reverse, rna, clips):
    """The truth is in the order of the signal: it is the same on both strands, for RNA, by MD and by --reference."""
    reads, found, cigars = {f"read-{seed}": make(seed, clips) for seed in range(30)}, [], ""
    for source in ("MD", "FASTA", "forward"):
        contigs, tags = {}, {"MD": None} if source == "FASTA" else {}
        kind = (reverse, rna) if source != "forward" else (False, False)
        records = [aligned(read, name, contigs, *kind, len(name) == 6, **tags) for name, read in reads.items()]
        bam = write_bam(tmp_path / "calls.bam", records, contigs)
        reference = write_fasta(tmp_path / f"{source}.fa", contigs) if source == "FASTA" else None
        calls, as_called = Basecalls([bam], reference), Basecalls([bam], called=True)
        for name, read in reads.items():
            (labelled,) = calls.label(raw_read(name, read, kind[1]))
            assert labelled.id == name
            is_true(labelled, read)
            found.append(labelled.base_starts)
            is_called(as_called.label(raw_read(name, read, kind[1]))[0], read)
        assert not calls.unused()
        cigars += "".join(record.cigarstring for record in records)
    assert set("MIDN") <= set(cigars) and ("S" in cigars) == any(clips)
    for by_md, by_fasta, forward in zip(found[:30], found[30:60], found[60:], strict=True):
        assert by_md.tolist() == by_fasta.tolist() == forward.tolist()


@pytest.mark.parametrize("rna", TRUE_FALSE)
def test_an_unaligned_bam_gives_the_called_bases(one, rna):
    for seed in range(5):
        read = make(seed)
        is_called(one(unaligned(read, "a", rna), read.samples, rna=rna), read)


@pytest.mark.parametrize("model", ["rna_r9.4.1_70bps_hac", "rna004_130bps_sup@v5.1.0", "rna002_70bps_fast@v3"])
def test_reads_are_rna_by_the_model(one, model):
    read = make(0)
    labelled = one(unaligned(read, "a", rna=True), read.samples, model=model)
    is_called(labelled, read)
    assert labelled.rna


def test_reads_are_rna_by_the_raw_file(shared_data):
    (raw,) = raw_reads(shared_data / "formats/single_read_vbz_rna.fast5")
    (dna,) = raw_reads(shared_data / "formats/single_read_gzip.fast5")
    assert raw.rna and not dna.rna


def test_a_move_table_that_ends_before_or_after_the_signal(one):
    read = make(0)
    read.samples = TRIMMED + STRIDE * len(read.moves) + 1000
    is_called(one(unaligned(read, "a"), read.samples), read)  # trimmed
    read.samples = TRIMMED + STRIDE * len(read.moves) - 3
    is_called(one(unaligned(read, "a"), read.samples), read)  # the last stride is not whole
    for more in (-3, 0, 1000):  # Dorado's ns where it has trimmed: to the end of the last stride
        end = TRIMMED + STRIDE * len(read.moves)
        read.samples = end + more
        is_called(one(unaligned(read, "a", ns=end), read.samples), read)


def test_adapters_trimmed_by_dorado_cost_no_read_and_move_no_base(shared_data, tmp_path):
    """The real basecalls as `dorado trim` leaves them: 40 bases off the start, 30 off the end."""
    source = pysam.AlignmentFile(shared_data / "na12878_r941_moves.bam", check_sq=False)
    with pysam.AlignmentFile(tmp_path / "trimmed.bam", "wb", template=source) as file:
        for record in source:
            stride, moves = record.get_tag("mv")[0], np.array(record.get_tag("mv")[1:])
            first, end = np.flatnonzero(moves)[[40, -30]]
            sequence, qualities = record.query_sequence[40:-30], record.query_qualities[40:-30]
            record.query_sequence, record.query_qualities = sequence, qualities
            record.set_tag("ts", int(record.get_tag("ts") + stride * first))
            record.set_tag("mv", array.array("b", [stride, *moves[first:end].tolist()]))
            record.set_tag("ns", int(record.get_tag("ts") + stride * (end - first)))
            file.write(record)
    trimmed, whole = (Basecalls([path]) for path in (tmp_path / "trimmed.bam", shared_data / "na12878_r941_moves.bam"))
    for raw in raw_reads(shared_data / "na12878_r941.pod5"):
        (part,), (read,) = trimmed.label(raw), whole.label(raw)
        assert np.array_equal(part.bases, read.bases[40:-30])
        assert np.array_equal(part.base_starts, read.base_starts[40:-30])


def test_parts_of_a_split_read_are_labelled_in_the_signal_of_the_parent(tmp_path):
    parts, contigs = {0: make(1), 900: make(2), 1801: make(3)}, {}
    records = [aligned(read, f"part-{sp}", contigs, pi="parent", sp=sp) for sp, read in parts.items()]
    calls = Basecalls([write_bam(tmp_path / "calls.bam", records, contigs)])
    labelled = calls.label(RawRead("parent", np.zeros(3000, np.int16), 0.0, 1.0, 4000.0))
    assert [part.id for part in labelled] == ["parent:0", "parent:900", "parent:1801"] and not calls.unused()
    assert {hash_of(part.id.encode()) for part in labelled} == {hash_of(b"parent")} != {hash_of(b"part-0")}
    for part, (sp, read) in zip(labelled, parts.items(), strict=True):
        assert len(part.dacs) == 3000
        part.base_starts = part.base_starts - sp
        is_true(part, read)


def test_only_split_reads_need_a_dorado_with_a_right_sp(one):
    read = make(0)
    whole, part = unaligned(read, "a"), unaligned(read, "b", pi="a", sp=0)
    for program in ("dorado 0.9.6+abc", "dorado 2.0.3"):
        assert isinstance(one(whole, read.samples, program=program), RawRead)
        assert "from 2.1 on" in one(part, read.samples, program=program).reason
    assert "from 2.1 on" in one(part, read.samples, program="guppy 6.5").reason
    for program in ("dorado 2.1.0", "dorado 10.0.0"):
        assert one(part, read.samples, program=program).id == "a:0"


def test_a_folder_of_many_bams(tmp_path):
    reads, contigs = {f"read-{i}": make(i) for i in range(40)}, {}
    for i, (name, read) in enumerate(reads.items()):
        (tmp_path / "run" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "run" / str(i % 3) / f"{i}.bam"
        write_bam(path, [aligned(read, name, contigs), *[unaligned(read, f"extra-{i}")] * 2], contigs)
    calls = Basecalls([tmp_path / "run"])
    for name in np.random.default_rng(0).permutation([*reads, *reads]):
        is_true(calls.label(raw_read(name, reads[name]))[0], reads[name])
    assert calls.unused() == {"in the BAM, without signal in the raw files": 80}


@pytest.mark.parametrize("is_aligned", TRUE_FALSE)
def test_sam_and_cram_give_the_labels_of_bam(tmp_path, monkeypatch, is_aligned):
    """Of CRAM with the --reference alone: it says that its bases are in a file that is gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "calls").mkdir()
    reads, contigs = {f"read-{i}": make(i) for i in range(12)}, {}
    records = [
        aligned(read, name, contigs, len(name) == 6, MD=None) if is_aligned else unaligned(read, name)
        for name, read in reads.items()
    ]
    written, reference = tmp_path / "written.fa", None
    paths = {suffix: tmp_path / "calls" / f"calls.{suffix}" for suffix in ("bam", "sam", "sam.gz", "cram")}
    write_bam(paths["bam"], records, contigs)
    write_bam(paths["sam"], records, contigs, mode="w")
    paths["sam.gz"].write_bytes(gzip.compress(paths["sam"].read_bytes()))
    in_fasta = {"reference_filename": str(write_fasta(written, contigs))} if is_aligned else {}
    write_bam(paths["cram"], records, contigs, mode="wc", **in_fasta)
    if is_aligned:
        reference = written.rename(tmp_path / "reference.fa")
        with pytest.raises(InputError, match=r"--bam .*calls.cram: CRAM, has its bases in a --reference; give"):
            Basecalls([paths["cram"]])
        other = write_fasta(tmp_path / "other.fa", {name: sequence[::-1] for name, sequence in contigs.items()})
        with pytest.raises(InputError, match=r"calls.cram: CRAM, cannot be read with this --reference; give"):
            Basecalls([paths["cram"]], other)
    whole = paths["cram"].read_bytes()
    paths["cram"].write_bytes(whole[:-38])  # the container that ends a CRAM
    with pytest.raises(InputError, match=r"calls.cram: cannot be read as BAM, SAM or CRAM \(.*missing EOF block"):
        Basecalls([paths["cram"]], reference)
    paths["cram"].write_bytes(whole)
    for path in paths.values():
        calls = Basecalls([path], reference)
        for name in np.random.default_rng(0).permutation(list(reads)):
            (labelled,) = calls.label(raw_read(name, reads[name]))
            (is_true if is_aligned else is_called)(labelled, reads[name])
        assert not calls.unused()
    calls = Basecalls([tmp_path / "calls"], reference)
    assert len(calls.label(raw_read("read-3", reads["read-3"]))) == 3 and calls.files == [
        paths[suffix] for suffix in ("bam", "cram", "sam")
    ]
    assert len(list((tmp_path / "temporary").glob("*/*.bam"))) == 2
    del calls
    assert not list((tmp_path / "temporary").iterdir())


# ---------------------------------------------------------------------------------------------- reads left out


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"ns": 3}, "beyond the signal"),
        ({"ns": 100_000}, "ns tag beyond the signal"),
        ({"ns": None}, "no ts or ns tag"),
        ({"ts": None}, "no ts or ns tag"),
        ({"ts": "+"}, "no ts or ns tag"),
        ({"ts": 100_000}, "beyond the signal"),
        ({"ts": -1}, "beyond the signal"),
        ({"pi": "a"}, "without sp"),
        ({"pi": "a", "sp": 100}, "ns tag beyond the signal"),
        ({"pi": "a", "sp": -1}, "beyond the signal"),
        ({"mv": array.array("b", [5, 1])}, "different lengths"),
        ({"mv": array.array("b", [5, 0, 0])}, "different lengths"),
        ({"mv": array.array("b", [5])}, "different lengths"),
        ({"mv": array.array("b", [0] + [1] * 60)}, "beyond the signal"),
        ({"mv": array.array("b", [-1] + [1] * 60)}, "beyond the signal"),
        ({"mv": array.array("b", [100] + [1] * 60)}, "beyond the signal"),
    ],
)
def test_wrong_tags_are_rejected(one, tags, reason):
    read = make(0, edits=(0, 0, 0, 0))
    result = one(unaligned(read, "a", **tags), read.samples)
    assert isinstance(result, Rejected) and result.id == "a" and reason in result.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flag": 4}, "unaligned"),
        ({"query_sequence": "ACGT" * 14, "cigarstring": "4H56M"}, "move table and sequence of different lengths"),
        ({"query_sequence": None}, "move table and sequence of different lengths"),
        ({"cigarstring": "60I"}, ""),
        ({"cigarstring": None}, ""),
    ],
)
def test_wrong_alignments_are_rejected(one, change, reason):
    read, contigs = make(0, edits=(0.1, 0, 0, 0)), {}
    record = aligned(read, "a", contigs)
    for name, value in change.items():
        setattr(record, name, value)
    result = one(record, read.samples, contigs)
    assert isinstance(result, Rejected) and result.id == "a" and reason in result.reason


def test_letters_other_than_the_four_bases_are_rejected(one):
    """Where they are labels: a called N is no matter where the reference knows better."""
    read, contigs = make(0, edits=(0, 0, 0, 0)), {}
    reference, called = aligned(read, "a", contigs, MD="5N54"), aligned(read, "a", contigs, MD="0A59")
    called.query_sequence = "N" + called.query_sequence[1:]
    assert "other than A, C, G and T" in one(reference, read.samples, contigs).reason
    assert spelled(one(called, read.samples, contigs)) == "A" + called.query_sequence[1:]
    assert "other than A, C, G and T" in one(called, read.samples, contigs, options={"called": True}).reason


@pytest.mark.parametrize("md", ["3", "rubbish", "", "^", "5^A", "-5", "10A500", "400^AC0", "1000000", "10^ACGT49", 5])
def test_a_wrong_md_tag_is_rejected(tmp_path, md):
    """In a process of its own: pysam 0.24.1 writes beyond its memory where MD is shorter than the alignment."""
    reads, contigs = {str(i): make(i, edits=(0, 0, 0, 0), length=400) for i in range(12)}, {}
    records = [aligned(read, name, contigs, **({"MD": md} if int(name) % 4 else {})) for name, read in reads.items()]
    calls = Basecalls([write_bam(tmp_path / "calls.bam", records, contigs)])

    def label():
        for name, read in reads.items():
            (result,) = calls.label(raw_read(name, read))
            assert ("MD tag" in result.reason) if int(name) % 4 else isinstance(result, RawRead)

    process = multiprocessing.get_context("fork").Process(target=label)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("reverse", TRUE_FALSE)
def test_coverage_and_identity(one, reverse):
    """At the thresholds a read is kept; identity counts all columns of the alignment, insertions and deletions, too."""
    read, contigs = make(3, clips=(20, 7)), {}
    operations = "".join(operation for operation, *_ in read.columns)
    called, of_alignment = re.sub("[DN]", "", operations), re.sub("[SN]", "", operations)
    coverage, identity = len(called.strip("S")) / len(called), operations.count("=") / len(of_alignment)
    assert 0.4 < coverage < 0.8 and 0.5 < identity < 0.9
    for name, value, reason in (("coverage", coverage, "aligned over less"), ("identity", identity, "identity below")):
        record = aligned(read, "a", contigs := {}, reverse)
        kept = one(record, read.samples, contigs, options={f"min_{name}": value - 1e-9})
        is_true(kept, read)
        assert (kept.identity, kept.coverage) == (pytest.approx(identity), pytest.approx(coverage))
        result = one(record, read.samples, contigs, options={f"min_{name}": value + 1e-9})
        assert isinstance(result, Rejected) and reason in result.reason
        whole = make(0, edits=(0, 0, 0, 0))
        record = aligned(whole, "a", contigs := {}, reverse)
        is_true(one(record, whole.samples, contigs, options={f"min_{name}": 1}), whole)


def test_changed_tags_are_labelled_or_rejected(tmp_path):
    """Whatever is in the tags, labels are whole and no read stops the rest."""
    rng = np.random.default_rng(0)
    values = [
        lambda: int(rng.integers(-50, 2000)), lambda: float(rng.normal(0, 100)), lambda: letters(rng, 3),
        lambda: "9", lambda: "", lambda: None, lambda: array.array("b", rng.integers(-2, 9, 4).tolist()),
        lambda: array.array("f", [5.0, np.nan, 1.0]), lambda: array.array("f", [np.nan, 1.0]),
        lambda: array.array("I", [5, 2**32 - 1, 1]), lambda: array.array("i", [2**31 - 1, 1]),
    ]  # fmt: skip
    fine, kept, left_out, failed = make(0), 0, 0, []
    for number in range(300):
        read, contigs = make(number, length=15), {}
        tags = rng.choice(["mv", "ts", "ns", "pi", "sp", "dx"], rng.integers(1, 3))
        tags = {tag: values[rng.integers(len(values))]() for tag in tags}
        if rng.random() < 0.3:
            tags["mv"] = array.array("b", [STRIDE, *rng.permutation(read.moves)])
        if "sp" in tags and "pi" not in tags:
            tags["pi"] = "a"
        records = [aligned(read, "a", contigs, **tags), aligned(fine, "fine", contigs)]
        path = write_bam(tmp_path / "calls.bam", records, contigs)
        try:
            calls = Basecalls([path])
            results = calls.label(raw_read("a", read))
            is_true(calls.label(raw_read("fine", fine))[0], fine)
        except Exception as error:
            failed.append(f"{error!r}: {tags}")
            continue
        for result in results:
            if isinstance(result, Rejected):
                left_out += 1
                assert result.id == "a" and result.reason
                continue
            kept += 1
            bases, starts = result.bases, result.base_starts
            assert bases.dtype == np.uint8 and set(bases.tolist()) <= {1, 2, 3, 4} and len(bases) > 0
            assert starts.dtype == np.int64 and len(starts) == len(bases) + 1 and (np.diff(starts) >= 0).all()
            assert starts[0] >= 0 and starts[-1] <= len(result.dacs) and re.fullmatch(r"a(:\d+)?", result.id)
    assert kept > 30 and left_out > 30 and not failed, failed


# -------------------------------------------------------------------------------------------------- prepare_data.py


def write_raw(path, reads):
    rng = np.random.default_rng(0)
    write_pod5(path, {name: wander(rng, read.samples) for name, read in reads.items()})
    return path


def names(number):
    return [str(uuid.UUID(int=i + 1)) for i in range(number)]


def test_the_store_and_its_account(tmp_path, command, capsys):
    ids, contigs = names(16), {}
    reads = {name: make(i) for i, name in enumerate(ids)}
    reads[ids[4]], reads[ids[5]] = make(4, clips=(50, 40)), make(5, edits=(0.6, 0, 0, 0))
    reads[ids[6]], parent = make(6, length=5), SimpleNamespace(samples=3000)
    bam = [aligned(reads[name], name, contigs, i % 2 == 1) for i, name in enumerate(ids[:7])]
    secondary, supplementary, duplicate = (aligned(reads[ids[0]], ids[0], contigs) for _ in range(3))
    secondary.flag, supplementary.flag = 256, 2048
    bam += [secondary, supplementary, duplicate]
    bam += [aligned(reads[ids[7]], ids[7], contigs), aligned(reads[ids[8]], ids[8], contigs)]
    contigs["contig-11"] = contigs["contig-11"][:4] + "N" + contigs["contig-11"][5:]
    bam += [unaligned(reads[ids[9]], ids[9]), aligned(reads[ids[10]], ids[10], contigs, ns=5)]
    bam += [aligned(reads[ids[11]], f"{ids[11]};{ids[0]}", contigs, dx=1), aligned(reads[ids[12]], ids[12], contigs)]
    parts = {100: reads[ids[13]], 1500: reads[ids[14]]}
    bam += [aligned(read, f"part-{sp}", contigs, pi=ids[13], sp=sp) for sp, read in parts.items()]
    calls = write_bam(tmp_path / "calls.bam", bam, contigs)
    reference = write_fasta(tmp_path / "ref.fa", {k: v for k, v in contigs.items() if k != "contig-10"})
    raws = {name: reads[name] for name in [*ids[:12], ids[15]]} | {ids[13]: parent}
    raw, out = write_raw(tmp_path / "a.pod5", raws), tmp_path / "store"
    command(raw, "--bam", calls, "--reference", reference, "-o", out, "--chunk-len", 200)

    info = json.loads((out / "store.json").read_text())
    assert info["kept"] == {"labelled": 6} and info["samples_read"] == sum(read.samples for read in raws.values())
    assert info["left_out"] == {
        "aligned over less than 50%": 1,
        "identity below 70%": 1,
        "shorter than 200 samples": 1,
        "read twice": 1,
        "aligned to what --reference lacks": 1,
        "bases other than A, C, G and T": 1,
        "unaligned": 1,
        "move table beyond the signal": 1,
        "not in the BAM": 2,
        "duplex, called from two reads": 1,
        "in the BAM, without signal in the raw files": 1,
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("read: 14 reads") and lines[1] == "kept: 6 labelled"
    assert all(f"{count} {reason}" in lines[2] for reason, count in info["left_out"].items())
    assert re.match(
        r"labels: 0 reads with called bases, \d+ with the reference's, of mean identity 8\d\.\d %", lines[3]
    )

    store, signals = ReadStore(out), {read.id: normalised(read)[0] for read in raw_reads(raw)}
    assert store.reads["identity"].min() >= 0.7 and store.reads["identity"].max() <= 1
    assert store.reads["coverage"].min() >= 0.5 and store.reads["coverage"].max() <= 1
    made = {name: (reads[name], 0) for name in ids[:4]} | {f"{ids[13]}:{sp}": (parts[sp], sp) for sp in parts}
    assert {row["id"].decode() for row in store.reads} == made.keys()
    for row in store.reads:
        name = row["id"].decode()
        (read, sp), span = made[name], slice(row["bases_start"], row["bases_start"] + row["bases_length"])
        first, signal = read.truth[0][1], store.signal[row["start"] : row["start"] + row["length"]]
        assert np.array_equal(signal, signals[name.partition(":")[0]][first + sp : read.end + sp])
        starts = np.append(store.base_starts[span] + first, read.end)
        is_true(SimpleNamespace(bases=store.bases[span], base_starts=starts), read)


def test_the_account_counts_each_read_once(tmp_path, command, capsys):
    """Of 6 reads one has no move table and one is too short: 4 are kept, and of 4 the labels are told."""
    reads = {name: make(i, length=5 if i == 5 else 60) for i, name in enumerate(names(6))}
    bam = [unaligned(read, name, **({"mv": None} if i == 0 else {})) for i, (name, read) in enumerate(reads.items())]
    raw, calls = write_raw(tmp_path / "a.pod5", reads), write_bam(tmp_path / "calls.bam", bam)
    command(raw, "--bam", calls, "-o", tmp_path / "store", "--chunk-len", 100)
    read, kept, left_out, labels, *_ = capsys.readouterr().out.splitlines()
    assert kept == "kept: 4 labelled" and "1 shorter than 100 samples" in left_out
    told = read.partition(" reads,")[0], labels
    assert told == ("read: 6", "labels: 4 reads with called bases, 0 with the reference's")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.pod5 --bam nowhere.bam", "--bam .*nowhere.bam: no such file"),
        ("a.pod5 --bam empty", "--bam .*empty: no .bam, .sam, .cram file"),
        ("a.pod5 --bam half.bam", "--bam .*half.bam: cannot be read as BAM"),
        ("a.pod5 --bam endless.bam", "--bam .*endless.bam: cannot be read as BAM"),
        ("a.pod5 --bam half.sam", r"--bam .*half.sam: cannot be read as BAM, SAM or CRAM \(.*error reading file"),
        ("a.pod5 --bam text.bam", "--bam .*text.bam: cannot be read as BAM"),
        ("a.pod5 --bam none.bam", "--bam .*none.bam: no basecall can be used"),
        ("a.pod5 --bam moveless.bam", "--bam .*moveless.bam: .*1 no move table.*--emit-moves"),
        ("a.pod5 --bam calls.bam --reference nowhere.fa", "--reference .*nowhere.fa: cannot be read"),
        ("a.pod5 --bam calls.bam --reference text.bam", "--reference .*text.bam: cannot be read"),
        ("a.pod5 --bam calls.bam --reference other.fa", "--reference.*contig-0 is not as long"),
        ("a.pod5 --bam calls.bam --min-identity 70", "--min-identity 70"),
        ("a.pod5 --bam calls.bam unaligned.bam", "--bam: calls.bam is aligned and unaligned.bam is not"),
        ("a.pod5 --bam no-md.bam", "--bam .*no-md.bam: aligned, without MD.*--reference"),
        (". --bam no-md.bam", "--bam .*no-md.bam: aligned, without MD.*--reference"),
        ("a.pod5 --bam calls.bam --bonito", "--bonito: not with --bam"),
        ("a.pod5 --reference ref.fa", "--reference: has no use without --basecaller or --bam"),
    ],
)
def test_errors_name_the_file_or_the_argument(tmp_path, monkeypatch, command, words, message):
    monkeypatch.chdir(tmp_path)
    (name,), read, contigs = names(1), make(0, length=2000), {}
    whole = aligned(read, name, contigs)
    write_raw(Path("a.pod5"), {name: read})
    write_bam("calls.bam", [whole], contigs)
    write_bam("calls.sam", [whole], contigs, mode="w")
    Path("half.sam").write_text(Path("calls.sam").read_text()[:3000])
    write_bam("none.bam", [], contigs)
    write_bam("unaligned.bam", [unaligned(read, name)])
    write_bam("no-md.bam", [aligned(read, name, {}, MD=None)], contigs)
    write_bam("moveless.bam", [aligned(read, name, {}, mv=None)], contigs)
    write_fasta(Path("ref.fa"), contigs)
    write_fasta(Path("other.fa"), {"contig-0": "ACGT"})
    data = Path("calls.bam").read_bytes()
    Path("half.bam").write_bytes(data[: len(data) // 2])
    Path("endless.bam").write_bytes(data[:-28])  # without the empty block that ends a BAM
    Path("text.bam").write_text("not\na BAM\n")
    Path("empty").mkdir()
    with pytest.raises(InputError, match=message):
        command(*words.split(), "-o", "store", "--chunk-len", "100")
    assert not list(tmp_path.glob("store*"))


# ---------------------------------------------------------------------------------------------------------- real reads


def test_real_reads(shared_data, tmp_path):
    """The current of a base's k-mer is where its label says, but for Guppy's lead of two bases and a few samples."""
    path, correlations = shared_data / "na12878_r941_moves.bam", []
    with pysam.AlignmentFile(path, check_sq=False) as file:
        records = {record.query_name: record for record in file}
    calls = Basecalls([path])
    for raw in raw_reads(shared_data / "na12878_r941.pod5"):
        (labelled,), record = calls.label(raw), records.pop(raw.id)
        assert spelled(labelled) == record.query_sequence
        stride, *moves = record.get_tag("mv")
        first = record.get_tag("ts")
        assert labelled.base_starts[:-1].tolist() == [first + stride * i for i, move in enumerate(moves) if move]
        assert labelled.base_starts[-1] == min(first + stride * len(moves), len(raw.dacs))
        signal = normalised(raw)[0].astype(np.float64)
        levels, total = kmer_levels(labelled.bases.astype(int) - 1)[100:-102], np.append(0, signal.cumsum())
        for shift in (-30, 0, 30):
            starts = labelled.base_starts[102:-100] + shift
            means = np.diff(total[starts]) / np.diff(starts)
            correlations.append(np.corrcoef(means, levels)[0, 1])
    assert not records and not calls.unused()
    before, right, after = np.reshape(correlations, (40, 3)).T
    assert right.min() > 0.55 and right.mean() > 0.67
    assert np.abs(before).max() < 0.4 and np.abs(after).max() < 0.4
