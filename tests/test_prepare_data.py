"""prepare_data.py: from the command line, on simulated reads whose bases are known."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

from common import InputError
from common.chunks import hash_of
from common.reads.store import ReadStore

PROJECT = Path(__file__).parents[1]
LENGTH = 200  # samples per chunk


def spelled_chunks(path):
    """{split: the bases, 1-4, of each tile of LENGTH samples}, straight from the mapped-signal HDF5."""
    tiles = {"training": [], "validation": []}
    with h5py.File(path) as file:
        for read_id, read in file["Reads"].items():
            bases, starts = read["Reference"][:] + 1, read["Ref_to_signal"][:]
            split = "validation" if hash_of(read_id.encode()) < 0.1 * 2**64 else "training"
            for first in range(starts[0], starts[-1] - LENGTH + 1, LENGTH):
                inside = [b for b, s in zip(bases.tolist(), starts, strict=False) if first <= s < first + LENGTH]
                tiles[split].append(inside)
    return tiles


def test_command_line_writes_a_store_and_prints_an_account(simulated, tmp_path):
    out = tmp_path / "store"
    words = [sys.executable, PROJECT / "prepare_data.py", simulated, "-o", out, "--chunk-len", str(LENGTH)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]  # and no cache
    assert len(ReadStore(out).reads) == 12

    tiles = spelled_chunks(simulated)
    with h5py.File(simulated) as file:
        reads = list(file["Reads"].values())
        samples = sum(read["Ref_to_signal"][-1] - read["Ref_to_signal"][0] for read in reads)
        bases = sum(len(read["Reference"]) for read in reads)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert {"kept: 12 labelled", "left out: none", "reads: 12 of R9.4.1 DNA at 4 kHz (FLO-MIN106)"} <= set(lines)
    assert f"training: 10 labelled reads, {len(tiles['training'])} chunks of {LENGTH}" in lines
    assert f"validation: 2 labelled reads, {len(tiles['validation'])} chunks of {LENGTH}" in lines
    assert f"{samples / bases:.2f} samples per base" in lines
    assert "training reads hold 0.0% of validation reads' 21-mers (same strand), 0.0% (either)" in lines

    both = tiles["training"] + tiles["validation"]
    needed = [len(tile) + sum(a == b for a, b in pairwise(tile)) for tile in both]
    shares = re.findall(r"([\d.]+)% of chunks are infeasible.*\((\d+) steps\)", done.stdout)
    assert [int(steps) for _, steps in shares] == [LENGTH // 8, LENGTH // 4]
    for share, steps in shares:
        expected = 100 * np.mean([n > int(steps) for n in needed])
        assert float(share) == pytest.approx(expected, abs=0.051)
    assert 30 < float(shares[0][0]) < 90 and float(shares[1][0]) < 10


def test_reads_shorter_than_a_chunk_and_unlabelled_ones_are_counted(simulated, tmp_path, command, capsys):
    path = tmp_path / "reads.hdf5"
    path.write_bytes(simulated.read_bytes())
    with h5py.File(path, "r+") as file:
        read = file["Reads/simulated-1-0"]
        del read["Reference"], read["Ref_to_signal"]
        read["Reference"], read["Ref_to_signal"] = np.zeros(0, np.int16), np.zeros(1, np.int32)
    command(path, "-o", tmp_path / "store", "--chunk-len", 9030, "--labelled-only")
    lines = capsys.readouterr().out.splitlines()
    with h5py.File(simulated) as file:
        short = sum(r["Ref_to_signal"][-1] < 9030 for name, r in file["Reads"].items() if name != "simulated-1-0")
    assert short > 0
    assert f"kept: {11 - short} labelled" in lines
    left_out = next(line for line in lines if line.startswith("left out: ")).removeprefix("left out: ")
    assert set(left_out.split(", ")) == {f"{short} shorter than 9030 samples", "1 unlabelled"}


def test_shared_sequence_is_in_the_audit(one_place, tmp_path, command, capsys):
    with h5py.File(one_place, "r+") as file:
        for name, read in file["Reads"].items():
            if hash_of(name.encode()) < 0.1 * 2**64:  # in validation
                bases, half = read["Reference"][:], read["Reference"][len(read["Reference"]) // 2 :]
                read["Reference"][...] = np.append(half, 3 - half[::-1])[: len(bases)]
    command(one_place, "-o", tmp_path / "store", "--chunk-len", LENGTH)
    same, either = re.search(r"hold ([\d.]+)% of .*, ([\d.]+)% \(either\)", capsys.readouterr().out).groups()
    assert 49 < float(same) < 50 and 98 < float(either) < 99


def test_one_read_and_reads_without_bases_are_audited_as_what_they_are(one_read, tmp_path, command, capsys):
    command(one_read, "-o", tmp_path / "one", "--chunk-len", LENGTH)
    audit = capsys.readouterr().out.partition("audit:\n")[2]
    assert "training: 1 labelled reads, " in audit and "hold" not in audit
    assert "no validation read among 1; give more" in audit and "no labelled validation read among 1; give" in audit
    command(one_read, "-o", tmp_path / "arrays", "--chunk-len", LENGTH, "--bonito")
    assert len(np.load(tmp_path / "arrays/chunks.npy")) > 9 and not (tmp_path / "arrays/validation").exists()
    with h5py.File(one_read, "r+") as file:
        read = file["Reads/simulated-1-3"]
        del read["Reference"], read["Ref_to_signal"]
        read["Reference"], read["Ref_to_signal"] = np.zeros(0, np.int16), np.zeros(1, np.int32)
    capsys.readouterr()
    command(one_read, "-o", tmp_path / "plain", "--chunk-len", LENGTH)
    assert "labelled" not in capsys.readouterr().out.partition("audit:\n")[2].replace("unlabelled", "")


@pytest.mark.parametrize("bonito", [(), ("--bonito",)])
def test_an_existing_out_is_refused_and_left_alone(simulated, tmp_path, command, bonito):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match=r"--out .*out: exists"):
        command(simulated, "-o", tmp_path / "out", "--chunk-len", LENGTH, *bonito)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
