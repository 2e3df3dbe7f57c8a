"""SimCLR on raw nanopore current.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
https://arxiv.org/abs/2002.05709

Two random views of each of N chunks (white noise, then randomly dropped samples) go through the pore model and a
projector. Each of the 2N embeddings has to find, among the 2N - 1 others of the batch, its positive: that of the other
view of the same chunk. All others are negatives, which keep the features from collapsing: the larger the batch, the
harder the task. No two chunks of a batch overlap. The projector is thrown away at the end.

    s_ij = cos(z_i, z_j)
    l(i, j) = -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) )     i, j: views of one chunk (paper, eq. 1)
    loss = mean of l over the 2N ordered pairs of views

Departures
1. From the thesis: its sum includes k = i, a constant exp(1 / tau) in the denominator. The loss could then not fall
   below ln 2, and would pull views together that already agree.
2. From the paper: Adam at a constant learning rate and batches of 32, as in the thesis, not LARS and 4096;
   --warmup-steps and --cosine give the paper's schedule.
3. From the paper: the views go through the model one after the other, so BatchNorm sees one view of each chunk.

    python simclr.py --data reads/ --lr 3e-5 --batch-size 32
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from common.args import BatchSize, ChunkLength, Probability, ProbabilityRange, parse_args
from common.augment import drop_points, noise, width_kept
from common.chunks import Chunks, open_data
from common.device import all_gather, autocast, average_gradients, evaluation, pick_device, seed_step
from common.metrics import effective_rank, feature_spread
from common.pore_model import ConvBlock, MaskedBatchNorm1d, PoreModel, frames_of, pad_frames
from common.run import LOG_EVERY, Run, say_cost, stop_if_not_finite


@dataclass
class Args:
    # Arguments of the method
    temperature: PositiveFloat = 0.1
    """tau; the lower, the more the most similar negatives count"""
    embedding_dim: PositiveInt = 256
    """R, dimensions of the embeddings"""
    batch_size: BatchSize = 32
    """chunks per step; each is compared with all others, so more chunks make the task harder"""
    lr: PositiveFloat = 3e-5
    """learning rate"""
    dropout: Probability = 0.1
    """of the pore model"""
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


def simclr_loss(z1, z2, temperature):
    """SimCLR's loss (NT-Xent) of the embeddings z1, z2 (N, R) of two views; row i of both is the same chunk.

    It is the sum of alignment (of positive pairs) and uniformity (of all views); top1 is the share of views whose most
    similar one is their positive.
    """
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2N, R)
    s = z @ z.T / temperature  # (2N, 2N)
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -math.inf)  # k != i
    positive = torch.arange(len(s), device=s.device).roll(len(z1))  # (2N,) the other view of the same chunk
    alignment = -s.gather(1, positive[:, None]).mean()
    uniformity = s.logsumexp(1).mean()
    top1 = (s.argmax(1) == positive).float().mean()
    return alignment + uniformity, {"alignment": alignment, "uniformity": uniformity, "top1": top1}


def view(batch, args):
    """A random view of each chunk, signal (N, L) and lengths (N,): white noise, then drop-points."""
    signal, lengths = noise(batch.signal, batch.lengths, args.noise_factor)
    return drop_points(signal, lengths, *args.drop_chance)


def embed(pore_model, projector, view):
    """Embeddings (N, R) of one view of each chunk."""
    context, frames = pore_model(*view)  # (N, T, C), (N,)
    return projector(context, frames)


def forward(models, batch, args):
    """Loss of a batch, its terms, and the embeddings of the first views: for training and validation."""
    pore_model, projector = models["pore_model"], models["projector"]
    view1, view2 = view(batch, args), view(batch, args)
    with autocast(batch.signal.device, args.precision):
        z1, z2 = embed(pore_model, projector, view1), embed(pore_model, projector, view2)  # (N, R)
    z1, z2 = all_gather(z1, z2)  # those of all processes
    loss, terms = simclr_loss(z1, z2, args.temperature)
    return loss, terms, z1


# Learning rate: equal in all methods
def learning_rate(step, args, total):
    """Of `step`: constant, or with a linear rise over --warmup-steps and a --cosine fall to 0 at step `total`."""
    rise = min(1, step / max(1, args.warmup_steps))
    fallen = max(0, step - args.warmup_steps) / max(1, total - args.warmup_steps)
    return args.lr * rise * (0.5 * (1 + math.cos(math.pi * fallen)) if args.cosine else 1)


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
    models = nn.ModuleDict({"pore_model": pore_model, "projector": projector}).to(device)
    optimizer = torch.optim.Adam(models.parameters(), fused=True)
    samples = width_kept(args.chunk_len, args.drop_chance[0])
    say_cost(pore_model, models, optimizer, chunks, args, samples, trained=2)
    if args.compile:
        pore_model.compile()

    # Run folder and resume: equal in all methods
    run = Run(args, __file__)
    parts = {"models": models, "optimizer": optimizer}
    first = run.resume(parts, last)

    for step in run.steps(first, last):
        seed_step(args.seed, step)  # of views and dropout, so that a resumed run draws what the whole run would have
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        loss, terms, embeddings = forward(models, batch, args)
        stop_if_not_finite(step, loss, terms, batch)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, total)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)  # over processes
        optimizer.step()

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
