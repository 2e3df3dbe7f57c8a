"""SimSiam on raw nanopore current (Chen & He 2021, "Exploring Simple Siamese Representation Learning"; 2021 thesis).

Two random views of each chunk go through the pore model and a head. A small predictor has to tell, from the
representation of one view, that of the other, which stands still: no gradient goes into it (sg, stop-gradient). There
are no negatives and there is no teacher; predictor and stop-gradient together keep the features from collapsing.

    D(p, z) = -cos(p, sg(z))                                                (paper, eqs. 1 and 3)
    loss = 2 + D(h1, x2) + D(h2, x1)        x: representations, h: what the predictor makes of them (twice eq. 4, + 2)

Departures
1. From the paper: the loss is 2 + twice the paper's, so that it goes from 2 (unrelated) to 0 (equal), as in the thesis.
2. From the paper: the predictor is as wide as the representation, as in the thesis, not a bottleneck of a quarter; the
   head has no BatchNorm at its end.
3. From the paper: Adam at a constant rate, as in the thesis, not SGD with a cosine; --cosine gives the schedule.
4. From the thesis: the pore model has rotary positions and drops no attention weights (see TransformerLayer), and two
   widths of the head that the thesis leaves open are chosen (see RepresentationHead).

    python simsiam.py --data reads/ --lr 3e-4 --batch-size 64
"""

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
from common.distributed import all_gather, average_gradients
from common.metrics import effective_rank, feature_spread
from common.pore_model import MaskedBatchNorm1d, PoreModel, RepresentationHead
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
    """chunks a step; there are no negatives, so small batches do"""
    lr: float = 3e-4
    """learning rate"""
    representation: int = 1024
    """R, dimensions of the representation and width of the predictor"""


# Predictor: equal in simsiam.py and byol.py
class Predictor(nn.Sequential):
    """Linear -> BatchNorm -> ReLU -> Linear, all R wide: the shape of the head's projection."""

    def __init__(self, representation):
        super().__init__(
            nn.Linear(representation, representation),
            MaskedBatchNorm1d(representation),  # nothing is masked, but it sees the batch of all processes
            nn.ReLU(),
            nn.Linear(representation, representation),
        )


# End of predictor


def simsiam_loss(x1, x2, h1, h2):
    """SimSiam's loss of representations x1, x2 (N, R) of two views and what the predictor makes of each, h1, h2 (N, R).

    2 - cosine1 - cosine2. It is 0 for equal views and for collapsed ones alike: feature spread and rank tell.
    """
    cosine1 = F.cosine_similarity(x1.detach().float(), h2.float()).mean()
    cosine2 = F.cosine_similarity(x2.detach().float(), h1.float()).mean()
    return 2 - cosine1 - cosine2, {"cosine1": cosine1, "cosine2": cosine2}


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
    pore_model, head, predictor = models.values()
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
            h1, h2 = predictor(r1), predictor(r2)
        r1, r2, h1, h2 = all_gather(r1, r2, h1, h2)
        loss, _ = simsiam_loss(r1, r2, h1, h2)
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
    predictor = Predictor(args.representation).to(device)
    optimizer = torch.optim.Adam([*pore_model.parameters(), *head.parameters(), *predictor.parameters()], fused=True)
    warn_if_slow(device, (pore_model, head), args.chunk_len, len(chunks), passes=2)

    run = Run(args, __file__)
    models = {
        "pore_model": pore_model,
        "head": head,
        "predictor": predictor,
    }
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
            r1, r2 = head(*pore_model(*view1)), head(*pore_model(*view2))  # x1, x2 (N, R)
            h1, h2 = predictor(r1), predictor(r2)  # (N, R)
        r1, r2, h1, h2 = all_gather(r1, r2, h1, h2)  # those of all processes
        loss, terms = simsiam_loss(r1, r2, h1, h2)
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
