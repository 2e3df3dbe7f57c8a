"""benchmark/speed.py and speed_data.py: their rows, and that the bound is the pore model."""

import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmark import speed, speed_data
from benchmark.memory import make_store
from common.pore_model import SIZES, PoreModel, frames_of
from common.reads.simulate import write_simulated
from tests.test_gpu import compiled_graphs

KEYS = {"method", "size", "device", "precision", "batch_size", "chunk_len", "compile", "step", "chunks_per_second"}
KEYS |= {"activation_checkpointing", "parts", "peak_memory", "bound", "bound_ratio", "flops", "matmul", "utilisation"}
PARTS = {"data", "views", "forward", "loss", "backward", "optimizer", "rest"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Smaller products and fewer reads, for time."""
    matmul_flops = speed.matmul_flops
    monkeypatch.setattr(speed, "matmul_flops", lambda device, precision, _: matmul_flops(device, precision, 256))
    monkeypatch.setattr(speed, "make_store", lambda folder, _: make_store(folder, 12))
    monkeypatch.setattr(speed, "BEFORE", 1)
    monkeypatch.setattr(speed_data, "STEPS", 10)


def rows_of(capsys, **settings):
    speed.main(speed.Args(device="cpu", **{"sizes": ("tiny",), "batch_sizes": (2,), "steps": 1} | settings))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_method_has_a_row_whose_parts_add_up_to_the_step(capsys):
    rows = rows_of(capsys, chunk_len=400)
    assert [row["method"] for row in rows] == list(speed.PASSES)
    for row in rows:
        padded = set() if row["method"] in ("cpc", "masked") else {"padded", "padded_ratio"}
        assert row.keys() == KEYS | padded
        assert row["parts"].keys() == PARTS
        assert sum(row["parts"].values()) == pytest.approx(row["step"], rel=0.01)
        assert min(row["parts"].values()) >= 0
        assert row["parts"]["forward"] + row["parts"]["backward"] > 0.2 * row["step"]
        if row["method"] != "cpc":  # of which more than one step is timed
            assert row["bound_ratio"] == pytest.approx(row["step"] / row["bound"], rel=0.01)
        assert row["chunks_per_second"] == pytest.approx(2 / row["step"], rel=0.01)
        assert row["utilisation"] == pytest.approx(row["flops"] / row["step"] / row["matmul"], rel=0.01)


def test_compiled_all_is_done_before_the_first_timed_step(few, tmp_path):
    """A graph for the step and one for its bound, though views differ in length."""
    args = speed.importlib.import_module("barlow").Args(
        data=(few,), run_dir=tmp_path / "run", size="tiny", batch_size=2, chunk_len=400, device="cpu", compile=True
    )
    graphs, _ = compiled_graphs(lambda: speed.measure("barlow", args, steps=2))
    assert graphs == [(True, False)] * 2


def test_the_scripts_are_as_before_afterwards(capsys):
    script = speed.importlib.import_module("moco")
    before = [dict(vars(owner)) for owner in (script, script.Run, torch.Tensor, PoreModel)]
    rows_of(capsys, methods=("moco",), chunk_len=400)
    assert [dict(vars(owner)) for owner in (script, script.Run, torch.Tensor, PoreModel)] == before


def test_a_row_says_that_memory_ended(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")

    monkeypatch.setattr(speed.importlib.import_module("simclr"), "simclr_loss", full)
    (row,) = rows_of(capsys, methods=("simclr",), chunk_len=400)
    assert row["out_of_memory"] is True and "step" not in row


def test_scale_makes_a_row_for_each_setting_and_a_picture(capsys, tmp_path, monkeypatch):
    asked = []

    def measure(method, args, steps, padding):
        asked.append((args.batch_size, args.chunk_len, args.size))
        full = args.batch_size == 16
        times = {"out_of_memory": True} if full else {"step": 1.0, "bound": 0.5, "peak_memory": 7.0, "flops": 10**9}
        return {"size": args.size, "batch_size": args.batch_size, "chunk_len": args.chunk_len} | times

    monkeypatch.setattr(speed, "measure", measure)
    rows = rows_of(capsys, scale=True, picture=tmp_path / "speed.png")
    assert len(rows) == len(asked) == 3 + 4 + 1  # no batch larger than the one that is too large
    assert (tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.parametrize("size", SIZES)
def test_the_bound_has_the_layers_of_the_pore_model(size):
    """As many parameters, as many FLOPs: those of the formula."""
    with torch.device("meta"):
        plain, ours = speed.PlainPoreModel(**SIZES[size]), PoreModel.of_size(size)
    assert sorted(p.shape for p in plain.parameters()) == sorted(p.shape for p in ours.parameters())
    if size == "thesis":
        return  # the other two are quicker
    plain, ours = speed.PlainPoreModel(**SIZES[size]), PoreModel.of_size(size)
    counted = []
    for model in (plain, ours):
        # attention as plain products: the counter does not know the CPU's fused kernel
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(2, 804))
        counted.append(counter.get_total_flops())
    assert counted == [2 * speed.pore_model_flops(size, 804, frames_of(804))] * 2


def test_without_positions_the_pore_model_is_the_bound():
    """Equal weights, equal context: so nothing that costs time is left out of the bound."""
    torch.manual_seed(0)
    plain, ours = speed.PlainPoreModel(**SIZES["tiny"]).eval(), PoreModel.of_size("tiny").eval()
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), ours.parameters(), strict=True):
            mine.copy_(theirs)
        # queries and keys of one frame alone are at no distance
        signal = torch.randn(3, 8)
        torch.testing.assert_close(plain(signal), ours(signal)[0])


def test_flops_of_the_projector():
    barlow = speed.importlib.import_module("barlow")
    projector = barlow.Projector(128, 800, 64)
    args = barlow.Args(size="tiny", chunk_len=800, batch_size=2, embedding_dim=64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projector(torch.randn(2, 100, 128), torch.tensor([100, 100]))
    passes = speed.step_flops("barlow", args, 800, 100) - 12 * speed.pore_model_flops("tiny", 800, 100)
    assert passes == 6 * counter.get_total_flops()


def test_flops_of_the_head_of_masked_events():
    head = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 2 * 32))
    args = speed.importlib.import_module("masked").Args(size="tiny", chunk_len=800, batch_size=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(torch.randn(2, 100, 128))
    passes = speed.step_flops("masked", args, 800, 100) - 6 * speed.pore_model_flops("tiny", 800, 100)
    assert passes == 3 * counter.get_total_flops()


def test_each_part_of_the_data_path_has_a_row(shared_data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_simulated(tmp_path / "labelled.hdf5", 5, mean_bases=1500, seed=1)
    raw = shared_data / "formats/same_reads_as_multi_read_gzip.pod5"
    speed_data.main(speed_data.Args((raw,), tmp_path / "labelled.hdf5", epochs=2, reads=1, batch_size=4))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    rows = {row.pop("what"): row for row in rows}
    assert len(rows) == 5
    assert all(figure > 0 for row in rows.values() for figure in row.values())
    assert rows["fine-tuning, an epoch"]["share"] < 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
