"""SimSiam on raw nanopore current.

Chen & He 2021, "Exploring Simple Siamese Representation Learning", https://arxiv.org/abs/2011.10566

Two random views of each chunk (white noise, then randomly dropped samples) go through the pore model and a projector. A
small predictor has to predict, from the embedding of one view, that of the other, into which no gradient goes (sg,
stop-gradient). There are no negatives and no momentum encoder; predictor and stop-gradient together keep the features
from collapsing. Projector and predictor are thrown away at the end.

    D(p, z) = -cos(p, sg(z))                                                (paper, eqs. 1 and 3)
    loss = 2 + D(p1, z2) + D(p2, z1)        z: embeddings, p: predictions (twice eq. 4, + 2)

Departures
1. From the paper: the loss is 2 + twice the paper's, so that it goes from 2 (unrelated) to 0 (equal), as in the thesis.
2. From the paper: the predictor is as wide as the embedding, as in the thesis, not a bottleneck of a quarter; the
   projector has no BatchNorm at its end.
3. From the paper: Adam at a constant learning rate, as in the thesis, not SGD with a cosine; --cosine gives the
   schedule.

    python simsiam.py --data reads/ --lr 3e-4 --batch-size 64
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
    embedding_dim: PositiveInt = 1024
    """R, dimensions of the embeddings and width of the predictor"""
    batch_size: BatchSize = 64
    """chunks per step; there are no negatives, so small batches do"""
    lr: PositiveFloat = 3e-4
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


class Predictor(nn.Sequential):
    """Linear -> BatchNorm -> ReLU -> Linear, all R wide: the shape of the projector's MLP."""

    def __init__(self, embedding_dim):
        super().__init__(
            nn.Linear(embedding_dim, embedding_dim),
            MaskedBatchNorm1d(embedding_dim),  # nothing is masked, but it sees the batch of all processes
            nn.ReLU(),
            nn.Linear(embedding_dim, embedding_dim),
        )


def simsiam_loss(z1, z2, p1, p2):
    """SimSiam's loss of the embeddings z1, z2 (N, R) of two views and the predictions p1, p2 (N, R) made from each.

    2 - cosine1 - cosine2. It is 0 for equal views and for collapsed ones alike: feature spread and rank tell.
    """
    cosine1 = F.cosine_similarity(z1.detach().float(), p2.float()).mean()  # detach: stop-gradient
    cosine2 = F.cosine_similarity(z2.detach().float(), p1.float()).mean()
    return 2 - cosine1 - cosine2, {"cosine1": cosine1, "cosine2": cosine2}


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
    pore_model, projector, predictor = models["pore_model"], models["projector"], models["predictor"]
    view1, view2 = view(batch, args), view(batch, args)
    with autocast(batch.signal.device, args.precision):
        z1, z2 = embed(pore_model, projector, view1), embed(pore_model, projector, view2)  # (N, R)
        p1, p2 = predictor(z1), predictor(z2)  # (N, R)
    z1, z2, p1, p2 = all_gather(z1, z2, p1, p2)  # those of all processes
    loss, terms = simsiam_loss(z1, z2, p1, p2)
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
    predictor = Predictor(args.embedding_dim)
    models = {"pore_model": pore_model, "projector": projector, "predictor": predictor}
    models = nn.ModuleDict(models).to(device)
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
