"""Barlow Twins on raw nanopore current (Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy
Reduction"; thesis section 5.8).

Two random views of each chunk go through the pore model and a head. Each dimension of the representation should say
the same of both views (diagonal of the cross-correlation: invariance), and no two dimensions should say the same thing
(off the diagonal: redundancy reduction). Nothing else keeps the features from collapsing: no negatives, no teacher.

    C_ij = sum_b zA_bi zB_bj / N      zA, zB: representations standardised over the batch (paper, eq. 2)
    loss = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2            (paper, eq. 1)

Departures
1. From the thesis: its eq. 5.9 lacks the square of (1 - C_ii), and its algorithm 7 masks the diagonal out, which would
   teach no invariance. Here is the paper's loss.
2. From the thesis: the pore model has rotary positions and drops no attention weights (see TransformerLayer), and two
   widths of the head that the thesis leaves open are chosen (see RepresentationHead).
3. From the paper: Adam at a constant rate, as in the thesis, not LARS; --warmup-steps and --cosine give the schedule.
4. From the paper: batches of 64 for 2048 dimensions, as in the thesis. C then has rank 63 at most, and the loss cannot
   fall below about 279 (docs/barlow.md).

    python barlow.py --data reads/ --lr 1e-5 --batch-size 64
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import InputError
from common.augment import EXTRA, view
from common.data import Chunks, open_data
from common.distributed import all_gather, average_gradients
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
    batch_size: int = 64
    """chunks a step; the loss needs no negatives, but the more chunks, the better C is measured"""
    lr: float = 1e-5
    """learning rate"""
    representation: int = 2048
    """R, dimensions of the representation; the paper found more to be better up to 16384"""
    lambd: float = 5e-3
    """lambda, the weight of redundancy reduction; the paper's and the thesis's value"""


def barlow_loss(r1, r2, lambd):
    """Barlow Twins' loss of representations r1, r2 (N, R), each row of one a view of the same chunk as in the other."""
    r1, r2 = r1.float(), r2.float()
    z1, z2 = ((r - r.mean(0)) * torch.rsqrt(r.var(0, correction=0) + 1e-5) for r in (r1, r2))  # (N, R)
    c = z1.T @ z2 / len(z1)  # (R, R)
    diagonal = c.diagonal()  # (R,)
    invariance = (1 - diagonal).square().sum()
    redundancy = c.square().sum() - diagonal.square().sum()
    return invariance + lambd * redundancy, {"invariance": invariance, "redundancy": redundancy}


# Learning rate: equal in all methods
def learning_rate(step, args, total):
    """The learning rate at `step` of `total`: constant, or with a linear rise and a cosine fall."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    if not args.cosine:
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup_steps) / max(1, total - args.warmup_steps)))


# End of learning rate


@torch.no_grad()
def validate(args, models, chunks, device):
    """Mean loss over the validation chunks, as whole batches of views that are the same at every call."""
    pore_model, head = models.values()
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
            r1, r2 = head(*pore_model(*view1)), head(*pore_model(*view2))
        r1, r2 = all_gather(r1, r2)
        loss, _ = barlow_loss(r1, r2, args.lambd)
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
    total = args.epochs * steps_per_epoch
    last = min(total, args.max_steps or total)

    head = RepresentationHead(pore_model.channels, args.chunk_len, args.representation).to(device)
    optimizer = torch.optim.Adam([*pore_model.parameters(), *head.parameters()], fused=True)
    warn_if_slow(device, (pore_model, head), args.chunk_len, len(chunks), passes=2)

    run = Run(args, __file__)
    models = {"pore_model": pore_model, "head": head}
    # Resume: equal in all methods
    parts = models | {"optimizer": optimizer}
    first = run.resume(device, last, parts)["step"] if args.resume else 0
    # End of resume
    if args.compile:
        pore_model.compile()

    for step in run.steps(first, last, args.batch_size):
        seed_step(args.seed, step)
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        view1, view2 = (
            view(batch.signal, batch.lengths, args.noise_factor, args.drop_chance, args.extra_augmentations)
            for _ in range(2)
        )
        with autocast(device, args.precision):
            r1, r2 = head(*pore_model(*view1)), head(*pore_model(*view2))  # (N, R)
        r1, r2 = all_gather(r1, r2)  # those of all processes
        loss, terms = barlow_loss(r1, r2, args.lambd)
        stop_if_not_finite(step, loss, terms, batch.reads)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, total)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)
        optimizer.step()

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
