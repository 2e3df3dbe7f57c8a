"""benchmark/unseen.py and unseen_reads.py: reads cut at the middle of their genome, and the identity of all chunks."""

import h5py
import numpy as np
import pytest
import torch

from benchmark import unseen, unseen_reads
from common import InputError
from common.chunks import Chunks, open_data
from common.pore_model import PoreModel
from common.reads.simulate import simulate_read
from finetune_basecaller import Basecaller, validate

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


def test_a_read_of_another_genome_is_said():
    with pytest.raises(InputError, match="not the genome's"):
        unseen_reads.position_of("ACGTACGT", "A" * 100)


def test_the_identity_is_that_of_all_chunks_of_all_reads(few, tmp_path):
    torch.manual_seed(0)
    model = Basecaller(PoreModel.of_size("tiny", 0.0)).eval()
    torch.save(model.state_dict(), tmp_path / "basecaller.pt")
    found = []
    for split in ("training", "validation"):
        chunks = Chunks(open_data([few]), 400, split, labelled=True)
        mean = validate(model, chunks, 16, torch.device("cpu"), "fp32")["validation/identity_mean"]
        found.append((mean, sum(chunks.bases(*place)[0].size > 0 for place in places_of(chunks))))
    expected = sum(mean * count for mean, count in found) / sum(count for _, count in found)
    assert unseen.mean_identity(tmp_path / "basecaller.pt", few, 400) == pytest.approx(expected)


def places_of(chunks):
    return zip(chunks.read_of, chunks.tile_of * chunks.chunk_len, strict=True)


def test_a_row_has_the_commands_and_the_identity_of_each_test(few, tmp_path, monkeypatch):
    ran, rows = [], []
    monkeypatch.setattr(unseen, "do", lambda commands: ran.append(commands) or {"loss": 1.0})
    monkeypatch.setattr(unseen, "append_row", rows.append)
    monkeypatch.setattr(unseen, "read_rows", lambda name: {unseen.key(row): row for row in rows})
    monkeypatch.setattr(unseen, "mean_identity", lambda weights, data: 70.0)
    args = unseen.Args(("masked.py --a", "finetune_basecaller.py --b"), (few,), "try", (0, 1))
    assert unseen.main(args) == 0 and unseen.main(args) == 0
    assert ran == [[f"masked.py --a --seed {seed}", f"finetune_basecaller.py --b --seed {seed}"] for seed in (0, 1)]
    assert [(row["seed"], row["identity_store"], row["loss"]) for row in rows] == [(0, 70.0, 1.0), (1, 70.0, 1.0)]
