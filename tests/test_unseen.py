"""benchmark/unseen.py and unseen_reads.py: reads cut at the middle of their genome, and the identity of all chunks."""

import uuid
from collections import Counter

import h5py
import numpy as np
import pod5
import pytest
import torch

from benchmark import plot_unseen, unseen, unseen_reads
from benchmark.evidence import METHODS, RESULTS, ROOT
from benchmark.plot_evidence import NAMES
from common import InputError
from common.chunks import Chunks, open_data
from common.pore_model import PoreModel
from common.reads.simulate import simulate_read
from finetune_basecaller import Basecaller, validate
from tests.test_formats import write_pod5

COMPLEMENT = np.array([3, 2, 1, 0])


def write_read(file, name, bases, rng):
    signal, starts = simulate_read(rng, bases)
    group = file.create_group(f"Reads/{name}")
    group.create_dataset("Dacs", data=(100 * signal).astype(np.int16))
    group.create_dataset("Reference", data=bases.astype(np.int16))
    group.create_dataset("Ref_to_signal", data=starts.astype(np.int32))
    group.attrs["read_id"] = name


def test_reads_are_cut_at_the_middle_of_the_genome(tmp_path):
    rng = np.random.default_rng(0)
    genome = rng.integers(0, 4, 2000)
    places = {"left": (100, 700), "across": (600, 1500), "right": (1200, 1900), "a little left": (950, 1500)}
    with h5py.File(tmp_path / "reads.hdf5", "w") as file:
        for name, (first, end) in places.items():
            write_read(file, name, genome[first:end], rng)
            write_read(file, f"{name}, reverse", COMPLEMENT[genome[first:end]][::-1], rng)
    text = "".join("ACGT"[base] for base in genome)
    unseen_reads.split_by_genome(tmp_path / "reads.hdf5", text, tmp_path)
    found = {}
    with h5py.File(tmp_path / "reads.hdf5") as whole:
        for half in ("first", "second"):
            with h5py.File(tmp_path / f"lambda_{half}.hdf5") as file:
                for name, read in file["Reads"].items():
                    place, strand = unseen_reads.position_of(unseen_reads.bases_of(read), text)
                    assert strand == ("-" if name.endswith("reverse") else "+")
                    found[half, name] = place, place + len(read["Reference"])
                    starts, samples = read["Ref_to_signal"][:], read["Dacs"][:]
                    assert starts[0] == 0 and starts[-1] == len(samples)
                    given = whole["Reads"][name]
                    shift = {"first": 0, "second": len(given["Dacs"]) - len(samples)}
                    at = shift[half if strand == "+" else {"first": "second", "second": "first"}[half]]
                    assert np.array_equal(samples, given["Dacs"][at : at + len(samples)])
    for name, (first, end) in places.items():
        for read in (name, f"{name}, reverse"):
            assert found.get(("first", read)) == ((first, min(end, 1000)) if name in ("left", "across") else None)
            assert found.get(("second", read)) == ((max(first, 1000), end) if name != "left" else None)


def test_raw_reads_are_copied_as_they_are_without_those_that_are_named(tmp_path):
    reads = {str(uuid.UUID(int=number << 96)): np.arange(number, number + 50, dtype=np.int16) for number in (1, 2, 3)}
    write_pod5(tmp_path / "all.pod5", reads)
    unseen_reads.copy_raw_without(tmp_path / "all.pod5", ("00000002",), tmp_path / "some.pod5")
    with pod5.Reader(tmp_path / "some.pod5") as reader:
        assert {str(read.read_id)[:8]: read.signal.tolist() for read in reader.reads()} == {
            "00000001": [*range(1, 51)],
            "00000003": [*range(3, 53)],
        }


def test_a_read_of_another_genome_is_said():
    with pytest.raises(InputError, match="not the genome's"):
        unseen_reads.position_of("ACGTACGT", "A" * 100)


def test_the_identity_is_that_of_all_chunks_of_all_reads(few, tmp_path):
    torch.manual_seed(0)
    model = Basecaller(PoreModel.of_size("tiny", 0.0)).eval()
    torch.save(model.state_dict(), tmp_path / "basecaller.pt")
    found, reads = [], Counter()
    for split in ("training", "validation"):
        chunks = Chunks(open_data([few]), 400, split, labelled=True)
        reads.update(
            chunks.reads["id"][read].decode() for read, start in places_of(chunks) if has_bases(chunks, read, start)
        )
        mean = validate(model, chunks, 16, torch.device("cpu"), "fp32")["validation/identity_mean"]
        found.append((mean, sum(has_bases(chunks, *place) for place in places_of(chunks))))
    expected = sum(mean * count for mean, count in found) / sum(count for _, count in found)
    by_read = unseen.identities_by_read(tmp_path / "basecaller.pt", few, 400)
    assert np.mean(np.concatenate([*by_read.values()])) == pytest.approx(expected)
    assert {read: len(of) for read, of in by_read.items()} == reads


def has_bases(chunks, read, start):
    return chunks.bases(read, start)[0].size > 0


def places_of(chunks):
    return zip(chunks.read_of, chunks.tile_of * chunks.chunk_len, strict=True)


def test_a_row_has_the_commands_and_the_identity_of_each_test(few, monkeypatch, capsys):
    ran, rows = [], []
    monkeypatch.setattr(unseen, "do", lambda commands: ran.append(commands) or {"loss": 1.0})
    monkeypatch.setattr(unseen, "append_row", rows.append)
    monkeypatch.setattr(unseen, "read_rows", lambda name: {unseen.key(row): row for row in rows})
    monkeypatch.setattr(unseen, "identities_by_read", lambda weights, data: {"a": [60.0, 70.0], "b": [80.0]})
    args = unseen.Args(("masked.py --a --seed 7", f"finetune_basecaller.py --data {few} --b"), (few,), "try", (0, 1))
    assert unseen.main(args) == 0 and unseen.main(args) == 0
    assert ran == [
        ["masked.py --a --seed 7", f"finetune_basecaller.py --data {few} --b --seed {seed}"] for seed in (0, 1)
    ]
    assert [(row["seed"], row["identity_store"], row["loss"]) for row in rows] == [(0, 70.0, 1.0), (1, 70.0, 1.0)]
    assert rows[0]["reads_store"] == "65.00x2 80.00x1"
    assert f"{few}: training reads hold 100.00% of the 21-mers" in capsys.readouterr().out


def test_gains_are_paired_by_seed_and_their_interval_is_that_of_seeds_and_reads(tmp_path, monkeypatch):
    """Eight gains that differ by 1 from their mean, equal for all reads: their mean deviates by 1 / sqrt(8)."""
    rows = {}
    for seed in range(8):
        for arm, more in (("", 0.0), ("masked.py --data a.pod5 b.pod5 --epochs 5 --seed 1", 2 + (-1) ** seed)):
            row = {"seed": str(seed), "pretrain_command": arm, "identity_x": str(70 + more)}
            row["finetune_command"] = (
                f"finetune_basecaller.py --data d/kleb.hdf5 --label-fraction 0.1 --steps 9 --seed {seed}"
            )
            row["reads_x"] = f"{60 + seed + more:.2f}x10 {80 + seed + more:.2f}x30"
            rows[arm, seed] = row
    monkeypatch.setattr(plot_unseen, "read_rows", lambda name: rows)
    arms = plot_unseen.read_arms("some")
    found = arms["kleb, 10 %, 9 steps"]
    assert list(found) == ["from scratch", "masked events"]
    mean, low, high = plot_unseen.gain(found["masked events"], found["from scratch"], "x")
    assert mean == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(1.96 / 8**0.5, rel=0.15)  # the bootstrap's values are multiples of 1/4
    *_, scratch, last = plot_unseen.table(arms)
    assert scratch == "| kleb, 10 %, 9 steps | from scratch | 8 | 70.00 |  |"
    assert last.startswith("| | masked events | 8 | 72.00 | +2.00 (+1.")
    *_, last = plot_unseen.table_of_seeds(arms)
    assert last == f"| kleb, 10 %, 9 steps | masked events | {', '.join(['+3.0, +1.0'] * 4)} |"
    plot_unseen.plot(arms, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes()[:4] == b"\x89PNG"
    del found["masked events"]
    with pytest.raises(InputError, match="no gains"):
        plot_unseen.plot(arms, tmp_path / "none.png")


def test_reads_that_gain_more_weigh_as_many_chunks_as_they_have():
    scratch, arm = ({0: {"reads_x": reads}} for reads in ("50.00x1 50.00x3", "54.00x1 50.00x3"))
    mean, low, high = plot_unseen.gain(arm, scratch, "x")
    assert mean == pytest.approx(1) and low == pytest.approx(0) and high == pytest.approx(4)


def row_of(before, steps, seed=0, identity=70.0, pretraining_steps=0):
    return {
        "seed": str(seed), "pretrain_command": before, "identity_x": str(identity), "reads_x": f"{identity:.2f}x10",
        "finetune_command": f"finetune_basecaller.py --data d/kleb.hdf5 --steps {steps} --seed {seed}",
        "pretraining_steps": str(pretraining_steps),
    }  # fmt: skip


def test_an_arm_is_all_commands_before_fine_tuning_and_the_options_in_which_they_differ():
    labels = "finetune_basecaller.py --data d/sim.hdf5 --steps 3 --seed 0"
    rows = [
        row_of("masked.py --data a b --cosine --epochs 2 --seed 0", 9),
        row_of("masked.py --data a b --cosine --epochs 5 --seed 1", 9),
        row_of(f"masked.py --data a b --cosine --epochs 5 --seed 0 && {labels}", 9),
        row_of("masked.py --data a b --cosine --epochs 2 --gap 3", 9),
        row_of("barlow.py --data a b --cosine --weights c", 9),
        row_of("barlow.py --data a b --cosine", 9),
        row_of("", 9),
    ]
    assert plot_unseen.arm_names(rows) == [
        "masked events --epochs 2",
        "masked events --epochs 5",
        "masked events --epochs 5, then labels of sim reads",
        "masked events --epochs 2 --gap 3",
        "Barlow Twins",
        "Barlow Twins",
        "from scratch",
    ]


def test_more_steps_from_scratch_are_an_arm_beside_those_that_are_pretrained(monkeypatch):
    rows = [row_of("", 9), row_of("", 30, identity=71.5), row_of("masked.py --data a b --epochs 2", 9, identity=72.0)]
    monkeypatch.setattr(plot_unseen, "read_rows", lambda name: dict(enumerate(rows)))
    arms = plot_unseen.read_arms("some")
    assert {training: set(found) for training, found in arms.items()} == {
        "kleb, 100 %, 9 steps": {"from scratch", "from scratch, 30 steps", "masked events"}
    }
    best, other = plot_unseen.compared(arms["kleb, 100 %, 9 steps"])
    assert (best, other) == ("masked events", "from scratch, 30 steps")
    found = arms["kleb, 100 %, 9 steps"]
    assert plot_unseen.gain(found["from scratch, 30 steps"], found["from scratch"], "x")[0] == pytest.approx(1.5)


def test_two_commands_are_compared_with_each_of_them_as_well(monkeypatch):
    masked, labels = "masked.py --data a b", "finetune_basecaller.py --data d/sim.hdf5"
    rows = [row_of("", 9, seed, 60.0) for seed in (0, 1)] + [row_of(masked, 9, 0, 61.0), row_of(labels, 9, 1, 64.0)]
    rows += [row_of(f"{masked} && {labels}", 9, seed, 66.0 + seed) for seed in (0, 1)]
    monkeypatch.setattr(plot_unseen, "read_rows", lambda name: dict(enumerate(rows)))
    arms = plot_unseen.read_arms("some")
    whole = "| kleb, 100 %, 9 steps | masked events, then labels of sim reads |"
    assert list(plot_unseen.table_of_parts(arms))[2:] == [
        f"{whole} masked events | 1 | +5.00 (+5.00 to +5.00) |",
        f"{whole} labels of sim reads | 1 | +3.00 (+3.00 to +3.00) |",
    ]
    del arms["kleb, 100 %, 9 steps"]["masked events, then labels of sim reads"]
    assert not list(plot_unseen.table_of_parts(arms))


def test_lines_go_through_scratch_and_the_gains_over_it(monkeypatch, tmp_path):
    """Of arms with other seeds, too: their identities do not compare, their gains do."""
    rows = [row_of("", 9, 0, 70.0), row_of("", 9, 1, 60.0)]
    rows += [row_of("masked.py --data a b --chunk-len 1200 --epochs 2", 9, 1, 62.0, 100)]
    rows += [row_of("masked.py --data a b --batch-size 128 --epochs 5", 9, 1, 63.0, 250)]
    monkeypatch.setattr(plot_unseen, "read_rows", lambda name: dict(enumerate(rows)))
    drawn = {}
    monkeypatch.setattr(plot_unseen.plt, "close", lambda figure: drawn.update(axes=figure.axes))
    plot_unseen.plot_lines(plot_unseen.read_arms("some"), tmp_path / "lines.png")
    above, below = drawn["axes"]
    assert [line.get_xydata().tolist() for line in above.lines] == [[[0, 65], [100 * 0.0768, 67], [250 * 0.4608, 68]]]
    assert [line.get_xydata().tolist() for line in below.lines] == [[[100, 65]], [[100, 68]]]


@pytest.mark.parametrize("name", ["ecoli-locus", *(path.stem for path in RESULTS.glob("klebsiella*.csv"))])
def test_the_tables_of_the_docs_are_those_of_the_rows(name):
    arms = plot_unseen.read_arms(name)
    tables = plot_unseen.table, plot_unseen.table_of_parts, plot_unseen.table_of_seeds
    for page, lines in zip(("results.md", "results.md", "results/unseen.md"), tables, strict=True):
        assert "\n".join(lines(arms)) in (ROOT / "docs" / page).read_text()


def test_the_gains_on_the_methods_pages_are_those_of_the_rows():
    arms = plot_unseen.read_arms("klebsiella")["kleb_r94_mapped, 3 %, 400 steps"]
    for method in set(METHODS) - {"masked"}:
        page = (ROOT / "docs" / f"{method}.md").read_text().replace("\n", " ")
        for test in ("lambda_second", "ecoli"):
            found = plot_unseen.gain(arms[NAMES[method]], arms["from scratch"], test)
            assert plot_unseen.with_interval(*found) in page


def test_two_rows_of_one_seed_are_refused(monkeypatch):
    row = row_of("", 1)
    monkeypatch.setattr(plot_unseen, "read_rows", lambda name: {1: row, 2: dict(row)})
    with pytest.raises(InputError, match="two rows"):
        plot_unseen.read_arms("some")
    monkeypatch.setattr(plot_unseen, "read_rows", lambda name: {})
    with pytest.raises(InputError, match="no results"):
        plot_unseen.read_arms("some")
