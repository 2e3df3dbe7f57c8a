"""Labels from a genome (common/reads/genome.py): forced alignment, the bases of each read, the split by locus.

The basecaller is played by log-probabilities that peak at known bases, mappy by the hits of known calls; what needs
the real one skips where it is not installed.
"""

import array
import itertools
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pysam
import pytest
import torch

import basecall
import prepare_data
from common import InputError
from common.reads import genome
from common.reads.bam import Basecalls
from common.reads.formats import RawRead, Rejected
from common.reads.genome import Genome, forced_alignment, in_signal, merged, open_genome, region, windows
from common.reads.kmers import shared_kmers
from common.reads.store import ReadStore
from tests.test_bam import write_bam, write_fasta
from tests.test_formats import wander, write_pod5

STRIDE = 4
CIGAR = str.maketrans("=X", "MM")
COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")


def letters(rng, length):
    return "".join(rng.choice(list("ACGT"), length))


def complement(sequence):
    return sequence.encode().translate(COMPLEMENT).decode()[::-1]


# ------------------------------------------------------------------------------------------------- forced alignment


def every_path(log_probs, bases):
    """The steps at which bases begin on the best of all paths that emit them, by trying each; None if there is none."""
    best, starts = -np.inf, None
    for path in itertools.product(range(5), repeat=len(log_probs)):
        begun = [i for i, symbol in enumerate(path) if symbol and (i == 0 or symbol != path[i - 1])]
        if [path[i] for i in begun] == bases:
            score = sum(log_probs[i, symbol] for i, symbol in enumerate(path))
            if score > best:
                best, starts = score, begun
    return starts


def viterbi(log_probs, bases):
    """The same for long ones: all states at all steps, in plain loops."""
    states = [0, *itertools.chain.from_iterable((base, 0) for base in bases)]
    scores, came = np.full((len(log_probs), len(states)), -np.inf), {}
    scores[0, :2] = log_probs[0, states[:2]]
    for step in range(1, len(log_probs)):
        for state, symbol in enumerate(states):
            before = [state] + [state - 1] * (state > 0)
            if state > 1 and symbol and symbol != states[state - 2]:
                before.append(state - 2)
            came[step, state] = max(before, key=lambda one: scores[step - 1, one])
            scores[step, state] = scores[step - 1, came[step, state]] + log_probs[step, symbol]
    path = [max(len(states) - 2, len(states) - 1, key=lambda one: scores[-1, one])]
    for step in range(len(log_probs) - 1, 0, -1):
        path.append(came[step, path[-1]])
    path.reverse()
    return [i for i, state in enumerate(path) if state % 2 and (i == 0 or path[i - 1] != state)]


def random_output(rng, steps):
    return np.log(rng.dirichlet(np.full(5, 0.3), steps))


@pytest.mark.parametrize("bases", [[1], [3, 3], [1, 2], [2, 2, 2], [4, 1, 4], [1, 1, 2, 2]])
def test_forced_alignment_is_the_best_of_all_paths(bases):
    rng = np.random.default_rng(sum(bases))
    for steps in (3, 4, 5, 6):
        log_probs = random_output(rng, steps)
        placed, expected = forced_alignment(log_probs, np.array(bases), np.zeros(steps)), every_path(log_probs, bases)
        assert (expected is None and placed is None) or placed.tolist() == expected
    assert expected or len(bases) == 4  # AACC takes six steps and no fewer


def test_forced_alignment_of_many_bases_and_in_a_band():
    rng = np.random.default_rng(0)
    bases = rng.integers(1, 5, 150)
    log_probs = random_output(rng, 450)
    full = viterbi(log_probs, bases.tolist())
    assert forced_alignment(log_probs, bases, np.zeros(450), band=200).tolist() == full
    near = np.searchsorted(full, np.arange(450), "right") - 1  # the path itself
    for band in (8, 20):
        assert forced_alignment(log_probs, bases, near.clip(0), band).tolist() == full
        assert forced_alignment(log_probs, bases, (near + 2.5).clip(0, 149), band).tolist() == full
    assert forced_alignment(log_probs, bases, np.where(near < 75, near, 149).clip(0), band=8) is None  # a leap
    assert forced_alignment(log_probs[:100], bases, near[:100].clip(0)) is None  # 150 bases in 100 steps


# ------------------------------------------------------------------------------------------------- labels of reads


class Hits:
    """mappy's Aligner of a genome that knows the hits of some sequences."""

    def __init__(self, contigs, hits=()):
        self.contigs, self.hits, self.seq_names = contigs, dict(hits), list(contigs)

    def map(self, sequence):
        return self.hits.get(sequence, [])

    def seq(self, name, start=0, end=sys.maxsize):
        return self.contigs[name][start:end]


class Made:
    """A read of contig[start:end] and what a basecaller, called with errors, says of it.

    edits: chances of a substituted, an inserted and a deleted base. clips: called bases that are not the genome's.
    """

    def __init__(self, rng, name, contigs, contig, start, end, reverse=False, rna=False, edits=(0, 0, 0), clips=(0, 0)):
        genome, operations, sequence = contigs[contig][start:end], "", ""  # on the genome's forward strand
        for i, base in enumerate(genome):
            chance = rng.random() if 0 < i < len(genome) - 1 else 1  # an alignment begins and ends with a match
            if chance < edits[0]:
                sequence += rng.choice([one for one in "ACGT" if one != base])
            elif chance < edits[0] + edits[1]:
                sequence, operations = sequence + base + rng.choice(list("ACGT")), operations + "="
            elif chance < sum(edits):
                operations += "D"
                continue
            else:
                sequence += base
            operations += "I" if edits[0] <= chance < edits[0] + edits[1] else "X" if chance < edits[0] else "="
        self.identity = operations.count("=") / len(operations)
        cigar = [[len(list(run)), "MID".index(one)] for one, run in itertools.groupby(operations.translate(CIGAR))]
        # each called base lasts two steps, a blank between; a deleted one hides in the blanks, an inserted one goes
        sequence = letters(rng, clips[0]) + sequence + letters(rng, clips[1])
        q_st, q_en = clips[0], len(sequence) - clips[1]
        if reverse:
            q_st, q_en = len(sequence) - q_en, len(sequence) - q_st
        hit = {"ctg": contig, "r_st": start, "r_en": end, "strand": -1 if reverse else 1, "q_st": q_st, "q_en": q_en}
        hit |= {"cigar": cigar, "is_primary": True, "mlen": operations.count("=")}
        self.hits, self.coverage = [SimpleNamespace(**hit)], (q_en - q_st) / len(sequence)
        self.called = complement(sequence) if reverse else sequence  # 5' to 3'
        in_order = self.called[::-1] if rna else self.called
        truth = complement(genome) if reverse else genome
        self.truth = truth[::-1] if rna else truth
        self.log_probs = np.full((3 * len(in_order) + 5, 5), np.log(0.05))
        self.log_probs[:, 0] = np.log(0.8)
        self.starts = 2 + 3 * np.arange(len(in_order))
        for start_, base in zip(self.starts, in_order, strict=True):
            self.log_probs[start_ : start_ + 2, [0, "NACGT".index(base)]] = np.log([0.05, 0.8])
        self.sequence, self.clip = in_order, clips[reverse != rna]  # in the order of the signal
        self.raw = RawRead(name, wander(rng, STRIDE * len(self.log_probs) - 3), 0.0, 1.0, 4000.0, rna)
        backwards = reverse != rna
        where = {"q_st": self.clip, "r_st": 0, "r_en": len(genome), "cigar": cigar[::-1] if backwards else cigar}
        self.in_truth = SimpleNamespace(**where, strand=1, mlen=hit["mlen"])  # in the order of the signal


def labels_of(made, contigs, regions=(), extra=()):
    """The Genome that knows these Mades, and {id: result of each}."""
    by_id = {one.raw.id: one for one in made}

    def call(reads):
        for raw, signal in reads:
            assert len(signal) == len(raw.dacs)
            one = by_id[raw.id]
            yield raw, one.log_probs, one.sequence, one.starts

    aligner = Hits(contigs, {one.called: one.hits for one in made})
    found = Genome(aligner, call, STRIDE, 0.5, 0.6, regions)
    return found, {result.id: result for result in found.labelled(iter([*(one.raw for one in made), *extra]))}


def spelled(raw):
    return "".join("NACGT"[base] for base in raw.bases)


@pytest.mark.parametrize("rna", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_labels_are_the_genomes_bases_where_they_passed(reverse, rna):
    rng = np.random.default_rng(0)
    contigs = {"a": letters(rng, 3000), "b": letters(rng, 3000)}
    exact = Made(rng, "exact", contigs, "a", 100, 900, reverse, rna)
    clipped = Made(rng, "clipped", contigs, "b", 0, 700, reverse, rna, clips=(20, 35))
    wrong = Made(rng, "wrong", contigs, "b", 1000, 3000, reverse, rna, edits=(0.1, 0.1, 0.1), clips=(7, 0))
    _, results = labels_of([exact, clipped, wrong], contigs)
    for one in (exact, clipped, wrong):
        result = results[one.raw.id]
        assert spelled(result) == one.truth and result.identity == pytest.approx(one.identity)
        assert result.coverage == pytest.approx(one.coverage) and result.split in (0, 1)
        starts = result.base_starts
        assert len(starts) == len(result.bases) + 1 and (np.diff(starts) > 0).all() and starts[-1] <= len(one.raw.dacs)
        assert starts[0] == STRIDE * one.starts[one.clip]
    assert results["exact"].base_starts[:-1].tolist() == (STRIDE * exact.starts).tolist()
    assert results["exact"].base_starts[-1] == len(exact.raw.dacs)
    assert results["clipped"].base_starts.tolist() == (STRIDE * clipped.starts[clipped.clip :][:701]).tolist()
    assert 0.6 < wrong.identity < 0.8


def test_each_rejection_has_its_reason():
    rng = np.random.default_rng(1)
    contigs = {"a": letters(rng, 9000), "n": "N" + letters(rng, 999)}
    reads = {
        "fine": {}, "almost twice": {}, "twice": {}, "nothing": {}, "nowhere": {}, "too fast": {},
        "half": {"clips": (310, 0)}, "bad": {"edits": (0.3, 0.1, 0.1)}, "n": {"contig": "n", "start": 0, "end": 300},
        "border": {"start": 7800, "end": 8001},
    }  # fmt: skip
    places = [{"contig": "a", "start": 500 * i, "end": 500 * i + 300} for i in range(len(reads))]
    reads = zip(places, reads.items(), strict=True)
    made = {name: Made(rng, name, contigs, **(place | how)) for place, (name, how) in reads}
    for name, share in (("twice", 0.96), ("almost twice", 0.94)):
        (best,) = made[name].hits
        made[name].hits.insert(0, SimpleNamespace(**vars(best) | {"is_primary": False, "mlen": share * best.mlen}))
    made["nothing"].sequence, made["nowhere"].hits = "", []
    made["too fast"].log_probs, made["too fast"].starts = made["too fast"].log_probs[:100], np.arange(300) // 3
    extra = [Rejected("file", "in files that cannot be read"), RawRead("flat", np.ones(50, np.int16), 0.0, 1.0, 4000.0)]
    labels, results = labels_of([*made.values()], contigs, regions=["a:8001-9000"], extra=extra)
    reasons = {name: result.reason for name, result in results.items() if isinstance(result, Rejected)}
    assert reasons == {
        "twice": "aligned to several places as well",
        "nothing": "no base called",
        "nowhere": "not aligned to the genome",
        "too fast": "the genome's bases do not fit into the signal",
        "half": "aligned over less than 50%",
        "bad": "identity below 60%",
        "n": "bases other than A, C, G and T",
        "border": "across a border between training and validation",
        "file": "in files that cannot be read",
        "flat": "constant",
    }
    assert results.keys() - reasons.keys() == {"fine", "almost twice"}
    assert labels.places.keys() == {"fine", "almost twice"} and not labels.unused()


# ------------------------------------------------------------------------------------------------- calls of a BAM


def record_of(one, contigs=(), moves=True, **tags):
    """The call of a Made as a BAM has it, aligned if `contigs` are given."""
    record = pysam.AlignedSegment()
    record.query_name, record.flag, record.query_sequence = one.raw.id, 4, one.called
    if contigs:
        (hit,) = one.hits
        reverse, after = hit.strand < 0, len(one.called) - hit.q_en
        left, right = (after, hit.q_st) if reverse else (hit.q_st, after)
        record.flag, record.reference_id, record.reference_start = 16 * reverse, [*contigs].index(hit.ctg), hit.r_st
        record.query_sequence = complement(one.called) if reverse else one.called
        clips = [(pysam.CSOFT_CLIP, left)] * (left > 0), [(pysam.CSOFT_CLIP, right)] * (right > 0)
        record.cigartuples = [*clips[0], *((what, number) for number, what in hit.cigar), *clips[1]]
    if moves:
        begins = np.zeros(len(one.log_probs) - one.starts[0], np.int8)
        begins[one.starts - one.starts[0]] = 1
        tags |= {"mv": array.array("b", [STRIDE, *begins.tolist()]), "ts": int(STRIDE * one.starts[0])}
        tags |= {"ns": len(one.raw.dacs)}
    record.set_tags([*tags.items()])
    return record


@pytest.mark.parametrize("rna", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_moves_place_the_genomes_bases_as_those_of_an_aligned_bam_do(tmp_path, reverse, rna):
    rng = np.random.default_rng(0)
    contigs = {"a": letters(rng, 3000), "b": letters(rng, 3000)}
    exact = Made(rng, "exact", contigs, "a", 100, 900, reverse, rna)
    wrong = Made(rng, "wrong", contigs, "b", 1000, 3000, reverse, rna, edits=(0.1, 0.1, 0.1), clips=(7, 20))
    both, model = (exact, wrong), "rna004_130bps_sup@v5.1.0" if rna else "dna"  # which alone tells
    for one in both:
        one.raw = replace(one.raw, rna=False)
    calls = Basecalls([write_bam(tmp_path / "unaligned.bam", map(record_of, both), model=model)])
    labels = Genome(Hits(contigs, {one.called: one.hits for one in both}), None, 0, 0.5, 0.6, ["b"], calls)
    results = {result.id: result for result in labels.labelled(iter([one.raw for one in both]))}
    bam = write_bam(tmp_path / "aligned.bam", [record_of(one, contigs) for one in both], contigs, model=model)
    aligned = Basecalls([bam], write_fasta(tmp_path / "genome.fasta", contigs))
    for one in both:
        result, (other,) = results[one.raw.id], aligned.label(one.raw)
        assert spelled(result) == spelled(other) == one.truth and np.array_equal(result.base_starts, other.base_starts)
        assert (result.identity, result.coverage) == pytest.approx((other.identity, other.coverage))
        assert result.locus == other.locus and result.split == (one is wrong)
    assert results["exact"].base_starts[:-1].tolist() == (STRIDE * exact.starts).tolist()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("rna", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_bam_tells_the_place_in_the_genome_and_the_basecaller_that_in_the_signal(
    tmp_path, monkeypatch, reverse, rna, aligned
):
    """The basecaller's own call is weak, lacks an end, and is nowhere in the genome but in the stretch of the BAM's."""
    rng = np.random.default_rng(0)
    contigs = {"a": letters(rng, 5000)}
    own = Made(rng, "one", contigs, "a", 1030, 3000, reverse, rna, edits=(0.1, 0.1, 0.1), clips=(9, 4))
    given = Made(rng, "one", contigs, "a", 630, 3300, reverse, rna, edits=(0.02, 0.02, 0.02), clips=(3, 60))
    other = Made(rng, "other", contigs, "a", 630, 3300, reverse, rna)
    offset = 300 if reverse != rna else 400  # bases of the stretch before the own call's
    hit = SimpleNamespace(**vars(own.in_truth) | {"r_st": offset, "r_en": offset + 1970})
    hits = [SimpleNamespace(**vars(hit) | {"mlen": 9, "cigar": [[1500, 0]]}), hit]
    hits.append(SimpleNamespace(**vars(hit) | {"mlen": 9999, "strand": -1, "q_st": 0}))
    where = contigs if aligned else ()
    records = [record_of(given, where, moves=False), record_of(other, where, pi="one", sp=0)]
    calls = Basecalls([write_bam(tmp_path / "calls.bam", records, where)], moves=False)
    if aligned:
        fasta = write_fasta(tmp_path / "genome.fasta", contigs)
        calls = Basecalls([tmp_path / "calls.bam"], fasta, 0.5, 0.7, moves=False)

    class Stretch:
        def __init__(self, seq, **seeds):
            assert seq == given.truth

        def map(self, sequence):
            assert sequence == own.sequence
            return hits

    monkeypatch.setattr(genome, "open_aligner", Stretch)
    call = lambda reads: ((raw, own.log_probs, own.sequence, own.starts) for raw, _ in reads)  # noqa: E731
    aligner = None if aligned else Hits(contigs, {given.called: given.hits})
    labels = Genome(aligner, call, STRIDE, 0.5, 0.6, ["a:1-4000"], calls)
    result, part = labels.labelled(iter([own.raw]))
    assert part == ("one", "part of a split read, which --basecaller cannot place")
    (alone,) = labels_of([own], contigs)[1].values()
    assert spelled(result) == own.truth and np.array_equal(result.base_starts, alone.base_starts)
    assert (result.identity, result.coverage) == pytest.approx((given.identity, given.coverage))
    assert result.split == 1 and labels.places == {"one": ("a", 1030, 3000)}
    (absent,) = labels.labelled(iter([other.raw]))
    assert absent.reason == "not in the BAM" and not labels.unused()

    few = [[n, what] for n, what in hit.cigar][: len(hit.cigar) // 2]
    few = SimpleNamespace(**vars(hit) | {"cigar": few, "r_en": offset + sum(n for n, what in few if what != 1)})
    for found in ([], [few]):
        hits[:] = found
        assert next(labels.labelled(iter([own.raw]))).reason == "not found in the signal by --basecaller"


# ---------------------------------------------------------------------------------------------- the split by locus


def test_merged_places():
    places = [("b", 5, 9), ("a", 10, 20), ("a", 0, 4), ("a", 15, 30), ("a", 4, 6), ("b", 6, 7)]
    assert merged(places) == {"a": [[0, 6], [10, 30]], "b": [[5, 9]]}
    assert merged([]) == {}


@pytest.mark.parametrize(
    "lengths, number, size",
    [({"a": 48502}, 3, 16000), ({"a": 5_000_000}, 50, 100_000), ({"a": 400_000, "b": 100_000}, 8, 62_500)],
)
def test_one_window_in_eight_is_validation(lengths, number, size):
    every, held = windows(lengths)
    assert len(every) == number and set(held) <= set(every) and len(held) == max(1, number // 8)
    assert merged(every) == {contig: [[0, length]] for contig, length in lengths.items()}
    assert all(0.75 * size < end - start < 1.25 * size for _, start, end in every)
    assert windows(lengths) == (every, held)


def test_a_genome_of_one_window_is_not_split():
    assert windows({"plasmid": 5000}) == ([("plasmid", 0, 5000)], [])


def test_regions_are_counted_as_samtools_does():
    lengths = {"a": 50, "b:1-9": 30}
    assert region("a", lengths) == ("a", 0, 50) and region("a:1-1", lengths) == ("a", 0, 1)
    assert region("b:1-9", lengths) == ("b:1-9", 0, 30) and region("b:1-9:2-30", lengths) == ("b:1-9", 1, 30)
    assert region("a:1,0-5,0", lengths) == ("a", 9, 50)
    for text in ("c", "c:1-2", "a:", "a:5", "a:5-", "a:-5", "a:x-y", "", ":1-2"):
        with pytest.raises(InputError, match=r"should be CONTIG or CONTIG:FIRST-LAST; contigs: a, b:1-9"):
            region(text, lengths)
    for text in ("a:0-5", "a:6-5", "a:1-51"):
        with pytest.raises(InputError, match="a has bases 1 to 50"):
            region(text, lengths)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def made(tmp_path, monkeypatch):
    """{id: Made} of reads of both strands all over a genome of 50 kb, in reads.pod5, and a prepare_data.py that calls
    and aligns them."""
    rng = np.random.default_rng(2)
    contigs, reads = {"a": letters(rng, 50_000)}, {}
    for i, start in enumerate(rng.integers(0, 48_000, 60).tolist()):
        name, end = f"00000000-0000-0000-0000-{i:012}", start + int(rng.integers(400, 2000))
        reads[name] = Made(rng, name, contigs, "a", start, end, i % 2 == 1, edits=(0.1, 0.1, 0.1))
    write_pod5(tmp_path / "reads.pod5", {name: one.raw.dacs for name, one in reads.items()})

    def log_probabilities(model, signals, settings, device):
        for raw, _ in signals:
            yield raw, torch.from_numpy(np.pad(reads[raw.id].log_probs, ((0, 1), (0, 0))))  # half a frame too many

    monkeypatch.setattr(basecall, "open_basecaller", lambda *_: None)
    monkeypatch.setattr(basecall, "log_probabilities", log_probabilities)
    aligner = Hits(contigs, {one.called: one.hits for one in reads.values()})
    monkeypatch.setattr(prepare_data, "open_genome", lambda path: aligner)
    in_truth = {one.sequence: [one.in_truth] for one in reads.values()}
    monkeypatch.setattr(genome, "open_aligner", lambda **stretch: SimpleNamespace(map=in_truth.get))
    monkeypatch.chdir(tmp_path)
    return reads


BASECALLER = "--basecaller", "basecaller.pt"


@pytest.mark.parametrize("calls", [BASECALLER, ("--bam", "calls.bam"), ("--bam", "moveless.bam", *BASECALLER)])
def test_labels_come_back_exactly_and_the_split_shares_no_sequence(made, command, capsys, calls):
    one = next(iter(made.values()))
    more = SimpleNamespace(**vars(one) | {"raw": replace(one.raw, id="more")})
    for name, moves in (("calls.bam", True), ("moveless.bam", False)):
        write_bam(name, [record_of(one, moves=moves) for one in (*made.values(), more)])
    for regions in ((), ("--validation-region", "a:1-9000", "a:20001-30000")):
        out = f"store{len(regions)}"
        words = ("--reference", "genome.fasta", *calls, "--chunk-len", 400)
        command("reads.pod5", "-o", out, *words, *regions)
        store, printed = ReadStore(out), capsys.readouterr().out
        held, sequences, places = [], ([], []), []
        for row in store.reads:
            one = made[row["id"].decode()]
            bases = store.bases[row["bases_start"] :][: row["bases_length"]]
            assert "".join("NACGT"[base] for base in bases) == one.truth
            assert row["identity"] == pytest.approx(one.identity) and row["coverage"] == 1
            sequences[row["split"]].append(bases)
            places.append((one.hits[0].r_st, one.hits[0].r_en))
            if row["split"] == 1:
                held.append(places[-1])
        info = json.loads((store.path / "store.json").read_text())
        across = info["left_out"].pop("across a border between training and validation")
        if "--bam" in calls:
            assert info["left_out"].pop("in the BAM, without signal in the raw files") == 1
        assert not info["left_out"] and across > 2 and len(store.reads) == 60 - across and len(held) > 5
        if regions:
            assert all(end <= 9000 or 20_000 <= start < end <= 30_000 for start, end in held)
        assert not any(shared_kmers(sequences[1], sequences[0]))
        assert "hold 0.0% of validation reads' 21-mers (same strand), 0.0% (either)" in printed
        covered = len(set().union(*(range(*place) for place in places)))
        assert f"they cover {covered / 50_000:.1%} of the genome" in printed
        assert f"labels: {len(store.reads)} reads with the genome's bases, of mean identity 7" in printed
        source = ", ".join(regions[1:]) or "1 of 3 windows of about 16666 bases"
        assert f"split by locus: {len(held)} reads for validation, from {source}" in printed


@pytest.mark.parametrize(
    "words, message",
    [
        ("--reference g.fa", "--reference: has no use without --basecaller or --bam"),
        ("--basecaller b.pt", "--basecaller: give it the genome, --reference"),
        ("--basecaller b.pt --bam calls.bam", "--basecaller: give it the genome, --reference"),
        ("--validation-region a", "--validation-region: has no use without --basecaller, or --reference and"),
        ("--validation-region a --bam calls.bam", "--validation-region: has no use without --basecaller, or --ref"),
        ("--bam moveless.bam --reference g.fa", "60 no move table); basecall with --emit-moves, or give --ref"),
        ("--basecaller b.pt --reference g.fa --bonito", "--bonito: not with --basecaller"),
        ("--basecaller b.pt --reference g.fa --validation-region c", "--validation-region c: should be CONTIG or"),
    ],
)
def test_errors_for_people(made, command, tmp_path, words, message):
    write_bam("calls.bam", map(record_of, made.values()))
    write_bam("moveless.bam", (record_of(one, moves=False) for one in made.values()))
    with pytest.raises(InputError, match=re.escape(message)):
        command("reads.pod5", "-o", "store", *words.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.bam", "moveless.bam", "reads.pod5"]


def test_what_to_install_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mappy", None)
    with pytest.raises(InputError, match="--reference: pip install mappy"):
        open_genome(tmp_path / "genome.fasta")


# --------------------------------------------------------------------------------------------------------- mappy


def test_mappy_finds_weak_calls_on_both_strands(tmp_path):
    pytest.importorskip("mappy")
    rng = np.random.default_rng(3)
    contigs = {"a": letters(rng, 30_000), "b": letters(rng, 20_000)}
    (tmp_path / "genome.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in contigs.items()))
    aligner = open_genome(tmp_path / "genome.fasta")
    for i in range(10):
        one = Made(rng, str(i), contigs, "ab"[i % 2], 1000 * i, 1000 * i + 5000, i % 4 > 1, edits=(0.12, 0.08, 0.1))
        hit, made_hit = max(aligner.map(one.called), key=lambda hit: hit.mlen), one.hits[0]
        assert 0.65 < one.identity < 0.75 and (hit.ctg, hit.strand) == (made_hit.ctg, made_hit.strand)
        assert abs(hit.r_st - made_hit.r_st) < 30 and abs(hit.r_en - made_hit.r_en) < 30
        one.hits = [hit]
        result = labels_of([one], contigs, regions=["a"])[1][one.raw.id]
        assert result.split == (hit.ctg == "a")
        text = contigs[hit.ctg][hit.r_st : hit.r_en]
        assert spelled(result) == (complement(text) if hit.strand < 0 else text)


def test_a_weak_call_is_found_in_the_signal_where_it_is_and_not_where_it_is_not():
    pytest.importorskip("mappy")
    rng = np.random.default_rng(4)
    contigs = {"a": letters(rng, 30_000)}
    for i in range(10):
        one = Made(rng, str(i), contigs, "a", 2000 * i, 2000 * i + 400 * (i + 1), edits=(0.13, 0.1, 0.12), clips=(9, 4))
        own, truth = (np.array(["NACGT".index(base) for base in text]) for text in (one.sequence, one.truth))
        query, reference, identity = in_signal(truth, own)
        assert identity > genome.IN_SIGNAL and len(query) > 0.5 * len(truth)
        assert (own[query] == truth[reference]).mean() > 0.75
        assert np.abs(query - 9 - reference).max() < 0.2 * len(truth)
        assert in_signal(truth[::-1], own)[2] < genome.IN_SIGNAL


def test_a_file_that_is_no_genome_is_refused(tmp_path):
    pytest.importorskip("mappy")
    (tmp_path / "empty.fasta").touch()
    (tmp_path / "text.fasta").write_bytes(bytes(range(256)) * 9)
    for name in ("missing.fasta", "empty.fasta", "text.fasta", ""):
        with pytest.raises(InputError, match=r"--reference .*: cannot be read as FASTA"):
            open_genome(tmp_path / name)
