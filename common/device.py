"""Device, precision and seeds; and many devices, of which each works on its part of every batch with equal weights.

torchrun starts a process a device. Losses and BatchNorm see the whole batch: what they need is summed or gathered over
all processes (`sum_over_ranks`, `all_gather`), and gradients go back the same way. All then have the same loss, and the
mean of their gradients is the gradient of that loss: docs/many_gpus.md. With one process, these functions give back
what they were given.
"""

import atexit
import contextlib
import itertools
import os
import sys

import torch
import torch.distributed as dist

from common import InputError


def pick_device(name):
    """The torch.device that `--device` names; auto: cuda, else mps, else cpu. Under torchrun, joins the processes."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise InputError(f"--device {name}: not available on this machine; leave it out or give --device cpu")
    return _join(torch.device(name))


def autocast(device, precision):
    """The context that models run in: bfloat16 where `--precision` says so; auto: on a GPU that has it."""
    bf16 = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def copied_to(device, x):
    """The tensor x of the CPU on `device`. The host does not wait for a GPU that is busy: the copy is queued, too.

    That needs pinned memory, which torch keeps until it is read. MPS does not keep what it reads later
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    if device.type in ("cpu", "mps"):
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def evaluation(model):
    """Within it, `model` is in evaluation mode and no gradients are kept; then it is in training mode again."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def seed_step(seed, step):
    """Seeds all randomness of one step (views, dropout), so that a resumed run draws what the whole run would have.

    Each process draws numbers of its own.
    """
    torch.manual_seed(((rank() * 1_000_003 + seed) * 1_000_003 + step) % 2**63)


def rank():
    """This process's number among those of torchrun, from 0."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size():
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def _join(device):
    """Joins the processes that torchrun started, if it did; returns this one's device of the kind of `device`."""
    if not dist.is_torchelastic_launched():
        return device
    if device.type == "mps":
        raise InputError("--device mps: torchrun needs a device for each process; give --device cpu")
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise InputError(f"--nproc-per-node: at most {torch.cuda.device_count()}, the GPUs of this machine")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    report = sys.excepthook  # torch wraps it, to put the rank before each line
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    sys.excepthook = report
    atexit.register(dist.destroy_process_group)
    return device


def part_of(length):
    """The part of `length` rows, a slice, that is this process's; where they are too few, the last have none."""
    start, end = (-(-length * number // world_size()) for number in (rank(), rank() + 1))
    return slice(start, end)


class _Sum(torch.autograd.Function):
    """The sum over processes, in each; its gradient is the sum over processes of theirs.

    torch.distributed.nn has the same, but says that it is deprecated for what is not public yet.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient)


def sum_over_ranks(x):
    """The sum of x over all processes, which gradients can pass."""
    return x if world_size() == 1 else _Sum.apply(x)


def all_gather(*parts):
    """Each of these (N / processes, ...) as the whole batch (N, ...) has it, which gradients can pass."""
    if world_size() == 1:
        return parts
    wholes = []
    for x in parts:
        whole = x.new_zeros(len(x) * world_size(), *x.shape[1:])
        whole[part_of(len(whole))] = x
        wholes.append(sum_over_ranks(whole))
    return wholes


def average_gradients(optimizer):
    """Gives each parameter of `optimizer` the mean of its gradients over all processes."""
    if world_size() == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= world_size()
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def all_reduce_max(number):
    """The highest of all processes' whole numbers, in each."""
    if world_size() > 1:
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def all_gather_lists(values):
    """The processes' lists of plain values, put together, in each."""
    if world_size() == 1:
        return values
    lists = [None] * world_size()
    dist.all_gather_object(lists, values)
    return list(itertools.chain(*lists))
