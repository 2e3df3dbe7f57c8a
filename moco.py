"""MoCo on raw nanopore current.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", https://arxiv.org/abs/1911.05722

Of two random views of a chunk (noise, dropped samples), one becomes a query, the other its key, the positive. The query
has to find it among K negatives: the keys of past batches, kept in a queue, so that many negatives need no large batch.
Keys come from a second pore model and projector, an exponential moving average (EMA) of the first, so that those in the
queue stay comparable. Queries and keys have length 1. The projectors are thrown away at the end.

    loss = -log( exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_{i = 1..K} exp(q.k_i / tau)) )      (paper, eq. 1)
    theta_k <- m theta_k + (1 - m) theta_q                                                   (paper, eq. 2)

Departures
1. From the thesis, whose denominator is the queue alone, so that the loss can fall below 0: it holds the positive too.
2. From the paper: Adam at a constant learning rate, not SGD with steps; --warmup-steps and --cosine give a schedule.
3. From the paper: the thesis's queue and batch. BatchNorm can tell the positive, if not shuffled by --batchnorm-groups.
4. The key's pore model has no dropout: a key should not depend on chance. Its BatchNorm uses its own batch.

    python moco.py --data reads/ --lr 3e-5 --batch-size 32
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

from common import InputError
from common.args import BatchSize, ChunkLength, Probability, ProbabilityRange, Share, parse_args
from common.augment import drop_points, noise, width_kept
from common.chunks import Chunks, open_data
from common.device import all_gather, autocast, average_gradients, evaluation, pick_device, seed_step, world_size
from common.metrics import effective_rank, feature_spread
from common.pore_model import ConvBlock, MaskedBatchNorm1d, PoreModel, frames_of, pad_frames
from common.run import LOG_EVERY, Run, say_cost, stop_if_not_finite


@dataclass
class Args:
    # Arguments of the method
    queue: PositiveInt = 8192
    """K, keys that a query is compared with besides its own; the oldest are K / batch size steps old"""
    temperature: PositiveFloat = 0.1
    """tau; the paper has 0.07"""
    momentum: Share = 0.999
    """m, how much of the key's weights stays at each step; too low and the queue's keys no longer fit together"""
    batchnorm_groups: PositiveInt = 1
    """encode the batch in this many groups, shuffled for the keys, each with its own BatchNorm statistics; try 4"""
    embedding_dim: PositiveInt = 256
    """R, dimensions of the embeddings"""
    batch_size: BatchSize = 32
    """chunks per step; each step replaces as many keys of the queue"""
    lr: PositiveFloat = 3e-5
    """learning rate"""
    dropout: Probability = 0.1
    """of the query's pore model"""
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
    """Context of a chunk (N, T, C) to its embedding (N, R): thesis figure 5.1, which leaves widths C / 8 and R open."""

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


def moco_loss(q, k, queue, temperature):
    """MoCo's loss (InfoNCE) of queries q (N, R), their keys k (N, R) and the queue's keys (K, R), these of length 1.

    It is the sum of alignment and uniformity; top1 and top5: shares of queries whose positive is among the 1 and 5 most
    similar of all K + 1 keys.
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.detach().float(), dim=1)
    positive = (q * k).sum(1, keepdim=True)  # (N, 1)
    s = torch.cat([positive, q @ queue.detach().float().T], dim=1) / temperature  # (N, K + 1)
    alignment, uniformity = -s[:, 0].mean(), s.logsumexp(1).mean()
    better = (s[:, 1:] > s[:, :1] - 1e-4).sum(1)  # (N,) negatives more similar than the positive, or as similar
    top1, top5 = (better < 1).float().mean(), (better < 5).float().mean()
    return alignment + uniformity, {"alignment": alignment, "uniformity": uniformity, "top1": top1, "top5": top5}


def view(batch, args):
    """A random view of each chunk, signal (N, L) and lengths (N,): white noise, then drop-points."""
    signal, lengths = noise(batch.signal, batch.lengths, args.noise_factor)
    return drop_points(signal, lengths, *args.drop_chance)


def embed(network, view, groups, shuffle):
    """Embeddings (N, R) of one view of each chunk, in `groups` that share no BatchNorm statistics."""
    signal, lengths = view
    order = (torch.randperm if shuffle else torch.arange)(len(signal), device=signal.device)
    parts = []
    for rows in order.chunk(groups):
        context, frames = network["pore_model"](signal[rows], lengths[rows])  # (N / groups, T, C), (N / groups,)
        parts.append(network["projector"](context, frames))
    return torch.cat(parts)[order.argsort()]  # as they came


def forward(models, batch, args):
    """Loss of a batch against the queue as it is, its terms, the queries and the keys: for training and validation."""
    view1, view2 = view(batch, args), view(batch, args)
    with autocast(batch.signal.device, args.precision):
        q = embed(models["query"], view1, args.batchnorm_groups, shuffle=False)  # (N, R)
        with torch.no_grad():
            k = embed(models["key"], view2, args.batchnorm_groups, shuffle=True)  # (N, R)
    q, k = all_gather(q, k)  # those of all processes
    loss, terms = moco_loss(q, k, models.queue, args.temperature)
    return loss, terms, q, k


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
    if args.batch_size % (args.batchnorm_groups * world_size()) or args.batch_size < 2 * args.batchnorm_groups:
        raise InputError("--batchnorm-groups: should cut --batch-size into equal groups of 2 or more, on each process")

    projector = Projector(pore_model.channels, args.chunk_len, args.embedding_dim)
    key_pore_model = PoreModel.from_state_dict(pore_model.state_dict(), dropout=0.0)
    query = nn.ModuleDict({"pore_model": pore_model, "projector": projector})
    key = nn.ModuleDict({"pore_model": key_pore_model, "projector": copy.deepcopy(projector)})
    models = nn.ModuleDict({"query": query, "key": key}).to(device)
    models.register_buffer("queue", F.normalize(torch.randn(args.queue, args.embedding_dim), dim=1).to(device))
    optimizer = torch.optim.Adam(query.parameters(), fused=True)
    samples = width_kept(args.chunk_len, args.drop_chance[0])
    say_cost(pore_model, models, optimizer, chunks, args, samples, trained=1, averaged=1)
    if args.compile:
        pore_model.compile(), key_pore_model.compile()

    # Run folder and resume: equal in all methods
    run = Run(args, __file__)
    parts = {"models": models, "optimizer": optimizer}
    first = run.resume(parts, last)

    for step in run.steps(first, last):
        seed_step(args.seed, step)  # of views and dropout, so that a resumed run draws what the whole run would have
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        loss, terms, embeddings, k = forward(models, batch, args)
        stop_if_not_finite(step, loss, terms, batch)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, total)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)  # over processes
        optimizer.step()
        update_average(key, query, args.momentum)
        models.queue = torch.cat([models.queue, F.normalize(k.float(), dim=1)])[len(k) :]  # the oldest leave

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
