"""DINO on raw nanopore current.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", https://arxiv.org/abs/2104.14294

A student and a teacher, each a pore model and a projector, turn two random views of each chunk (white noise, then
randomly dropped samples) into distributions over K classes that nobody defined. The student has to predict from one
view the teacher's of the other. The teacher is an exponential moving average (EMA) of the student. Against a collapse,
centring keeps one class from winning always, and sharpening (a low teacher temperature) keeps the distribution from
becoming uniform. The projectors are thrown away at the end.

    P_s(x) = softmax(s(x) / tau_s)      P_t(x) = softmax((t(x) - c) / tau_t), no gradient        (paper, eq. 1)
    loss = 1/2 ( H(P_t(x1), P_s(x2)) + H(P_t(x2), P_s(x1)) )      H(a, b) = -sum_d a_d log b_d   (paper, eq. 3)
    c <- m_c c + (1 - m_c) mean of t over both views (eq. 4)      theta_t <- m_t theta_t + (1 - m_t) theta_s

Departures
1. From the thesis: the centre is not averaged a second time with the teacher; the loss is a sum over classes, no mean.
2. From the paper, as in the thesis: no multi-crop (docs/your_own_method.md adds it); a projector without L2 bottleneck
   and weight-normalised last layer; constant m_t and tau_t.
3. From the paper: Adam at a constant learning rate, not AdamW; --warmup-steps and --cosine give a schedule.
4. The teacher's pore model has no dropout: its output should not depend on chance. Its BatchNorm uses its own batch.

    python dino.py --data reads/ --lr 3e-5 --batch-size 32
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from common.args import BatchSize, ChunkLength, Probability, ProbabilityRange, Share, parse_args
from common.augment import drop_points, noise, width_kept
from common.chunks import Chunks, open_data
from common.device import all_gather, autocast, average_gradients, evaluation, pick_device, seed_step
from common.metrics import effective_rank, feature_spread
from common.pore_model import ConvBlock, MaskedBatchNorm1d, PoreModel, frames_of, pad_frames
from common.run import LOG_EVERY, Run, say_cost, stop_if_not_finite


@dataclass
class Args:
    # Arguments of the method
    student_temperature: PositiveFloat = 0.1
    """tau_s; with 0.5, and 0.3 for the teacher, training starts near uniform outputs, loss ln K"""
    teacher_temperature: PositiveFloat = 0.06
    """tau_t, below tau_s: sharpening; lower works against uniform outputs"""
    centre_momentum: Share = 0.9
    """m_c, how much of the centre stays at each step"""
    momentum: Share = 0.999
    """m_t, how much of the teacher's weights stays at each step"""
    embedding_dim: PositiveInt = 2048
    """K, classes of the distributions; the paper has 65536"""
    batch_size: BatchSize = 32
    """chunks per step"""
    lr: PositiveFloat = 3e-5
    """learning rate"""
    dropout: Probability = 0.1
    """of the student's pore model"""
    noise_factor: NonNegativeFloat = 0.25
    """standard deviation of the noise added to a view, in normalised units"""
    drop_chance: ProbabilityRange = (0.25, 0.38)
    """each view drops samples with a chance drawn between these two"""

    # Shared arguments: equal in all methods
    data: tuple[Path, ...] = ()
    """raw reads (POD5, FAST5, BLOW5, mapped-signal HDF5), read stores, or folders of them; simulated reads if none"""
    shared_data: bool = False
    """fine-tuning will be given the same --data: leave one read in six to it"""
    weights: Path | None = None
    """a pore_model.pt, or a basecaller.pt, to start from; from random weights if not given"""
    size: Literal["thesis", "small", "tiny"] = "thesis"
    """size of the pore model: 32 M, 3.3 M or 0.3 M parameters; tiny trains on two cores"""
    chunk_len: ChunkLength = 3600
    """samples per chunk"""
    epochs: PositiveInt = 50
    """passes over the training reads"""
    max_steps: PositiveInt | None = None
    """stop early, after this many steps"""
    warmup_steps: NonNegativeInt = 0
    """steps over which the learning rate rises from 0"""
    cosine: bool = False
    """let the learning rate fall to 0 as a cosine over all epochs"""
    seed: NonNegativeInt = 0
    """of weights, order of the chunks, views and dropout"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it; the loss is always float32"""
    compile: bool = False
    """torch.compile the pore model"""
    activation_checkpointing: bool = False
    """compute what is in each layer once more for the gradients, rather than keep it: less memory, longer steps"""
    run_dir: Path | None = None
    """the folder of this run; runs/<script>__<seed>__<time> if not given"""
    resume: Path | None = None
    """go on with this run from its last checkpoint; its arguments are the defaults"""
    checkpoint_minutes: NonNegativeFloat = 10
    """minutes between checkpoints; one more at the end, and on Ctrl-C and SIGTERM"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""


class Projector(nn.Module):
    """Context of a chunk (N, T, C) to its outputs (N, K): thesis figure 5.1, which leaves widths C / 8 and K open."""

    def __init__(self, channels, chunk_len, embedding_dim):
        super().__init__()
        self.frames = frames_of(chunk_len)
        self.conv = ConvBlock(channels, channels // 8, 7, 1, F.relu)
        self.mlp = nn.Sequential(
            nn.Linear(channels // 8 * (self.frames // 4), embedding_dim),
            MaskedBatchNorm1d(embedding_dim),
            nn.ReLU(),
            nn.Linear(embedding_dim, embedding_dim),
        )

    def forward(self, context, lengths):
        x = self.conv(context.transpose(1, 2), lengths)  # (N, C / 8, T)
        x = pad_frames(x, self.frames)  # views are shorter than the chunk, since they drop samples
        return self.mlp(F.max_pool1d(x, 4).flatten(1))


def dino_loss(student1, student2, teacher1, teacher2, centre, student_temperature, teacher_temperature):
    """DINO's loss of the outputs of student and teacher for two views, each (N, K), and the centre (K,).

    It is the sum of teacher_entropy and kl. An entropy near ln K is a collapse, and so is one near 0 if it is the same
    class for all chunks, which the feature spread tells.
    """
    log1, log2 = (F.log_softmax(s.float() / student_temperature, dim=1) for s in (student1, student2))  # (N, K)
    p1, p2 = (F.softmax((t.detach().float() - centre) / teacher_temperature, dim=1) for t in (teacher1, teacher2))
    loss = -0.5 * ((p1 * log2).sum(1) + (p2 * log1).sum(1)).mean()
    entropy = 0.5 * (torch.special.entr(p1).sum(1) + torch.special.entr(p2).sum(1)).mean()
    return loss, {"teacher_entropy": entropy, "kl": loss - entropy}


def view(batch, args):
    """A random view of each chunk, signal (N, L) and lengths (N,): white noise, then drop-points."""
    signal, lengths = noise(batch.signal, batch.lengths, args.noise_factor)
    return drop_points(signal, lengths, *args.drop_chance)


def embed(network, view):
    """Outputs (N, K) for one view of each chunk."""
    context, frames = network["pore_model"](*view)  # (N, T, C), (N,)
    return network["projector"](context, frames)


def forward(models, batch, args):
    """Loss of a batch, its terms, the student's outputs for the first views, the teacher's for both (2N, K)."""
    student, teacher = models["student"], models["teacher"]
    view1, view2 = view(batch, args), view(batch, args)
    with autocast(batch.signal.device, args.precision):
        student1, student2 = embed(student, view1), embed(student, view2)  # (N, K)
        with torch.no_grad():
            teacher1, teacher2 = embed(teacher, view1), embed(teacher, view2)  # (N, K)
    student1, student2, teacher1, teacher2 = all_gather(student1, student2, teacher1, teacher2)  # of all processes
    outputs = student1, student2, teacher1, teacher2
    loss, terms = dino_loss(*outputs, models.centre, args.student_temperature, args.teacher_temperature)
    return loss, terms, student1, torch.cat([teacher1, teacher2])


# Learning rate: equal in all methods
def learning_rate(step, args, total):
    """Of `step`: constant, or with a linear rise over --warmup-steps and a --cosine fall to 0 at step `total`."""
    rise = min(1, step / max(1, args.warmup_steps))
    fallen = max(0, step - args.warmup_steps) / max(1, total - args.warmup_steps)
    return args.lr * rise * (0.5 * (1 + math.cos(math.pi * fallen)) if args.cosine else 1)


@torch.no_grad()
def update_average(average, model, momentum):
    """average <- momentum * average + (1 - momentum) * model; but BatchNorm's running statistics stay its own."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - momentum)


def validate(models, chunks, args, device):
    """Means of the loss and its terms over whole batches of validation chunks, with the same views at every call."""
    batches = []
    with evaluation(models):
        for number, batch in enumerate(chunks.tiles(args.batch_size, equal=True)):
            seed_step(args.seed, number)
            loss, terms, *_ = forward(models, batch.to(device), args)
            batches.append({"loss": loss, **terms})
    return {f"validation/{name}": sum(float(terms[name]) for terms in batches) / len(batches) for name in batches[0]}


def main(args):
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    pore_model = PoreModel.of_size(args.size, args.dropout, checkpointing=args.activation_checkpointing)
    if args.weights and not args.resume:
        pore_model.load_weights(args.weights)
    stores = open_data(args.data)
    chunks = Chunks(stores, args.chunk_len, "training", share="pretraining" if args.shared_data else None)
    validation = Chunks(stores, args.chunk_len, "validation")
    steps_per_epoch = chunks.steps_per_epoch(args.batch_size)
    total = args.epochs * steps_per_epoch
    last = min(total, args.max_steps or total)

    projector = Projector(pore_model.channels, args.chunk_len, args.embedding_dim)
    teacher_pore_model = PoreModel.from_state_dict(pore_model.state_dict(), dropout=0.0)
    student = nn.ModuleDict({"pore_model": pore_model, "projector": projector})
    teacher = nn.ModuleDict({"pore_model": teacher_pore_model, "projector": copy.deepcopy(projector)})
    models = nn.ModuleDict({"student": student, "teacher": teacher}).to(device)
    models.register_buffer("centre", torch.zeros(args.embedding_dim, device=device))  # c
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    samples = width_kept(args.chunk_len, args.drop_chance[0])
    say_cost(pore_model, models, optimizer, chunks, args, samples, trained=2, averaged=2)
    if args.compile:
        pore_model.compile(), teacher_pore_model.compile()

    # Run folder and resume: equal in all methods
    run = Run(args, __file__)
    parts = {"models": models, "optimizer": optimizer}
    first = run.resume(parts, last)

    for step in run.steps(first, last):
        seed_step(args.seed, step)  # of views and dropout, so that a resumed run draws what the whole run would have
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        loss, terms, embeddings, teacher_outputs = forward(models, batch, args)
        stop_if_not_finite(step, loss, terms, batch)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, total)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)  # over processes
        optimizer.step()
        update_average(teacher, student, args.momentum)
        models.centre.lerp_(teacher_outputs.float().mean(0), 1 - args.centre_momentum)  # eq. 4

        # Log, validation, checkpoint and stop: equal in all methods
        if step % LOG_EVERY == 0:
            collapse = {"feature_spread": feature_spread(embeddings), "effective_rank": effective_rank(embeddings)}
            run.log(step, loss=loss, **terms, **collapse, lr=optimizer.param_groups[0]["lr"])
        if step % steps_per_epoch == 0 and len(validation):
            run.log(step, **validate(models, validation, args, device))
        if run.stop or run.checkpoint_due or step == last:
            run.checkpoint(step, parts)
        if run.stop:  # Ctrl-C or SIGTERM
            return run.stop

    if last % steps_per_epoch and len(validation):  # --max-steps within an epoch; --resume will cut this line off again
        run.log(last, **validate(models, validation, args, device))
    print(f"pretrained weights: {run.save('pore_model.pt', pore_model.state_dict())}")


if __name__ == "__main__":
    sys.exit(main(parse_args(Args)))
