"""What tests/test_distributed.py runs, as it is and under torchrun: python -m tests.distributed_worker JOB DATA OUT

Views and dropout, which each process draws for itself, are made the same for one process and for several.
"""

import importlib
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from common.augment import view
from common.distributed import all_gather, part_of, rank, world_size
from common.pore_model import FeatureEncoder, PoreModel
from common.run import Run, pick_device
from tests.test_methods import METHODS, settings


def prepared(name):
    """The module of a script, to be run more than once in these processes."""
    script = importlib.import_module(name)
    script.pick_device = lambda name: DEVICE
    return script


def arguments(name, data, folder, **changes):
    if name != "finetune_basecaller":
        small = {} if name == "cpc" else {"representation": 32}
        return settings(name, data, folder, **{"batch_size": 8, "chunk_len": 400, "lr": 1e-4} | small | changes)
    args = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 8, "lr": 1e-4, "epochs": 100} | changes
    return prepared(name).Args(data=(data,), run_dir=folder, **args)


class WholeViews:
    """The views that one process would draw of the whole batch, each process's part of them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, signal, lengths, *options):
        self.calls += 1
        whole, whole_lengths = all_gather(signal, lengths)
        with torch.random.fork_rng():
            torch.manual_seed(self.calls)
            views = view(whole, whole_lengths, *options)
        return type(views)(*(x[part_of(len(x))] for x in views))


def compare(data, out, dtype):
    """Losses, gradients and the state at the end of three steps of each script, without dropout."""
    torch.set_default_dtype(getattr(torch, dtype))
    if dtype == "float64":
        torch.Tensor.float = torch.Tensor.double  # of the losses
    forward, of_size, of_state = FeatureEncoder.forward, PoreModel.of_size, PoreModel.from_state_dict
    FeatureEncoder.forward = lambda self, signal, *rest: forward(self, signal.to(torch.get_default_dtype()), *rest)
    PoreModel.of_size = lambda size, dropout=0.0, encoder="wide": of_size(size, 0.0, encoder)
    PoreModel.from_state_dict = lambda state, dropout=0.0: of_state(state, 0.0)
    for name in [*METHODS, "finetune_basecaller"]:
        script, seen, views = prepared(name), {"losses": [], "gradients": []}, WholeViews()
        script.view, script.gain_offset = views, lambda signal, lengths, *options: views(signal, lengths)
        if dtype == "float64" and name == "finetune_basecaller":  # whose decoder takes float32 alone
            script.best_path = lambda log_probs, decode=script.best_path: decode(log_probs.to(torch.float32))
        script.seed_step = lambda seed, step: torch.manual_seed(step)
        loss_name = "ctc_loss" if name == "finetune_basecaller" else f"{name}_loss"
        loss_function, adam = getattr(script, loss_name), torch.optim.Adam.step

        def loss_of(*inputs, seen=seen, loss_function=loss_function):
            loss, terms = loss_function(*inputs)
            if loss.requires_grad:
                seen["losses"].append({"loss": loss.detach(), **terms})
            return loss, terms

        def step_of(optimizer, *rest, seen=seen, adam=adam):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            seen["gradients"].append([p.grad.clone() for p in parameters])
            return adam(optimizer, *rest)

        def checkpoint(run, step, seen=seen, **state):
            seen["state"] = state

        setattr(script, loss_name, loss_of)
        torch.optim.Adam.step, Run.checkpoint = step_of, checkpoint
        script.main(arguments(name, data, out / f"{name}-run", max_steps=3))
        torch.optim.Adam.step = adam
        torch.save(seen, out / f"{name}-{rank()}.pt")


def resume(data, out):
    """Each script whole, and stopped at a step of its own by a SIGTERM that reaches the last process alone, resumed."""
    for name in [*METHODS, "finetune_basecaller"]:
        script, stopped, chance = prepared(name), out / f"{name}-stopped", random.Random(name)
        script.main(arguments(name, data, out / f"{name}-whole", max_steps=10))
        when, cut = chance.randrange(1, 10), script.Chunks.batch

        def batch(chunks, seed, step, size, when=when, cut=cut):
            if step + 1 == when and rank() == world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return cut(chunks, seed, step, size)

        script.Chunks.batch = batch
        try:
            script.main(arguments(name, data, stopped, max_steps=10))
        except SystemExit as end:
            assert end.code == 128 + signal.SIGTERM
        script.Chunks.batch = cut
        if rank() == 0:
            shutil.copy(stopped / "checkpoint.pt", out / f"{name}-stopped.pt")
            (out / f"{name}-stopped-at").write_text(str(when))
        script.main(arguments(name, data, None, max_steps=10, resume=stopped))


if __name__ == "__main__":
    DEVICE = pick_device("cpu")
    torch.set_num_threads(1)
    job, data, out, *rest = sys.argv[1:]
    globals()[job](Path(data), Path(out), *rest)
