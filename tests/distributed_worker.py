"""What tests/test_distributed.py compares: python -m tests.distributed_worker DATA OUT

Each job runs in one process or in two, which are told what torchrun would tell them. They are forks of this one, since
imports take longer than the steps.
"""

import importlib
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer would import, in each process

from common.chunks import Batch, Chunks
from common.device import all_gather, part_of, pick_device, rank, world_size
from common.pore_model import FeatureEncoder, PoreModel
from common.run import Run
from tests.test_methods import METHODS, settings

SCRIPTS = [*METHODS, "finetune_basecaller"]
STEPS = {"float64": 3, "float32": 1}


def arguments(name, data, folder, **changes):
    if name != "finetune_basecaller":
        return settings(name, data, folder, **{"lr": 1e-4} | changes)
    args = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 8, "lr": 1e-4, "epochs": 100} | changes
    return importlib.import_module(name).Args(data=(data,), run_dir=folder, **args)


def each_tensor(change, given):
    """What was given, with the change made to each tensor, in tuples as well."""
    if isinstance(given, tuple):
        parts = [each_tensor(change, x) for x in given]
        return given._make(parts) if hasattr(given, "_make") else tuple(parts)
    return change(given) if torch.is_tensor(given) else given


class WholeBatch:
    """A function of random changes that draws, of the whole batch, what one process would: each has its part."""

    def __init__(self, change):
        self.change, self.calls = change, 0

    def __call__(self, *given):
        self.calls += 1
        given = each_tensor(lambda x: all_gather(x)[0], given)
        with torch.random.fork_rng():
            torch.manual_seed(self.calls)
            changed = self.change(*given)
        return each_tensor(lambda x: x[part_of(len(x))], changed)


def compare(data, out, dtype):
    """Losses, gradients, validation and the state at the end of the first steps of each script, without dropout."""
    torch.set_default_dtype(getattr(torch, dtype))
    if dtype == "float64":
        torch.Tensor.float = torch.Tensor.double  # of the losses
    forward, of_size, of_state = FeatureEncoder.forward, PoreModel.of_size, PoreModel.from_state_dict
    FeatureEncoder.forward = lambda self, signal, *rest: forward(self, signal.to(torch.get_default_dtype()), *rest)
    PoreModel.of_size = lambda size, dropout=0.0, *rest, **more: of_size(size, 0.0, *rest, **more)
    PoreModel.from_state_dict = lambda state, dropout=0.0: of_state(state, 0.0)
    for name in SCRIPTS:
        script, seen = importlib.import_module(name), {"losses": [], "gradients": []}
        for change in ("noise", "drop_points", "gain_offset", "hide"):
            if hasattr(script, change) and name != "finetune_basecaller":
                setattr(script, change, WholeBatch(getattr(script, change)))
        if name == "finetune_basecaller":  # which draws more in augment()
            whole = WholeBatch(lambda *batch, augment=script.augment: augment(Batch(*batch[:2]), batch[2]))
            script.augment = lambda batch, args, whole=whole: whole(batch.signal, batch.lengths, args)
        if dtype == "float64" and name == "finetune_basecaller":  # whose decoder takes float32 alone
            script.best_path = lambda log_probs, decode=script.best_path: decode(log_probs.to(torch.float32))
        script.seed_step = lambda seed, step: torch.manual_seed(step)
        loss_name = "ctc_loss" if name == "finetune_basecaller" else f"{name}_loss"
        loss_function, adam = getattr(script, loss_name), torch.optim.Adam.step

        def loss_of(*inputs):
            loss, terms = loss_function(*inputs)
            if loss.requires_grad:
                seen["losses"].append({"loss": loss.detach(), **terms})
            return loss, terms

        def step_of(optimizer, *rest):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            seen["gradients"].append([p.grad.clone() for p in parameters])
            return adam(optimizer, *rest)

        def checkpoint(run, step, parts):
            seen["state"], run.saved = {part: parts[part].state_dict() for part in parts}, step

        setattr(script, loss_name, loss_of)
        torch.optim.Adam.step, Run.checkpoint = step_of, checkpoint
        Run.log = lambda run, step, **metrics: seen.update(validation=metrics)
        script.main(arguments(name, data, out / f"{name}-run", max_steps=STEPS[dtype]))
        torch.optim.Adam.step = adam
        torch.save(seen, out / f"{name}-{rank()}.pt")


def resume(data, out):
    """Each script whole, and stopped at a step of its own by a SIGTERM that reaches the last process alone, resumed."""
    for name in SCRIPTS:
        script, stopped = importlib.import_module(name), out / f"{name}-stopped"
        script.LOG_EVERY = 2
        script.main(arguments(name, data, out / f"{name}-whole", max_steps=4))
        when, cut = random.Random(name).randrange(1, 4), Chunks.batch

        def batch(chunks, seed, step, size):
            training = callable(signal.getsignal(signal.SIGTERM))  # masked.py counts levels before
            if training and step + 1 == when and rank() == world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return cut(chunks, seed, step, size)

        Chunks.batch = batch
        assert script.main(arguments(name, data, stopped, max_steps=4)) == 128 + signal.SIGTERM
        Chunks.batch = cut
        if rank() == 0:
            shutil.copy(stopped / "checkpoint.pt", out / f"{name}-stopped.pt")
            (out / f"{name}-stopped-at").write_text(str(when))
        script.main(arguments(name, data, None, max_steps=4, resume=stopped))


def start(processes, job, data, out, *options):
    """Starts the job in so many processes, and returns their ids."""
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        started.append(os.fork())
        if started[-1] == 0:
            try:
                signal.alarm(600)  # seconds: if one does not do what the others do, they wait for ever
                if processes > 1:
                    told = {"TORCHELASTIC_RUN_ID": job.__name__, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
                    told |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes}
                    os.environ.update({key: str(value) for key, value in told.items()})
                pick_device("cpu")  # joins the others
                for name in SCRIPTS:  # which would join them for each run
                    importlib.import_module(name).pick_device = torch.device
                job(data, out, *options)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    return started


if __name__ == "__main__":
    torch.set_num_threads(1)  # more do not survive a fork
    for name in SCRIPTS:
        importlib.import_module(name)
    data, out = map(Path, sys.argv[1:])
    tiles, Run.picture = Chunks.tiles, lambda *given: None  # which takes a second
    Chunks.tiles = lambda *given, **options: itertools.islice(tiles(*given, **options), 2)  # enough of a validation
    started = start(2, resume, data, out / "resumed")
    for dtype in STEPS:
        for processes in (1, 2):
            started += start(processes, compare, data, out / f"{dtype}-{processes}", dtype)
    while started:
        process, status = os.wait()
        started.remove(process)
        if status:  # the others may wait for it
            for other in started:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
