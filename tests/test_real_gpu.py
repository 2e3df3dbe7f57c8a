"""What a GPU alone can show; without one all of it skips. `python -m benchmark.gpu` runs it."""

import importlib

import pytest
import torch

import basecall
from benchmark.plot_runs import read_metrics
from common.device import autocast
from common.pore_model import PoreModel
from common.reads.simulate import write_simulated
from tests.distributed_worker import SCRIPTS, arguments
from tests.test_basecall import basecaller

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def context_and_gradients(device, precision="fp32", lengths=None, compile=False):
    """Of a small pore model on 1536 samples: 192 frames, where 64 are left over from 128s (common/pore_model.py)."""
    torch.manual_seed(0)
    model = PoreModel.of_size("small", dropout=0.0)
    signal, weights = torch.randn(4, 1536), torch.randn(4, 192, model.channels)
    model.to(device)
    if compile:
        model.compile()
    with autocast(device, precision):
        context, _ = model(signal.to(device), None if lengths is None else torch.tensor(lengths).to(device))
    (context * weights.to(device)).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return [x.detach().cpu().float() for x in (context, gradients)]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.parametrize("lengths", [None, (1536, 1200, 700, 9)], ids=["whole rows", "padded rows"])
def test_context_and_gradients_are_those_of_the_cpu(lengths, precision, bound, compile, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which convolutions use in float32
    expected = context_and_gradients(torch.device("cpu"), lengths=lengths)
    for found, right in zip(context_and_gradients(GPU, precision, lengths, compile), expected, strict=True):
        assert float((found - right).norm() / right.norm()) < bound


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_validates_and_resumes(name, few, tmp_path):
    """The resumed run ends where the whole one does, but for sums that a GPU adds up in any order."""

    def run(folder, **changes):
        args = arguments(name, few, folder, **{"device": GPU.type, "precision": "fp32"} | changes)
        importlib.import_module(name).main(args)

    run(tmp_path / "whole", max_steps=6)
    run(tmp_path / "stopped", max_steps=3)
    run(None, max_steps=6, resume=tmp_path / "stopped")
    whole, stopped = (read_metrics(tmp_path / folder)[-1] for folder in ("whole", "stopped"))
    assert whole["step"] == stopped["step"] == 6
    assert stopped["validation/loss"] == pytest.approx(whole["validation/loss"], rel=0.01)


def test_basecalls_are_those_of_the_cpu(tmp_path):
    """Nearly: where two bases are as likely, roundings choose."""
    torch.save(basecaller().state_dict(), tmp_path / "basecaller.pt")
    write_simulated(tmp_path / "reads.hdf5", reads=3, mean_bases=300)
    called = {}
    for device in ("cpu", GPU.type):
        out = tmp_path / f"{device}.fastq"
        data = (tmp_path / "reads.hdf5",)
        basecall.main(basecall.Args(tmp_path / "basecaller.pt", data, out, device=device, precision="fp32"))
        called[device] = out.read_text().splitlines()
    names = [[line.split()[0] for line in lines[::4]] for lines in called.values()]
    bases = [sum(map(len, lines[1::4])) for lines in called.values()]
    assert names[0] == names[1] and bases[1] == pytest.approx(bases[0], rel=0.01)
