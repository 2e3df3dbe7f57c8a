"""benchmark/probe.py: which base a frame has, what least squares tells of it, and the table."""

import sys

import numpy as np
import pytest
import torch

from benchmark import probe
from common import InputError
from common.chunks import Chunks, open_data
from common.pore_model import PoreModel


def test_bases_of_frames_are_those_of_a_plain_loop(few):
    chunks = Chunks(open_data([few]), 400, "training", labelled=True)
    reads, starts = chunks.places(0, 0, 8)
    signal, found = probe.examples(chunks, 8)
    assert torch.equal(signal, chunks.batch(0, 0, 8).signal)
    for row, (read, start) in enumerate(zip(reads, starts, strict=True)):
        bases, places = chunks.bases(read, start)
        for frame in range(50):
            begun = [i for i, place in enumerate(places) if place <= 8 * frame + 4]
            expected = [-1, -1, -1]
            if begun:
                around = [begun[-1] - 1, begun[-1], begun[-1] + 1]
                expected = [bases[i] - 1 if 0 <= i < len(bases) else -1 for i in around]
            assert found[row, frame].tolist() == expected


def test_what_the_features_hold_is_told_and_what_they_lack_is_not():
    rng = torch.Generator().manual_seed(0)
    bases = torch.randint(0, 4, (60, 30, 3), generator=rng)
    features = torch.randn(60, 30, 12, generator=rng).double()
    features[..., :4] += 3 * torch.nn.functional.one_hot(bases[..., 1], 4)  # the base at the centre alone
    bases[:, ::7] = -1  # not known
    before, at, after = probe.accuracies(features[:40], bases[:40], features[40:], bases[40:])
    assert at > 90 and before == pytest.approx(25, abs=8) and after == pytest.approx(25, abs=8)


def test_the_table_has_a_row_a_file_and_one_of_random_weights(few, tmp_path, capsys):
    for name in ("a", "b"):
        torch.save(PoreModel.of_size("tiny").state_dict(), tmp_path / f"{name}.pt")
    args = probe.Args((tmp_path / "a.pt", tmp_path / "b.pt"), (few,), few=4, many=12, chunk_len=400)
    probe.main(args)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    random = ["| random weights, 128 channels", "| random weights, the encoder alone"]
    assert [row[0].rsplit("/")[-1] for row in rows] == [*random, "a.pt", "b.pt"]
    shares = [float(share) for row in rows for cell in row[1:] for share in cell.strip(" |").split(" / ")]
    assert len(shares) == 24 and np.all(np.array(shares) > 15) and np.all(np.array(shares) < 90)


def test_the_row_of_a_layer_is_that_of_a_model_without_those_above_it(few, tmp_path, capsys):
    model = PoreModel.of_size("tiny")
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    model.layers = model.layers[:1]
    torch.save(model.state_dict(), tmp_path / "cut.pt")
    args = probe.Args((tmp_path / "whole.pt", tmp_path / "cut.pt"), (few,), few=4, many=12, chunk_len=400)
    args.by_layer = True
    probe.main(args)
    rows = [line.rsplit("/whole.pt")[-1] for line in capsys.readouterr().out.splitlines() if "whole.pt" in line]
    assert [row.split(" | ")[0] for row in rows] == [f", after layer {count}" for count in range(4)]
    args.by_layer, args.weights = False, (tmp_path / "cut.pt",)
    probe.main(args)
    cut = capsys.readouterr().out.splitlines()[-1]
    assert cut.split(" | ")[1:] == rows[1].split(" | ")[1:] != rows[3].split(" | ")[1:]


def test_without_validation_reads_there_is_nothing_to_test_on(one_read, tmp_path):
    with pytest.raises(InputError, match="--data: no labelled validation read to test on; give more reads"):
        probe.main(probe.Args((tmp_path / "a.pt",), (one_read,), chunk_len=400))


def test_a_file_without_a_pore_model_is_named(few, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: .* not a pore model"):
        probe.main(probe.Args((tmp_path / "x.pt",), (few,), chunk_len=400))


def test_it_works_on_the_command_line(few, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path / "a.pt"), "--data", str(few), "--few", "0"])
    with pytest.raises(InputError, match="--few 0: should be"):
        probe.parse_args(probe.Args)
