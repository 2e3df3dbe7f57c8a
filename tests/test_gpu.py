"""The scripts on a GPU that is pretended, and compiled without one; each check with a mistake that it has to find."""

import importlib
import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchgen
import yaml
from torch._dynamo.utils import counters

import barlow
import basecall
import common.run
from benchmark.plot_runs import read_metrics
from common import chunks
from common.chunks import Chunks
from common.pore_model import SIZES, FeatureEncoder, PoreModel
from common.reads.simulate import write_simulated
from common.run import Run, tensors_of
from finetune_basecaller import Basecaller, ctc_per_base
from tests import pretended_gpu
from tests.distributed_worker import SCRIPTS, arguments
from tests.pretended_gpu import DEVICE, OnGPU, PretendedGPU
from tests.test_basecall import basecaller

WAITS = dict.fromkeys(SCRIPTS, 1) | {"finetune_basecaller": 3, "cpc": 2}  # of the host, a step
GRAPHS = 4
transform = PoreModel.transform
each_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="module")
def kernels():
    """{operation: the devices that have a kernel for it}, of those that torch was built from."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    functions = {entry["func"].partition("(")[0]: entry for entry in yaml.load(path.read_text(), yaml.CSafeLoader)}

    def devices(name):
        entry = functions[name]
        if "structured_delegate" in entry:
            return devices(entry["structured_delegate"])
        return ", ".join(entry.get("dispatch", {"Composite": None}))

    return {name: devices(name) for name in functions}


@pytest.fixture(autouse=True)
def one_layer(monkeypatch):
    """All layers are alike, and each takes time to be traced."""
    monkeypatch.setitem(SIZES["tiny"], "layers", 1)


def run_on_gpu(name, data, folder, **changes):
    """The PretendedGPU that a script ran on. It logs every fourth step.

    steps: waits and copying LayerNorms of each. saved: the devices of the tensors in each file.
    """
    script, steps, tiles = importlib.import_module(name), Run.steps, Chunks.tiles
    save_whole = common.run.save_whole

    def watched(run, first, last):
        for step in steps(run, first, last):
            before = len(gpu.waits), len(gpu.copied)
            yield step
            gpu.steps[step] = gpu.waits[before[0] :], gpu.copied[before[1] :]

    def save(state, path):
        gpu.saved[path.name] = {x.device.type for x in tensors_of(state)}
        save_whole(state, path)

    with PretendedGPU() as gpu, pytest.MonkeyPatch.context() as patch:
        gpu.steps, gpu.saved = {}, {}
        patch.setattr(common.run, "save_whole", save)
        patch.setattr(script, "pick_device", lambda _: DEVICE)
        patch.setattr(script, "LOG_EVERY", 4)
        patch.setattr(Run, "steps", watched)
        patch.setattr(Chunks, "tiles", lambda *given, **options: itertools.islice(tiles(*given, **options), 1))
        script.main(arguments(name, data, folder, **{"chunk_len": 400} | changes))
    return gpu


def faults(name, step, gpu, kernels):
    """What is wrong with a run, and with this step, which neither logs nor writes."""
    waits, copied = gpu.steps[step]
    found = [f"{len(waits)} waits a step: {dict(Counter(waits))}"] if len(waits) > WAITS[name] else []
    names = {str(operation).removeprefix("aten.").removesuffix(".default") for operation in gpu.operations}
    missing = {name for name in names if "MPS" not in kernels[name] and "Composite" not in kernels[name]}
    missing -= {"_ctc_loss.Tensor", "_ctc_loss_backward.Tensor"}  # ctc_per_base takes them to the CPU: below
    found += [f"MPS has no {name}" for name in sorted(missing)]
    found += [f"MPS has no float64: {place}" for place in sorted(set(gpu.float64))]
    return found + [f"LayerNorm copies its input: {place}" for place in sorted(set(copied))]


@each_script
def test_on_a_gpu_a_script_trains_validates_logs_writes_and_resumes(name, few, tmp_path, kernels):
    gpu = run_on_gpu(name, few, tmp_path / "run", max_steps=2)
    assert not faults(name, 1, gpu, kernels)
    gpu = run_on_gpu(name, few, None, max_steps=5, resume=tmp_path / "run")
    assert not faults(name, 3, gpu, kernels)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [4, 5]
    assert gpu.saved.pop("checkpoint.pt") == {DEVICE.type} and set(map(tuple, gpu.saved.values())) == {("cpu",)}
    ends = {"cpc": "accuracy.png", "masked": "events.png", "finetune_basecaller": "calls.png"}
    assert (tmp_path / "run" / ends.get(name, "pore_model.pt")).exists()


def test_basecalling_on_a_gpu(tmp_path, monkeypatch):
    """A batch waits once, for its result. Names are as on a CPU; bases may differ where roundings do."""
    torch.save(basecaller().state_dict(), tmp_path / "basecaller.pt")
    write_simulated(tmp_path / "reads.hdf5", reads=3, mean_bases=1)
    forward, before = Basecaller.forward, []
    monkeypatch.setattr(basecall, "pick_device", lambda _: DEVICE)
    monkeypatch.setattr(Basecaller, "forward", lambda *given: before.append(len(gpu.waits)) or forward(*given))
    data, out = (tmp_path / "reads.hdf5",), tmp_path / "calls.fastq"
    with PretendedGPU() as gpu:
        basecall.main(basecall.Args(tmp_path / "basecaller.pt", data, out, chunk_len=800, batch_size=8))
    assert len(before) > 5 and np.diff([*before, len(gpu.waits)]).tolist() == [1] * len(before)
    assert [line.split()[0] for line in out.read_text().splitlines()[::4]] == [f"@simulated-0-{n}" for n in range(3)]


def test_ctc_of_a_mac_is_computed_on_the_cpu(monkeypatch):
    """Forward alone: this torch has no gradients for MPS."""
    monkeypatch.setattr(pretended_gpu, "DEVICE", torch.device("mps"))
    given = torch.randn(2, 6, 5).log_softmax(-1), *map(torch.tensor, ([6, 5], [[1, 3, 3], [4, 2, 0]], [3, 2]))
    with PretendedGPU() as gpu:
        found = ctc_per_base(*map(OnGPU, given))
    assert not gpu.operations
    torch.testing.assert_close(found, ctc_per_base(*given))


def compiled_graphs(run):
    """(whether for training, whether with open sizes) of each graph compiled in run(), and the breaks within."""
    compile, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append((torch.is_grad_enabled(), any(isinstance(x, torch.SymInt) for x in inputs)))
        return graph.forward

    torch.compiler.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend=backend))
        run()
    torch.compiler.reset()
    return graphs, dict(counters["graph_break"])


@each_script
def test_compiled_graphs_are_few_and_whole(name, few, tmp_path):
    frozen = {"freeze_steps": 2} if name == "finetune_basecaller" else {}
    args = arguments(name, few, tmp_path / "run", max_steps=6, compile=True, **frozen)
    graphs, breaks = compiled_graphs(lambda: importlib.import_module(name).main(args))
    assert not breaks and 1 <= len(graphs) <= GRAPHS and (True, True) not in graphs


# ---------------------------------------------------------------------------------------------------- planted mistakes


@pytest.fixture
def mistake(monkeypatch):
    """Puts another function in the place of one: change(the one there, what it is given) is what it gives."""

    def plant(owner, name, change):
        there = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **options: change(there, *given, **options))

    return plant


def loss_of_two_devices(loss, z1, z2, lambd):
    return loss(z1 + torch.ones(z1.shape), z2, lambd)


def copy_from_memory_that_is_not_pinned(copied_to, device, x):
    return x.to(device, non_blocking=True)


@pytest.mark.parametrize(
    ("owner", "name", "change", "said"),
    [
        (barlow, "barlow_loss", loss_of_two_devices, "add: tensors of the GPU and of the CPU, at barlow.py"),
        (chunks, "copied_to", copy_from_memory_that_is_not_pinned, "non_blocking, from memory that is not pinned"),
    ],
)
def test_what_a_gpu_would_refuse_is_found(mistake, few, tmp_path, owner, name, change, said):
    mistake(owner, name, change)
    with pytest.raises(AssertionError, match=said):
        run_on_gpu("barlow", few, tmp_path / "run", max_steps=1)


def loss_with(change):
    def planted(loss, z1, z2, lambd):
        change(z1)
        return loss(z1, z2, lambd)

    return barlow, "barlow_loss", planted


MISTAKES = {
    "a number that is read": (*loss_with(lambda z: float(z.detach().sum())), "2 waits a step: .*'barlow.py"),
    "a mask as an index": (*loss_with(lambda z: z[z > 0]), "2 waits a step: .*'barlow.py"),
    "an index of the CPU": (*loss_with(lambda z: z[torch.arange(3)]), "2 waits a step: .*'barlow.py"),
    "copies that wait": (chunks, "copied_to", lambda _, device, x: x.to(device), "3 waits a step: .*'chunks.py"),
    "an SVD": (*loss_with(torch.linalg.svdvals), "MPS has no _linalg_svd"),
    "float64": (*loss_with(torch.Tensor.double), "MPS has no float64: barlow.py"),
    "frames out of order": (
        *(FeatureEncoder, "forward"),
        lambda forward, *given: [x if x.dim() < 3 else x.mT.contiguous().mT for x in forward(*given)],
        "LayerNorm copies its input: pore_model.py",
    ),
}


@pytest.mark.parametrize(("owner", "name", "change", "said"), MISTAKES.values(), ids=MISTAKES)
def test_what_slows_a_gpu_down_or_stops_a_mac_is_found(mistake, few, tmp_path, kernels, owner, name, change, said):
    mistake(owner, name, change)
    found = faults("barlow", 1, run_on_gpu("barlow", few, tmp_path / "run", max_steps=2), kernels)
    assert re.search(said, " and ".join(found)), found


def test_an_optimizer_that_waits_after_resume_is_found(mistake, few, tmp_path, kernels):
    """Its steps are numbers of the CPU until a checkpoint is loaded onto the GPU."""
    mistake(torch.optim.Adam, "__init__", lambda init, *given, fused: init(*given))
    mistake(common.run, "load_tensors", lambda _, path: torch.load(path, map_location=DEVICE))
    gpu = run_on_gpu("barlow", few, tmp_path / "run", max_steps=2)
    assert not faults("barlow", 1, gpu, kernels)
    gpu = run_on_gpu("barlow", few, None, max_steps=4, resume=tmp_path / "run")
    assert re.search(r"\d\d waits a step: .*'barlow.py", faults("barlow", 3, gpu, kernels)[0])


def with_a_break(model, *given):
    torch._dynamo.graph_break()
    return transform(model, *given)


def compiled_anew(model, *given):
    model.calls = getattr(model, "calls", 0) + 1  # a number that the graph is compiled for
    return transform(model, *given)


@pytest.mark.parametrize(
    ("change", "widths", "found"),
    [
        (with_a_break, [80], lambda graphs, breaks: breaks),
        (compiled_anew, [80] * (GRAPHS + 1), lambda graphs, breaks: len(graphs) > GRAPHS),
        (transform, [80, 88], lambda graphs, breaks: (True, True) in graphs),
    ],
)
def test_what_compiles_badly_is_found(monkeypatch, change, widths, found):
    monkeypatch.setattr(PoreModel, "transform", change)
    model = PoreModel(64, 1, 64)
    views = [(torch.randn(3, width), torch.tensor([width, 60, 70])) for width in widths]
    graphs = compiled_graphs(lambda: (model.compile(), [model(*view) for view in views]))
    assert found(*graphs), graphs


def test_cudnns_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
