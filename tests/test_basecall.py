"""basecall.py: chunks and their joins, batches, decoding, the files it writes, and what it leaves when it fails."""

import gzip
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import uuid
from functools import partial
from types import SimpleNamespace

import numpy as np
import pysam
import pytest
import torch

import basecall
from basecall import chunk_starts, chunks_of, decode, log_probabilities
from benchmark.evaluate_calls import read_calls
from common import InputError
from common.args import parse_args
from common.ctc import ALPHABET
from common.pore_model import HOP, MaskedBatchNorm1d, PoreModel
from common.reads.bam import Basecalls
from common.reads.formats import RawRead, raw_reads
from common.reads.normalise import normalised
from finetune_basecaller import Basecaller
from tests.forks import full_disk, script, stdout_to
from tests.test_bam import aligned, write_fasta
from tests.test_formats import DIGITISATION, OFFSET, PROJECT, RANGE, RATE, wander, write_fast5, write_mapped, write_pod5

CPU = torch.device("cpu")
FORMATS = (".fastq", ".fastq.gz", ".bam", ".sam")


def basecaller(identity=False, encoder="wide", window=75):
    """A basecaller of random weights that calls a base in about six samples; window as --attention-window, in frames.

    identity: its transformer changes nothing, so that a frame says what the samples around it do.
    """
    torch.manual_seed(0)
    model = Basecaller(PoreModel.of_size("tiny", encoder=encoder))
    model.pore_model.window = window
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm1d):
            module.momentum = 1.0  # statistics of the batch below
    with torch.no_grad():
        for layer in model.pore_model.layers:
            for linear in (layer.output, layer.feed_forward[2]) if identity else ():
                linear.weight.zero_()
                linear.bias.zero_()
        model.head.weight *= 4
        model.train()(torch.randn(8, 1200))
    return model.eval()


def settings(**changes):
    return SimpleNamespace(**{"chunk_len": 400, "overlap": 200, "batch_size": 8, "precision": "fp32"} | changes)


def signals(lengths, seed=0):
    """(number, normalised signal) of reads, as normalised() makes them, but for their levels."""
    rng = np.random.default_rng(seed)
    return [(i, rng.standard_normal(length).astype(np.float16)) for i, length in enumerate(lengths)]


@torch.no_grad()
def whole(model, signal):
    return model(torch.from_numpy(signal).float()[None])[0][0]


# ----------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk_len, overlap", [(8, 0), (16, 8), (40, 32), (48, 16), (400, 200)])
def test_chunks_cover_a_read_and_their_kept_steps_tile_it(chunk_len, overlap):
    for length in [*range(1, 200), *range(395, 420), 1599, 1600, 1601, 5003]:
        starts = chunk_starts(length, chunk_len, overlap)
        steps, seen, end = [], set(), None
        for start, (_, samples, keep, last) in zip(
            starts, chunks_of([(7, np.arange(length))], chunk_len, overlap), strict=True
        ):
            first, after, seconds = samples[0], samples[-1] + 1, np.arange(-(-len(samples) // 8) * 2)[keep]
            assert first == start and first % HOP == 0 and len(samples) <= chunk_len and last == (after == length)
            if first:
                margin = end - first - overlap  # what the last overlap is longer
                assert margin >= 0 and (margin == 0 or last)
                assert abs((first + 4 * seconds[0]) - (first + end) / 2) <= 8  # joined in the middle
            steps += (first // 4 + seconds).tolist()
            seen |= set(range(first, after))
            end = after
        assert end == length and len(seen) == length and steps == list(range(2 * -(-length // 8)))


@pytest.mark.parametrize(
    "encoder, chunk_len, overlap, batch_size",
    [("wide", 40, 32, 1), ("wide", 400, 32, 5), ("wide", 400, 200, 64), ("wide", 1200, 200, 7), ("thin", 16, 8, 33)],
)
def test_chunks_equal_the_whole_read_where_a_frame_depends_on_its_samples_alone(
    encoder, chunk_len, overlap, batch_size
):
    """At every step. Half of an overlap of 32 is what the wide encoder sees on either side."""
    model, step = basecaller(identity=True, encoder=encoder), chunk_len - overlap
    around = [chunk_len, chunk_len + step, chunk_len + 3 * step]
    around = [n + d for n in around for d in (-8, -1, 0, 1, 9)]
    reads = signals([1, 7, 8, 9, 31, *around, min(3001, 10 * chunk_len + 1)])
    args = settings(chunk_len=chunk_len, overlap=overlap, batch_size=batch_size)
    for (number, samples), (read, found) in zip(reads, log_probabilities(model, reads, args, CPU), strict=True):
        expected = whole(model, samples)
        assert number == read and found.shape == expected.shape == (2 * -(-len(samples) // 8), 5)
        assert torch.allclose(found, expected, atol=1e-4), len(samples)
    assert (found[1:] - expected[:-1]).abs().mean() > 0.5  # a step off would be seen


@pytest.mark.parametrize("window", [2, 10])
def test_chunks_equal_the_whole_read_where_the_overlap_is_twice_what_a_frame_can_see(window):
    """With all of the transformer, 3 layers. A shorter overlap is near: ten times nearer than a step off would be."""
    model, reads = basecaller(window=window), signals([5003, 777, 1009])
    overlap = 2 * 8 * window * 3 + 32
    args = settings(chunk_len=overlap + 104, overlap=overlap)
    for (_, samples), (_, found) in zip(reads, log_probabilities(model, reads, args, CPU), strict=True):
        assert torch.allclose(found, whole(model, samples), atol=1e-4)
    expected = whole(model, reads[0][1])
    assert (expected - whole(basecaller(identity=True), reads[0][1])).abs().mean() > 0.4  # attention matters
    found = next(log_probabilities(model, reads, settings(chunk_len=600, overlap=48), CPU))[1]
    off = min((found[n:] - expected[:-n]).abs().mean() for n in (1, 2, 4))
    assert (found - expected).abs().max() > 1e-3 and (found - expected).abs().mean() < 0.1 * off


def test_batch_mates_do_not_matter_and_results_come_in_order():
    model = basecaller()
    reads = signals([5000, 1, 399, 400, 401, 17, 2222, 8, 640, 3, 3, 1200, 5])
    results = [list(log_probabilities(model, reads, settings(batch_size=size), CPU)) for size in (1, 3, 64)]
    for (number, samples), *rows in zip(reads, *results, strict=True):
        assert [read for read, _ in rows] == [number] * 3
        assert rows[0][1].shape == (2 * -(-len(samples) // 8), 5)
        for _, found in rows[1:]:
            assert torch.allclose(found, rows[0][1], atol=1e-4)


def test_batches_fill_across_reads_and_no_more_is_read_than_fills_one():
    sizes, taken, model = [], [], basecaller()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    # one chunk each, but every seventh three
    reads = ((taken.append(i) or i, samples) for i, samples in signals([800 if i % 7 == 3 else 100 for i in range(70)]))
    for done, (read, _) in enumerate(log_probabilities(model, reads, settings(batch_size=16), CPU), 1):
        assert read == done - 1 and len(taken) <= done + 16
        if done == 1:
            assert len(taken) <= 12 and len(sizes) == 1
    assert sizes == [16] * 5 + [10] and len(taken) == 70


# ----------------------------------------------------------------------------------------------------------- decode


def matrix(*rows):
    """log-probabilities of steps given as {letter: p}, N the blank; the rest is shared by the others."""
    probs = [[row.get(letter, (1 - sum(row.values())) / (5 - len(row))) for letter in ALPHABET] for row in rows]
    return torch.tensor(probs).log()


def test_decode_of_what_is_known():
    blank = {"N": 0.96}
    sequence, starts, qualities = decode(matrix(blank, {"A": 0.9}, blank, {"G": 0.99}, {"G": 0.5}, {"C": 0.8}), 1)
    assert (sequence, starts.tolist(), qualities.tolist()) == ("AGC", [1, 3, 5], [10, 20, 7])
    sequence, starts, qualities = decode(matrix({"T": 0.7}, {"T": 0.9}, blank, {"T": 0.999}, {"N": 0.6}, blank), 1)
    assert (sequence, starts.tolist(), qualities.tolist()) == ("TT", [0, 3], [10, 30])
    assert decode(matrix({"T": 1.0}), 1)[2].tolist() == [50]  # p of 1 is taken for 0.99999
    nothing, starts, qualities = decode(matrix(blank, blank), 1)
    assert nothing == "" and len(starts) == len(qualities) == 0


def random_matrices(number, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        yield (2 * torch.randn(steps, 5, generator=generator)).log_softmax(-1)


def greedy(log_probs):
    """Sequence, starts and qualities by a loop over the steps."""
    sequence, starts, best, before = "", [], [], 0
    for step, row in enumerate(log_probs.exp().tolist()):
        symbol = row.index(max(row))
        if symbol and symbol != before:
            sequence += ALPHABET[symbol]
            starts.append(step)
            best.append(0)
        if sequence:
            best[-1] = max(best[-1], row[ALPHABET.index(sequence[-1])])
        before = symbol
    return sequence, starts, [-10 * np.log10(max(1 - p, 1e-5)) for p in best]


def test_greedy_search_against_a_loop():
    for log_probs in random_matrices(20, 150):
        sequence, starts, qualities = decode(log_probs, 1)
        expected = greedy(log_probs)
        assert sequence == expected[0] and starts.tolist() == expected[1] and len(sequence) > 50
        assert np.abs(qualities - np.array(expected[2])).max() < 0.51 and qualities.dtype == np.uint8


def likelihood(log_probs, sequence):
    """log of the summed probability of all paths that spell `sequence`."""
    target = torch.tensor([[ALPHABET.index(base) for base in sequence]])
    lengths = torch.tensor([len(log_probs)]), torch.tensor([len(sequence)])
    return -torch.nn.functional.ctc_loss(log_probs[:, None], target, *lengths, reduction="sum").item()


def test_beam_search_is_seldom_less_probable_than_greedy_and_often_more():
    pytest.importorskip("fast_ctc_decode")
    nothing, starts, qualities = decode(matrix({"N": 0.96}, {"N": 0.96}), 5)
    assert nothing == "" and len(starts) == len(qualities) == 0
    gains = []
    for log_probs in random_matrices(200, 40):
        found = [decode(log_probs, beam_size)[0] for beam_size in (1, 5)]
        gains.append(likelihood(log_probs, found[1]) - likelihood(log_probs, found[0]))
    assert np.mean(gains) > 0.5 and np.mean(np.array(gains) < -1e-4) < 0.1 and min(gains) > -0.5


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "basecaller.pt"
    torch.save(basecaller().state_dict(), path)
    return path


COMMON = ["--device", "cpu", "--beam-size", "1", "--batch-size", "64"]
LENGTHS = [40, 700, 1201, 1202, 1203, 1204, 1205, 5003, *range(300, 316)]


@pytest.fixture(scope="module")
def reads():
    rng = np.random.default_rng(0)
    return {str(uuid.UUID(bytes=rng.bytes(16))): wander(rng, length) for length in LENGTHS}


@pytest.fixture(scope="module")
def raw_file(reads, tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "reads.pod5"
    write_pod5(path, reads)
    return path


@pytest.fixture
def call(weights, tmp_path, monkeypatch):
    """Runs the script in this process: call(words...) writes tmp_path / "calls.fastq" or what --out says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*words, weights=weights, out="calls.fastq"):
        words = [*COMMON, weights, *words, "--out", out]
        monkeypatch.setattr(sys, "argv", ["basecall.py", *map(str, words)])
        basecall.main(parse_args(basecall.Args))
        return tmp_path / out

    return run


def parsed(path):
    """{id: (sequence, qualities)}, in the order of the file."""
    if path.suffix in (".bam", ".sam"):
        with pysam.AlignmentFile(path, check_sq=False) as file:
            records = list(file.fetch(until_eof=True))
        return {record.query_name: (record.query_sequence, list(record.query_qualities)) for record in records}
    with pysam.FastxFile(str(path)) as file:
        return {record.name: (record.sequence, list(record.get_quality_array())) for record in file}


def test_all_formats_hold_the_same_reads(call, raw_file, reads, weights, capsys):
    expected = parsed(plain := call(raw_file))
    assert list(expected) == list(reads)
    model = basecaller()
    for raw in raw_reads(raw_file):
        sequence, qualities = expected[raw.id]
        assert len(qualities) == len(sequence) > len(raw.dacs) / 20 and len(set(sequence)) >= 3
        if len(raw.dacs) <= 1205 and -len(raw.dacs) % 8 < 4:
            assert sequence == greedy(whole(model, normalised(raw)[0]))[0]
    assert 2 < np.std([quality for _, qualities in expected.values() for quality in qualities]) < 20
    lengths = sorted((len(sequence) for sequence, _ in expected.values()), reverse=True)
    n50 = next(length for i, length in enumerate(lengths) if 2 * sum(lengths[: i + 1]) >= sum(lengths))
    said = capsys.readouterr()
    summary = f"called: {len(reads)} reads, {sum(lengths)} bases, N50 {n50}\nleft out: none\n"
    assert said.out == "" and said.err.endswith(summary)
    for name in ("other/calls.bam", "calls.sam"):
        found = read_calls(path := call(raw_file, out=name))
        assert {read: (sequence, list(qualities)) for read, (sequence, qualities) in found.items()} == expected
        assert parsed(path) == expected
    assert gzip.decompress(call(raw_file, out="calls.fastq.gz").read_bytes()) == plain.read_bytes()
    words = [sys.executable, PROJECT / "basecall.py", *COMMON, weights, raw_file, "-o", "-"]
    done = subprocess.run(words, capture_output=True)  # the whole way once, through a process of its own
    assert done.returncode == 0 and done.stdout == plain.read_bytes()
    assert b"basecalling: 100%" in done.stderr and done.stderr.endswith(summary.encode())


@pytest.mark.parametrize(
    ("saved", "words", "frames"),
    [
        (None, "", 75),
        ('{"chunk_len": 3600}', "", 225),
        ('{"chunk_len": 3600}', "--attention-window 80", 10),
        ("{", "", 75),
        ('{"bonito": 1}', "", 75),
    ],
)
def test_the_window_is_half_of_a_chunk_in_training(weights, reads, call, tmp_path, monkeypatch, saved, words, frames):
    write_pod5(tmp_path / "one.pod5", dict([*reads.items()][1:2]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "basecaller.pt").write_bytes(weights.read_bytes())
    if saved is not None:
        (tmp_path / "run" / "args.json").write_text(saved)
    seen, calls = [], basecall.basecalls
    monkeypatch.setattr(
        basecall, "basecalls", lambda model, *rest: seen.append(model.pore_model.window) or calls(model, *rest)
    )
    call(tmp_path / "one.pod5", *words.split(), weights=tmp_path / "run" / "basecaller.pt")
    assert seen == [frames]


def test_settings_reach_the_calls(call, raw_file):
    expected = parsed(call(raw_file))
    beam = ["--beam-size 5"] if importlib.util.find_spec("fast_ctc_decode") else []  # not on every system
    for words in (*beam, "--attention-window 16", "--chunk-len 408", "--chunk-len 1200 --overlap 8"):
        found = parsed(call(raw_file, *words.split(), out=f"{words[2:]}.fastq"))
        assert found.keys() == expected.keys() and found != expected, words


@pytest.mark.parametrize("suffix", [".bam", ".sam"])
def test_tags_as_dorados(call, weights, raw_file, reads, tmp_path, suffix):
    """Of reads of two runs, one of which was told first; types as in dorado's documentation/SAM.md."""
    write_pod5(tmp_path / "other.pod5", dict([*reads.items()][-3:]), acquisition_id="other", flow_cell_id="FAX\t1")
    with pysam.AlignmentFile(call(raw_file, tmp_path / "other.pod5", out=f"calls{suffix}"), check_sq=False) as file:
        records, header = list(file.fetch(until_eof=True)), file.header.to_dict()
    assert header["HD"]["VN"] == "1.6" and header["PG"][0]["PN"] == "poressl" and not header.get("SQ")
    model = f"{weights.parent.name}_basecaller"
    group = {"PM": "test", "LB": "test", "SM": "test", "DT": "2020-01-01T00:00:00.000+00:00", "PL": "ONT"}
    assert header["RG"] == [
        group | {"ID": f"{run}_{model}", "PU": flow_cell, "DS": f"basecall_model={model} runid={run}"}
        for run, flow_cell in (("test", "test"), ("other", "FAX?1"))
    ]
    assert [record.query_name for record in records] == [*reads, *[*reads][-3:]]
    for number, record in enumerate(records):
        types = {tag: kind for tag, _, kind in record.get_tags(with_value_type=True)}
        integers = {kind for tag, kind in types.items() if tag in ("ts", "ns", "ch", "mx", "rn")}
        assert integers <= set("cCsSiI") and {types[tag] for tag in ("qs", "du", "sm", "sd")} == {"f"}
        assert {types[tag] for tag in ("RG", "fn", "st", "sv")} == {"Z"} and types["mv"] == "B" and len(types) == 14
        tags, dacs = dict(record.get_tags()), reads[record.query_name]
        later = number >= len(reads)
        assert tags["RG"] == header["RG"][later]["ID"] and tags["fn"] == ("reads.pod5", "other.pod5")[later]
        assert (tags["ch"], tags["mx"], tags["rn"], tags["st"]) == (1, 1, number - later * len(reads), group["DT"])
        current = (dacs + OFFSET) * RANGE / DIGITISATION
        deviation = np.median(np.abs(current - np.median(current)))
        assert (tags["sm"], tags["sd"]) == pytest.approx((np.median(current), 1.4826 * deviation), rel=1e-5)
        assert tags["sv"] == "med_mad" and tags["du"] == pytest.approx(len(dacs) / RATE, rel=1e-5)
        samples = len(dacs)
        stride, *moves = tags["mv"]
        assert record.flag == 4
        assert stride == 4 and sum(moves) == len(record.query_sequence) and moves[0] == 1 and set(moves) <= {0, 1}
        assert tags["ns"] == samples and tags["ts"] % 4 == 0 and abs(samples - tags["ts"] - 4 * len(moves)) < 8
        errors = [10 ** (-quality / 10) for quality in record.query_qualities]
        assert tags["qs"] == pytest.approx(-10 * np.log10(sum(errors) / len(errors)), rel=1e-5)


def test_what_a_raw_file_does_not_tell_is_no_tag(call, reads, tmp_path):
    write_mapped(tmp_path / "reads.hdf5", reads, bases=3)
    with pysam.AlignmentFile(call(tmp_path / "reads.hdf5", out="calls.bam"), check_sq=False) as file:
        for record in file:
            assert {tag for tag, _ in record.get_tags()} == {"mv", "ts", "ns", "qs", "sm", "sd", "sv"}
        assert "RG" not in file.header


class Aligner:
    """As mappy's, of calls whose place is known from the columns of their alignment: {call: columns}.

    Every other one is on the reverse strand of its contig. records: how the alignment should be in a BAM.
    """

    def __init__(self, columns):
        self.contigs, self.records, self.hits = {}, {}, {}
        for number, (call, one) in enumerate(columns.items()):
            read = SimpleNamespace(columns=one, moves=[1], called=[(base, 0) for base in call], samples=0)
            record = aligned(read, "a", self.contigs, reverse=number % 2 == 1)
            self.records[call] = record
            operations = "".join(operation for operation, *_ in one)
            kept, clip = operations.strip("S"), len(operations) - len(operations.lstrip("S"))
            self.hits[call] = SimpleNamespace(
                ctg=f"contig-{number}", r_st=record.reference_start, strand=-1 if number % 2 else 1, mapq=number,
                q_st=clip, q_en=len(call) - (len(operations) - len(operations.rstrip("S"))),
                cigar=[[count, what] for what, count in record.cigartuples if what != pysam.CSOFT_CLIP],
                NM=len(kept) - kept.count("="), MD=record.get_tag("MD"), mlen=kept.count("="), blen=len(kept),
            )  # fmt: skip

    seq_names = property(lambda self: list(self.contigs))

    def seq(self, name):
        return self.contigs[name]

    def map(self, call, MD):
        yield from [self.hits[call]] if call in self.hits else []


def columns_of(rng, call):
    """An alignment of a call to a reference that is made of it, as in test_bam.make."""
    ends = len(call) // 10, len(call) - len(call) // 20
    columns = [("S", "", base) for base in call[: ends[0]]]
    for i, base in enumerate(call[slice(*ends)]):
        what = rng.choice(list("=XDI"), p=[0.82, 0.06, 0.06, 0.06]) if 0 < i < ends[1] - ends[0] - 1 else "="
        if what == "D":
            columns.append(("D", rng.choice(list("ACGT")), ""))
        other = rng.choice([one for one in "ACGT" if one != base])
        columns.append({"X": ("X", other, base), "I": ("I", "", base)}.get(what, ("=", base, base)))
    return columns + [("S", "", base) for base in call[ends[1] :]]


def aligned_records(path, reference, plain):
    """The records at `path`, in which samtools finds nothing wrong, and nothing but NM and MD that `plain` lacks."""
    pysam.quickcheck(str(path))
    lines = [line for line in pysam.calmd(str(path), str(reference)).splitlines() if line[0] != "@"]
    with pysam.AlignmentFile(path) as file, pysam.AlignmentFile(plain, check_sq=False) as unaligned:
        found = list(file)
        for record, line, call in zip(found, lines, unaligned, strict=True):
            assert record.query_name == call.query_name and not record.is_secondary | record.is_supplementary
            assert record.get_forward_sequence() == call.query_sequence
            assert list(record.get_forward_qualities()) == list(call.query_qualities)
            assert record.get_tag("mv") == call.get_tag("mv") and record.get_tag("ts") == call.get_tag("ts")
            more = {tag for tag, _ in record.get_tags()} - {tag for tag, _ in call.get_tags()}
            if record.is_unmapped:
                assert record.flag == 4 and not record.cigartuples and not more
                continue
            known = pysam.AlignedSegment.fromstring(line, file.header)
            assert all(record.get_tag(tag) == known.get_tag(tag) for tag in ("NM", "MD")) and more == {"NM", "MD"}
            assert record.infer_query_length() == len(call.query_sequence)
    return found


def summary_of(records):
    mapped = [record for record in records if record.is_mapped]
    columns = [sum(count for what, count in record.cigartuples if what != pysam.CSOFT_CLIP) for record in mapped]
    identity = np.median([1 - record.get_tag("NM") / length for record, length in zip(mapped, columns, strict=True)])
    coverage = np.median([record.query_alignment_length / record.query_length for record in mapped])
    share = f"aligned: {len(mapped)} of {len(records)} reads"
    return f"{share}, median identity {identity:.1%}, median coverage {coverage:.1%}"


@pytest.mark.parametrize(("rna", "suffix"), [(False, ".bam"), (True, ".sam")])
def test_calls_are_aligned_to_a_reference(call, raw_file, reads, tmp_path, monkeypatch, capsys, rna, suffix):
    """Where it is known that they are; and prepare_data.py finds the reference's bases at their places."""
    if rna:
        raw_file = tmp_path / "rna.pod5"
        write_pod5(raw_file, reads, sequencing_kit="sqk-rna004")
    plain, rng = call(raw_file, out="plain.bam"), np.random.default_rng(0)
    sequences = [sequence for sequence, _ in parsed(plain).values()]
    columns = {sequence: columns_of(rng, sequence) for sequence in sequences[1:8]}  # the others are not aligned
    aligner = Aligner(columns)
    by_chance = aligner.hits[sequences[0]] = SimpleNamespace(**vars(aligner.hits[sequences[1]]))
    by_chance.mlen, by_chance.blen = 57, 100  # what reads of other genomes reach
    reference = write_fasta(tmp_path / "reference.fa", aligner.contigs)
    monkeypatch.setattr(basecall, "open_genome", lambda path: {reference: aligner}[path])
    capsys.readouterr()
    path = call(raw_file, "--reference", reference, out=f"calls{suffix}")
    said = capsys.readouterr().err.splitlines()[-2]
    found = aligned_records(path, reference, plain)
    assert said == summary_of(found) and [record.is_mapped for record in found] == [one in columns for one in sequences]
    assert dict(zip(found[0].header.references, found[0].header.lengths, strict=True)) == {
        name: len(sequence) for name, sequence in aligner.contigs.items()
    }
    labels, as_called = Basecalls([path], reference), Basecalls([plain])
    for sequence, record, raw in zip(sequences, found, raw_reads(raw_file), strict=True):
        if sequence not in columns:
            continue
        expected = aligner.records[sequence]
        for name in ("flag", "reference_id", "reference_start", "cigarstring"):
            assert getattr(record, name) == getattr(expected, name), name
        assert record.mapping_quality == record.reference_id
        (labelled,), (called,) = labels.label(raw), as_called.label(raw)
        truth = columns[sequence][:: -1 if rna else 1]  # in the order of the signal
        assert "".join(ALPHABET[base] for base in labelled.bases) == "".join(base for _, base, _ in truth)
        of_reference = np.cumsum([base != "" for _, base, _ in truth]) - 1
        of_call = np.cumsum([letter != "" for *_, letter in truth]) - 1
        matched = [what in "=X" for what, *_ in truth]
        assert np.array_equal(labelled.base_starts[of_reference[matched]], called.base_starts[of_call[matched]])


def test_calls_are_aligned_by_mappy(call, raw_file, tmp_path, capsys):
    pytest.importorskip("mappy")
    plain, rng = call(raw_file, out="plain.bam"), np.random.default_rng(0)
    aligner = Aligner({sequence: columns_of(rng, sequence) for sequence, _ in [*parsed(plain).values()][2:8]})
    reference = write_fasta(tmp_path / "reference.fa", aligner.contigs)
    capsys.readouterr()
    path = call(raw_file, "--reference", reference, out="calls.bam")
    said = capsys.readouterr().err.splitlines()[-2]
    found = aligned_records(path, reference, plain)
    assert said == summary_of(found)
    pairs = [pair for pair in zip(found[2:8], aligner.records.values(), strict=True) if pair[0].is_mapped]
    for record, expected in pairs:
        assert (record.flag, record.reference_id) == (expected.flag, expected.reference_id)
        assert abs(record.reference_start - expected.reference_start) < 30
    assert len(pairs) >= 3 and found[7].is_reverse  # it is the longest


@pytest.mark.parametrize("rna", [False, True])
def test_prepare_data_finds_the_bases_of_a_bam_at_their_places(call, raw_file, reads, tmp_path, rna):
    """In every read, also where a base begins in the last, unfilled frame. The places are those of the greedy path."""
    if rna:
        raw_file = tmp_path / "rna.pod5"
        write_pod5(raw_file, reads, sequencing_kit="sqk-rna004")
    labels, model, unusable = Basecalls([call(raw_file, out="calls.bam")]), basecaller(), {}
    for raw in raw_reads(raw_file):
        assert raw.rna == rna
        (labelled,) = labels.label(raw)
        if not isinstance(labelled, RawRead):
            unusable[len(raw.dacs)] = labelled.reason
        elif len(raw.dacs) <= 1205:
            inside = -(-len(raw.dacs) // 4)  # steps that begin within the signal
            sequence, starts, _ = greedy(whole(model, normalised(raw)[0])[:inside])
            assert "".join(ALPHABET[base] for base in labelled.bases) == sequence
            assert labelled.base_starts[:-1].tolist() == [4 * start for start in starts]
    assert not unusable


def test_rna_is_written_from_5_to_3(call, raw_file, reads, tmp_path):
    write_pod5(tmp_path / "rna.pod5", reads, sequencing_kit="sqk-rna004")
    for suffix in (".fastq", ".bam"):
        dna, rna = (parsed(call(file, out=f"{file.stem}{suffix}")) for file in (raw_file, tmp_path / "rna.pod5"))
        assert rna == {name: (sequence[::-1], qualities[::-1]) for name, (sequence, qualities) in dna.items()}


def test_any_raw_format_gives_the_same_calls(call, raw_file, reads, tmp_path):
    write_fast5(tmp_path / "reads.fast5", reads)
    write_mapped(tmp_path / "reads.hdf5", reads, bases=3)
    expected = parsed(call(raw_file))
    for name in ("reads.fast5", "reads.hdf5"):
        same_calls(parsed(call(tmp_path / name, out=f"{name}.fastq")), expected)


def same_calls(found, expected):
    """POD5 rounds the calibration to float32, which may turn a quality."""
    assert found.keys() == expected.keys()
    for name, (sequence, qualities) in expected.items():
        assert found[name][0] == sequence and np.abs(np.subtract(found[name][1], qualities)).max() <= 1


def test_real_reads_as_fast5_and_as_pod5(call, shared_data, monkeypatch):
    """Four of them, for time."""
    whole_file = basecall.reads_of
    short = lambda *args: (raw for raw in whole_file(*args) if len(raw.dacs) < 40_000)  # noqa: E731
    monkeypatch.setattr(basecall, "reads_of", short)
    names = ("multi_read_gzip.fast5", "same_reads_as_multi_read_gzip.pod5")
    found = [parsed(call(shared_data / "formats" / name, out=f"{i}.fastq")) for i, name in enumerate(names)]
    assert len(found[0]) == 4 and min(len(sequence) for sequence, _ in found[0].values()) > 500
    same_calls(*found)


# --------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_nothing(call, raw_file, tmp_path, monkeypatch, suffix, error):
    decoded = []

    def breaks(*args):
        decoded.append(args)
        if len(decoded) == 5:
            assert list(tmp_path.glob("*.part-*"))
            raise error
        return decode(*args)

    monkeypatch.setattr(basecall, "decode", breaks)
    with pytest.raises(error):
        call(raw_file, out=f"calls{suffix}")
    assert len(decoded) == 5 and not list(tmp_path.iterdir())


def signal_in_the_midst(sent):
    done = []

    def dies(*args):
        assert [name for name in os.listdir() if ".part-" in name]  # noqa: PTH208
        done.append(len(done) == 5 and os.kill(os.getpid(), sent))
        return decode(*args)

    basecall.decode = dies


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_in_the_midst(child, weights, raw_file, tmp_path, sent):
    called = partial(script, "basecall", *COMMON, weights, raw_file, "-o", "calls.fastq")
    done = child(partial(signal_in_the_midst, sent), called)
    left = [path.name for path in tmp_path.iterdir()]
    assert "calls.fastq" not in left
    if sent == signal.SIGINT:
        assert done == (130, ["interrupted"]) and not [name for name in left if ".part-" in name]
    else:
        assert done == (-sent, [])


def many_calls(*_):
    rng = np.random.default_rng(0)
    for number in range(20):
        sequence, qualities = "".join(rng.choice(list("ACGT"), 10_000)), rng.integers(0, 50, 10_000, np.uint8)
        yield basecall.Call(f"read-{number}", sequence, qualities, np.arange(10_000), 10_000, 40_000, {}, {})


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("limit", [50, 100_000])
def test_full_disk(call, raw_file, tmp_path, monkeypatch, capsys, suffix, limit):
    """Of 50 bytes it may be full only when the file is closed."""
    if limit == 100_000:
        monkeypatch.setattr(basecall, "basecalls", many_calls)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(InputError) as error:
            call(raw_file, out=f"calls{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value).startswith(f"--out calls{suffix}: cannot be written (") and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_full_disk_in_a_process(child, weights, raw_file, tmp_path):
    """Neither htslib nor Python says more than the one line."""
    called = partial(script, "basecall", *COMMON, weights, raw_file, "-o")
    code, (line,) = child(partial(full_disk, 50), partial(called, "calls.bam"))
    assert code == 1 and line.startswith("basecall.py: --out calls.bam: cannot be written (")
    assert not list(tmp_path.glob("calls*"))
    code, (line,) = child(partial(stdout_to, "/dev/full"), partial(called, "-"))
    assert code == 1 and line.startswith("basecall.py: ") and "No space left" in line


def closed_pipe(letters):
    """Standard output is a pipe that nobody reads, and gets this many letters a read."""
    fastq = basecall.fastq
    basecall.fastq = lambda call: fastq(call)[:letters]
    reader, pipe = os.pipe()
    os.close(reader)
    os.dup2(pipe, 1)


@pytest.mark.parametrize("letters", [10, 5000])
def test_a_closed_pipe_ends_the_run_without_a_word(child, weights, raw_file, letters):
    """As `| head` does; whether it shows while reads are written, or after the last."""
    called = partial(script, "basecall", *COMMON, weights, raw_file, "-o", "-")
    assert child(partial(closed_pipe, letters), called) == (1, [])


@pytest.fixture
def refused(call, tmp_path):
    """The message with which the script refuses, having left nothing."""

    def run(*words, **options):
        before = set(tmp_path.rglob("*"))
        with pytest.raises(InputError) as error:
            call(*words, **options)
        assert "\n" not in str(error.value) and set(tmp_path.rglob("*")) == before
        return str(error.value)

    return run


def test_weights_that_are_no_basecaller(refused, raw_file, tmp_path):
    path = tmp_path / "pore_model.pt"
    for content in (PoreModel.of_size("tiny").state_dict(), [torch.ones(3)], torch.ones(3), {"a": 1}, {1: 2}):
        torch.save(content, path)
        message = refused(raw_file, weights=path)
        assert message.startswith(f"{path}: ") and message.endswith("give the basecaller.pt of a fine-tuning run")
    path.write_text("no weights")
    assert refused(raw_file, weights=path).startswith(f"{path}: not a PyTorch file")
    assert refused(raw_file, weights=tmp_path) and "none.pt: no such file" in refused(raw_file, weights="none.pt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--chunk-len 401", "--chunk-len, --overlap: should be multiples of 8"),
        ("--overlap 100", "--chunk-len, --overlap: should be multiples of 8"),
        (
            "--chunk-len 400 --overlap 400",
            "--chunk-len, --overlap: should be multiples of 8, and the overlap the smaller",
        ),
        ("--chunk-len 0", "--chunk-len 0: should be greater than 0"),
        ("--overlap -8", "--overlap -8: should be greater than or equal to 0"),
        ("--beam-size 0", "--beam-size 0: should be greater than 0"),
        ("--batch-size 0", "--batch-size 0: should be greater than 0"),
    ],
)
def test_arguments_that_cannot_be_meant(refused, raw_file, words, said):
    assert refused(raw_file, *words.split()).startswith(said)


def test_beam_search_says_what_to_install(refused, raw_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_ctc_decode", None)
    assert refused(raw_file, "--beam-size", "5") == "--beam-size 5: pip install fast-ctc-decode, or leave it out"


def test_a_reference_that_cannot_be(refused, call, raw_file, reads, tmp_path, monkeypatch, capsys):
    for name in ("calls.fastq", "-"):
        said = f"--reference: aligned calls need an --out that ends in .bam or .sam, not {name}"
        assert refused(raw_file, "--reference", "genome.fa", out=name) == said
    monkeypatch.setattr(basecall, "open_genome", lambda _: Aligner({"ACGT": [("=", base, base) for base in "ACGT"]}))
    call(raw_file, "--reference", "genome.fa", out="calls.bam")
    assert f"\naligned: 0 of {len(reads)} reads\nleft out: none\n" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "mappy", None)
    assert refused(raw_file, "--reference", "genome.fa", out="other.bam").startswith("--reference: pip install mappy")


def test_outputs_that_cannot_be(refused, raw_file, tmp_path):
    for name in ("calls", "calls.cram", "calls.bam.gz", "calls.txt", "calls.gz"):
        assert refused(raw_file, out=name) == f"--out {name}: should end in .fastq, .fastq.gz, .bam or .sam, or be -"
    (tmp_path / "calls.bam").write_text("mine")
    assert refused(raw_file, out="calls.bam").startswith("--out calls.bam: exists")
    assert (tmp_path / "calls.bam").read_text() == "mine"
    assert refused(raw_file, out="calls.bam/calls.fastq").startswith("--out calls.bam/calls.fastq: cannot be written")


def test_reads_that_cannot_be(refused, call, raw_file, reads, tmp_path, capsys):
    folder = tmp_path / "reads"
    folder.mkdir()
    assert refused(folder).startswith(f"{folder}: no .pod5")
    write_pod5(tmp_path / "none.pod5", {})
    assert refused(tmp_path / "none.pod5") == f"{tmp_path}/none.pod5: no read in it"
    (folder / "a.pod5").write_text("no reads")
    assert refused(folder / "a.pod5").startswith(f"{folder}/a.pod5: cannot be read as pod5")
    assert refused(folder) == f"{folder}: no read was called (left out: 1 in files that cannot be read)"
    constant = {name: np.full(500, 7, np.int16) for name in reads}
    write_fast5(folder / "b.fast5", constant)
    assert f"(left out: 1 in files that cannot be read, {len(reads)} constant)" in refused(folder)
    assert refused(raw_file, folder / "a.pod5", out="calls.bam").startswith(f"{folder}/a.pod5: cannot be read as pod5")
    capsys.readouterr()
    assert parsed(call(folder, raw_file, folder / "b.fast5")).keys() == reads.keys()
    said = capsys.readouterr()
    assert f"passed over: {folder}/a.pod5" in said.err and said.out == ""
    assert f"left out: 1 in files that cannot be read, {len(reads)} constant\n" in said.err


def test_reads_without_a_base_are_counted(refused, raw_file, reads, tmp_path):
    model = basecaller()
    model.head.bias.data[::5] += 100  # all blank
    torch.save(model.state_dict(), tmp_path / "blank.pt")
    for name in ("calls.bam", "-"):
        assert refused(raw_file, weights="blank.pt", out=name).endswith(f"(left out: {len(reads)} no base called)")
