"""MoCo on raw nanopore current (He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning";
2021 thesis).

Of two random views of a chunk, one becomes a query, the other a key. The query has to find its key among K others: the
keys of past batches, kept in a queue, so that negatives do not cost a large batch. Keys come from a second pore model
that follows the first as a slow moving average, so that those in the queue stay comparable.

    loss = -log( exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_{i = 1..K} exp(q.k_i / tau)) )      (paper, eq. 1)
    theta_k <- m theta_k + (1 - m) theta_q                                                   (paper, eq. 2)

q, k+ and the queue's k_i have length 1.

Departures
1. From the thesis: its denominator is the queue alone, and the loss can then fall below 0. Here it holds the positive
   as well, as in the paper.
2. From the thesis: the pore model has rotary positions and drops no attention weights (see TransformerLayer), and two
   widths of the head that the thesis leaves open are chosen (see RepresentationHead).
3. From the paper: Adam at a constant rate, not SGD with steps; --warmup-steps and --cosine give a schedule.
4. From the paper: queue and batch are the thesis's, 8192 and 32, not 65536 and 256.
5. From the paper: shuffling BatchNorm (section 3.3) is an option, --batchnorm-groups; without it a query and its key
   are normalised together with the same chunks and may recognise each other by that.
6. The key's pore model has no dropout: a key should not depend on chance. Its BatchNorm uses its own batch.

    python moco.py --data reads/ --lr 3e-5 --batch-size 32
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from common.augment import EXTRA, view
from common.data import Chunks, open_data
from common.distributed import all_gather, average_gradients, world_size
from common.metrics import effective_rank, feature_spread
from common.pore_model import PoreModel, RepresentationHead
from common.run import LOG_EVERY, Run, autocast, parse_args, pick_device, seed_step, stop_if_not_finite, warn_if_slow


@dataclass
class Args:
    # Shared arguments: equal in all methods
    data: tuple[Path, ...] = ()
    """raw reads (POD5, FAST5, mapped-signal HDF5), read stores, or folders of them; simulated reads if none"""
    shared_data: bool = False
    """fine-tuning will be given the same --data: leave one read in six to it"""
    weights: Path | None = None
    """a pore_model.pt, or a basecaller.pt, to start from; from random weights if not given"""
    size: Literal["thesis", "small", "tiny"] = "thesis"
    """size of the pore model: 32 M, 3.3 M or 0.3 M parameters; tiny trains on two cores"""
    chunk_len: int = 3600
    """samples a chunk"""
    noise_factor: float = 0.25
    """standard deviation of the noise added to a view, in normalised units"""
    drop_chance: tuple[float, float] = (0.25, 0.38)
    """each view drops samples with a chance drawn between these two"""
    extra_augmentations: tuple[Literal[tuple(EXTRA)], ...] = ()
    """further augmentations, before noise and drop-point; docs/augmentations.md has pictures of them"""
    epochs: int = 50
    """passes over the training reads"""
    max_steps: int | None = None
    """stop early, after this many steps"""
    warmup_steps: int = 0
    """steps over which the learning rate rises from 0"""
    cosine: bool = False
    """let the learning rate fall to 0 as a cosine over all epochs"""
    seed: int = 0
    """of weights, order of the chunks, views and dropout"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it; the loss is always float32"""
    compile: bool = False
    """torch.compile the pore model"""
    run_dir: Path | None = None
    """the folder of this run; runs/<script>__<seed>__<time> if not given"""
    resume: Path | None = None
    """go on with this run from its last checkpoint; its arguments are the defaults"""
    checkpoint_every: int = 100
    """steps between checkpoints"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    # End of shared arguments

    # Method specific arguments
    batch_size: int = 32
    """chunks a step; each step replaces as many keys of the queue"""
    lr: float = 3e-5
    """learning rate"""
    representation: int = 256
    """R, dimensions of the representation"""
    temperature: float = 0.1
    """tau; the paper has 0.07"""
    queue: int = 8192
    """K, keys that a query is compared with besides its own; the oldest are K / batch size steps old"""
    momentum: float = 0.999
    """m, how much of the key's weights stays at each step; too low and the queue's keys no longer fit together"""
    batchnorm_groups: int = 1
    """encode the batch in this many groups, shuffled for the keys, each with its own BatchNorm statistics; try 4"""


class Queue(nn.Module):
    """The last K keys, `keys` (K, R) of length 1, as a ring: new ones replace the oldest. It starts random."""

    def __init__(self, size, representation):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, representation), dim=1))
        self.register_buffer("pointer", torch.tensor(0))

    @torch.no_grad()
    def push(self, keys):
        """Replaces the oldest keys by these (N, R), N <= K."""
        place = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[place] = F.normalize(keys.float(), dim=1)
        self.pointer.copy_((self.pointer + len(keys)) % len(self.keys))


def moco_loss(q, k, queue, temperature):
    """MoCo's loss (InfoNCE) of queries q (N, R), their keys k (N, R) and the queue's keys (K, R), these of length 1.

    It is the sum of alignment (of queries and their keys) and uniformity; top1 and top5 are the shares of queries
    whose own key is the most similar, or among the five most similar, of all K + 1. No gradient reaches the keys.
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.detach().float(), dim=1)
    positive = (q * k).sum(1, keepdim=True)  # (N, 1)
    s = torch.cat([positive, q @ queue.detach().float().T], dim=1) / temperature  # (N, K + 1)
    alignment, uniformity = -s[:, 0].mean(), s.logsumexp(1).mean()
    better = (s[:, 1:] > s[:, :1] - 1e-4).sum(1)  # (N,) keys more similar than the right one, or as similar
    top1, top5 = (better < 1).float().mean(), (better < 5).float().mean()
    return alignment + uniformity, {"alignment": alignment, "uniformity": uniformity, "top1": top1, "top5": top5}


# Learning rate: equal in all methods
def learning_rate(step, args, total):
    """The learning rate at `step` of `total`: constant, or with a linear rise and a cosine fall."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    if not args.cosine:
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup_steps) / max(1, total - args.warmup_steps)))


# End of learning rate


# Moving average: equal in moco.py, byol.py and dino.py
@torch.no_grad()
def update_average(average, model, momentum):
    """Moves each parameter of `average` towards that of `model`: momentum * average + (1 - momentum) * model.

    Buffers (BatchNorm's running statistics) are not averaged: `average` runs in training mode and gathers its own.
    """
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - momentum)


# End of moving average


def encode(pore_model, head, view1, order, groups):
    """Representations (N, R) of a view; the `groups` equal parts of `order` (N,) share no BatchNorm statistics."""
    parts = [head(*pore_model(view1.signal[rows], view1.lengths[rows])) for rows in order.chunk(groups)]
    return torch.cat(parts)[order.argsort()]


@torch.no_grad()
def validate(args, models, chunks, device):
    """Mean loss over the validation chunks against the queue as it is, with views that are the same at every call."""
    pore_model, head, key_pore_model, key_head, queue = models.values()
    for model in models.values():
        model.eval()
    losses = []
    for number, batch in enumerate(chunks.tiles(args.batch_size, equal=True)):
        seed_step(args.seed, number)
        batch = batch.to(device)
        view1, view2 = (
            view(batch.signal, batch.lengths, args.noise_factor, args.drop_chance, args.extra_augmentations)
            for _ in range(2)
        )
        with autocast(device, args.precision):
            r1, r2 = head(*pore_model(*view1)), key_head(*key_pore_model(*view2))
        r1, r2 = all_gather(r1, r2)
        loss, _ = moco_loss(r1, r2, queue.keys, args.temperature)
        losses.append(loss.item())
    for model in models.values():
        model.train()
    return {"validation/loss": sum(losses) / len(losses)}


def main(args):
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    pore_model = PoreModel.of_size(args.size).to(device)
    if args.weights and not args.resume:
        pore_model.load_weights(args.weights)
    stores = open_data(args.data)
    share = "pretraining" if args.shared_data else None
    chunks = Chunks(stores, args.chunk_len, "training", share=share)
    validation = Chunks(stores, args.chunk_len, "validation")
    steps_per_epoch = chunks.steps_per_epoch(args.batch_size)
    if args.batch_size < 2:
        raise InputError("--batch-size 1: BatchNorm and the loss need at least 2 chunks")
    if args.batch_size % (args.batchnorm_groups * world_size()) or args.batch_size // args.batchnorm_groups < 2:
        raise InputError(
            f"--batchnorm-groups {args.batchnorm_groups}: should cut --batch-size, and each process's part of it, "
            "in equal groups, of 2 chunks or more in all"
        )
    if args.queue < args.batch_size:
        raise InputError(f"--queue {args.queue}: should hold at least one batch, {args.batch_size} keys")
    total = args.epochs * steps_per_epoch
    last = min(total, args.max_steps or total)

    head = RepresentationHead(pore_model.channels, args.chunk_len, args.representation).to(device)
    key_pore_model = PoreModel.from_state_dict(pore_model.state_dict(), dropout=0.0).to(device)
    key_head = copy.deepcopy(head)
    queue = Queue(args.queue, args.representation).to(device)
    optimizer = torch.optim.Adam([*pore_model.parameters(), *head.parameters()], fused=True)
    warn_if_slow(device, (pore_model, head), args.chunk_len, len(chunks), passes=4 / 3)

    run = Run(args, __file__)
    models = {
        "pore_model": pore_model,
        "head": head,
        "key_pore_model": key_pore_model,
        "key_head": key_head,
        "queue": queue,
    }
    # Resume: equal in all methods
    parts = models | {"optimizer": optimizer}
    first = run.resume(device, last, parts)["step"] if args.resume else 0
    # End of resume
    if args.compile:
        pore_model.compile(), key_pore_model.compile()

    for step in run.steps(first, last, args.batch_size):
        seed_step(args.seed, step)
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        view1, view2 = (
            view(batch.signal, batch.lengths, args.noise_factor, args.drop_chance, args.extra_augmentations)
            for _ in range(2)
        )
        with autocast(device, args.precision):
            order = torch.arange(len(batch.signal), device=device)
            r1 = encode(pore_model, head, view1, order, args.batchnorm_groups)  # queries (N, R)
            with torch.no_grad():
                order = torch.randperm(len(batch.signal), device=device)
                r2 = encode(key_pore_model, key_head, view2, order, args.batchnorm_groups)  # keys (N, R)
        r1, r2 = all_gather(r1, r2)  # those of all processes
        loss, terms = moco_loss(r1, r2, queue.keys, args.temperature)
        stop_if_not_finite(step, loss, terms, batch.reads)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, total)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)
        optimizer.step()
        update_average(key_pore_model, pore_model, args.momentum)
        update_average(key_head, head, args.momentum)
        queue.push(r2)

        # Logging, validation and checkpoint: equal in all methods
        if step % LOG_EVERY == 0:
            spread, rank = feature_spread(r1), effective_rank(r1)
            lr = optimizer.param_groups[0]["lr"]
            run.log(step, loss=loss, **terms, feature_spread=spread, effective_rank=rank, lr=lr)
        if step % steps_per_epoch == 0:
            run.log(step, **validate(args, models, validation, device))
        stop = run.asked_to_stop()  # a question to all processes, at each step
        if stop or step % args.checkpoint_every == 0 or step == last:
            run.checkpoint(step, **{name: part.state_dict() for name, part in parts.items()})
        # End of logging, validation and checkpoint
    if last % steps_per_epoch:  # stopped within an epoch; --resume will cut this line off again
        run.log(last, **validate(args, models, validation, device))
    run.save("pore_model.pt", pore_model.state_dict())
    print(f"pretrained weights: {run.folder / 'pore_model.pt'}")


if __name__ == "__main__":
    main(parse_args(Args))
