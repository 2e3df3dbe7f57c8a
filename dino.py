"""DINO on raw nanopore current (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers"; 2021
thesis).

A student and a teacher (each a pore model and a head) turn two random views of each chunk into distributions over R
classes that nobody defined. The student has to say of one view what the teacher says of the other. The teacher follows
the student as a slow moving average. Two things work against each other and against collapse: centring keeps one class
from winning always, a low teacher temperature keeps the distribution from becoming uniform.

    P_s(x) = softmax(s(x) / tau_s)      P_t(x) = softmax((t(x) - c) / tau_t), no gradient        (paper, eq. 1)
    loss = 1/2 ( H(P_t(x1), P_s(x2)) + H(P_t(x2), P_s(x1)) )      H(a, b) = -sum_d a_d log b_d   (paper, eq. 3)
    c <- m_c c + (1 - m_c) mean of t over both views (eq. 4)      theta_t <- m_t theta_t + (1 - m_t) theta_s

Departures
1. From the thesis: the centre is no part of the teacher, which would average it a second time, and the loss is the sum
   over classes, not the mean.
2. From the thesis: the pore model has rotary positions and drops no attention weights (see TransformerLayer), and two
   widths of the head that the thesis leaves open are chosen (see RepresentationHead), as is R.
3. From the paper: two views of equal length, as in the thesis; no multi-crop.
4. From the paper: the head is the thesis's, without L2 bottleneck and weight-normalised last layer; m_t and tau_t are
   constant, as in the thesis.
5. From the paper: Adam at a constant rate, not AdamW; --warmup-steps and --cosine give a schedule.
6. The teacher's pore model has no dropout: the aim should not depend on chance. Its BatchNorm uses its own batch.

    python dino.py --data reads/ --lr 3e-5 --batch-size 32
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
    batch_size: int = 32
    """chunks a step"""
    lr: float = 3e-5
    """learning rate"""
    representation: int = 2048
    """R, classes of the distributions; the paper has 65536"""
    student_temperature: float = 0.1
    """tau_s; with 0.5, and 0.3 for the teacher, training starts near uniform outputs, loss ln R"""
    teacher_temperature: float = 0.06
    """tau_t, below tau_s, so that the teacher is the surer of the two; lower works against uniform outputs"""
    center_momentum: float = 0.9
    """m_c, how much of the centre stays at each step"""
    momentum: float = 0.999
    """m_t, how much of the teacher's weights stays at each step"""


class Center(nn.Module):
    """The running mean of the teacher's outputs, `value` (R,)."""

    def __init__(self, representation):
        super().__init__()
        self.register_buffer("value", torch.zeros(representation))

    @torch.no_grad()
    def update(self, t1, t2, momentum):
        """Moves it towards the mean of the outputs t1, t2 (N, R)."""
        self.value.lerp_(torch.cat([t1, t2]).float().mean(0), 1 - momentum)


def dino_loss(s1, s2, t1, t2, center, student_temperature, teacher_temperature):
    """DINO's loss of the student's outputs s1, s2 and the teacher's t1, t2 of two views, each (N, R), and center (R,).

    It is the sum of teacher_entropy and kl, the divergence of the student from the teacher. An entropy near ln R is a
    collapse, and so is one near 0 if it is the same class for all chunks, which the feature spread tells.
    """
    log1, log2 = (F.log_softmax(s.float() / student_temperature, dim=1) for s in (s1, s2))  # (N, R)
    p1, p2 = (F.softmax((t.detach().float() - center) / teacher_temperature, dim=1) for t in (t1, t2))  # (N, R)
    loss = -0.5 * ((p1 * log2).sum(1) + (p2 * log1).sum(1)).mean()
    entropy = 0.5 * (torch.special.entr(p1).sum(1) + torch.special.entr(p2).sum(1)).mean()
    return loss, {"teacher_entropy": entropy, "kl": loss - entropy}


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


@torch.no_grad()
def validate(args, models, chunks, device):
    """Mean loss over the validation chunks, as whole batches of views that are the same at every call."""
    pore_model, head, teacher_pore_model, teacher_head, center = models.values()
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
            t1, t2 = teacher_head(*teacher_pore_model(*view1)), teacher_head(*teacher_pore_model(*view2))
        r1, r2, t1, t2 = all_gather(r1, r2, t1, t2)
        loss, _ = dino_loss(r1, r2, t1, t2, center.value, args.student_temperature, args.teacher_temperature)
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
    teacher_pore_model = PoreModel.from_state_dict(pore_model.state_dict(), dropout=0.0).to(device)
    teacher_head = copy.deepcopy(head)
    center = Center(args.representation).to(device)
    optimizer = torch.optim.Adam([*pore_model.parameters(), *head.parameters()], fused=True)
    warn_if_slow(device, (pore_model, head), args.chunk_len, len(chunks), passes=8 / 3)

    run = Run(args, __file__)
    models = {
        "pore_model": pore_model,
        "head": head,
        "teacher_pore_model": teacher_pore_model,
        "teacher_head": teacher_head,
        "center": center,
    }
    # Resume: equal in all methods
    parts = models | {"optimizer": optimizer}
    first = run.resume(device, last, parts)["step"] if args.resume else 0
    # End of resume
    if args.compile:
        pore_model.compile(), teacher_pore_model.compile()

    for step in run.steps(first, last, args.batch_size):
        seed_step(args.seed, step)
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        view1, view2 = (
            view(batch.signal, batch.lengths, args.noise_factor, args.drop_chance, args.extra_augmentations)
            for _ in range(2)
        )
        with autocast(device, args.precision):
            r1, r2 = head(*pore_model(*view1)), head(*pore_model(*view2))  # s1, s2 (N, R)
            with torch.no_grad():
                t1, t2 = teacher_head(*teacher_pore_model(*view1)), teacher_head(*teacher_pore_model(*view2))  # (N, R)
        r1, r2, t1, t2 = all_gather(r1, r2, t1, t2)  # those of all processes
        loss, terms = dino_loss(r1, r2, t1, t2, center.value, args.student_temperature, args.teacher_temperature)
        stop_if_not_finite(step, loss, terms, batch.reads)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, total)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)
        optimizer.step()
        update_average(teacher_pore_model, pore_model, args.momentum)
        update_average(teacher_head, head, args.momentum)
        center.update(t1, t2, args.center_momentum)

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
