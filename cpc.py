"""CPC on raw nanopore current.

van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", https://arxiv.org/abs/1807.03748

From the current up to a present frame, predict the frames to come: for each of the next P, tell the true one of this
chunk, the positive, from the negatives, those at the same place in the other chunks of the batch. The encoder makes the
frames z; the transformer, which sees the past alone, makes the context c of the present one. No two chunks of a batch
overlap. The matrices W are thrown away at the end.

    f_k(z_j, c_t) = z_j^T W_k c_t                                          (paper, eq. 3, as its logarithm)
    loss = -mean over k = 1..P and chunks of log( exp f_k(z_{t+k}, c_t) / sum_j exp f_k(z_j, c_t) )     (paper, eq. 4)

z_j: frame t + k of chunk j of the batch. The present frame t is random, one for the batch.

Departures
1. From the thesis: its eq. 4.3 sums over the contexts of other chunks as well. Here, as in the paper, each context
   chooses among frames. It leaves the learning rate open; 2e-4 is the paper's.
2. From the paper: a transformer makes the context, not a GRU; 35 or 7 future steps, not 12; both as in the thesis. The
   negatives are the frames at the same place in the other chunks, and the encoder has BatchNorm.
3. In training BatchNorm's mean and variance are over all frames of the batch, the future's included. They are the same
   for all chunks, so they cannot tell one from another.

A frame of the wide encoder sees 31 samples, 15 of them after its first: up to three frames ahead share samples with the
present, and predicting those is easy. The thin encoder's frames share none.

    python cpc.py --data reads/ --batch-size 32
    python cpc.py --data reads/ --batch-size 32 --encoder thin
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from common import InputError
from common.args import BatchSize, ChunkLength, Probability, ProbabilityRange, parse_args
from common.augment import drop_points, noise
from common.chunks import Chunks, open_data
from common.device import all_gather, autocast, average_gradients, evaluation, pick_device, seed_step, world_size
from common.metrics import effective_rank, feature_spread
from common.pore_model import PoreModel, frames_of
from common.run import LOG_EVERY, Run, say_cost, stop_if_not_finite


@dataclass
class Args:
    # Arguments of the method
    encoder: Literal["wide", "thin"] = "wide"
    """wide: frames of 31 samples that overlap; thin: frames of 8 that do not"""
    future_steps: PositiveInt | None = None
    """P, frames to predict, 8 samples each; 35 with the wide encoder and 7 with the thin one if not given"""
    batch_size: BatchSize = 32
    """chunks per step; each future frame is compared with those of all others"""
    lr: PositiveFloat = 2e-4
    """learning rate"""
    dropout: Probability = 0.1
    """of the pore model"""
    noise_factor: NonNegativeFloat = 0.0
    """standard deviation of noise added to the chunks, in normalised units; the thesis's CPC adds none"""
    drop_chance: ProbabilityRange = (0.0, 0.0)
    """drop samples with a chance drawn between these two; the thesis's CPC drops none"""

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


class Prediction(nn.Module):
    """The P matrices that predict frames from the context, `W` (P, C, C)."""

    def __init__(self, steps, channels):
        super().__init__()
        self.W = nn.Parameter(torch.randn(steps, channels, channels) / channels)  # so small that all start about equal


def random_present(lengths, steps):
    """A random frame t, one for all chunks of `lengths` (N,) samples, that has `steps` frames after it in each."""
    (lengths,) = all_gather(lengths)
    (t,) = all_gather(torch.randint(int(frames_of(lengths.min())) - steps, (1,)))
    return int(t[0])  # that of rank 0


def future_and_context(pore_model, signal, lengths, t, steps):
    """The `steps` frames z (N, P, C) after frame t, and the context c (N, C) of the frames up to t."""
    frames, _ = pore_model.encoder(signal, lengths)  # (N, T, C)
    return frames[:, t + 1 : t + 1 + steps], pore_model.contextualise(frames[:, : t + 1])[:, -1]


def cpc_loss(z, c, W):
    """CPC's loss (InfoNCE) of the true future frames z (N, P, C), contexts c (N, C) and matrices W (P, C, C).

    accuracy/k is the share of chunks whose frame k is told from those of the other chunks, accuracy their mean; 1 / N
    by chance.
    """
    prediction = c.float() @ W.float().transpose(1, 2)  # (P, N, C)
    scores = prediction @ z.float().permute(1, 2, 0)  # (P, N, N): [k, i, j] of context i and frame k of chunk j
    right = torch.arange(len(c), device=c.device).expand(len(W), -1)  # (P, N)
    loss = F.cross_entropy(scores.flatten(0, 1), right.flatten())
    accuracy = (scores.argmax(2) == right).float().mean(1)  # (P,)
    return loss, {"accuracy": accuracy.mean()} | {f"accuracy/{k}": a for k, a in enumerate(accuracy, 1)}


def view(batch, args):
    """A random view of each chunk, signal (N, L) and lengths (N,): white noise, then drop-points."""
    signal, lengths = noise(batch.signal, batch.lengths, args.noise_factor)
    return drop_points(signal, lengths, *args.drop_chance)


def forward(models, batch, args):
    """Loss of a batch, its terms, and the contexts of the present frame: for training and validation."""
    signal, lengths = view(batch, args)
    t = random_present(lengths, args.future_steps)
    with autocast(batch.signal.device, args.precision):
        z, c = future_and_context(models["pore_model"], signal, lengths, t, args.future_steps)  # (N, P, C), (N, C)
    z, c = all_gather(z, c)  # those of all processes
    loss, terms = cpc_loss(z, c, models["prediction"].W)
    return loss, terms, c


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


def draw_accuracy(metrics, steps, chance):
    """A bar for each future step: how often its frame was told from the others (thesis, figures 4.2 and 4.3)."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(1, steps + 1), [100 * metrics[f"validation/accuracy/{k}"] for k in range(1, steps + 1)])
    axes.axhline(100 * chance, color="black", linestyle="--", label=f"chance: {100 * chance:.1f} %")
    axes.set(xlabel="future step (frames of 8 samples)", ylabel="validation accuracy (%)", ylim=(0, 100))
    axes.legend()
    return figure


def main(args):
    if args.future_steps is None:
        args.future_steps = 35 if args.encoder == "wide" else 7
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    pore_model = PoreModel.of_size(args.size, args.dropout, args.encoder, args.activation_checkpointing)
    if args.weights and not args.resume:
        pore_model.load_weights(args.weights)
    stores = open_data(args.data)
    chunks = Chunks(stores, args.chunk_len, "training", share="pretraining" if args.shared_data else None)
    validation = Chunks(stores, args.chunk_len, "validation")
    steps_per_epoch = chunks.steps_per_epoch(args.batch_size)
    total = args.epochs * steps_per_epoch
    last = min(total, args.max_steps or total)
    drop = args.drop_chance[1]
    shortest = args.chunk_len * (1 - drop) - 5 * math.sqrt(args.chunk_len * drop * (1 - drop))  # in all probability
    frames = frames_of(max(0, int(shortest)))
    if frames <= args.future_steps:
        raise InputError(
            f"--future-steps {args.future_steps}: chunks may have only {frames} frames; "
            "give fewer, a larger --chunk-len or a smaller --drop-chance"
        )

    prediction = Prediction(args.future_steps, pore_model.channels)
    models = nn.ModuleDict({"pore_model": pore_model, "prediction": prediction}).to(device)
    optimizer = torch.optim.Adam(models.parameters(), fused=True)
    say_cost(pore_model, models, optimizer, chunks, args, int(shortest), trained=1)  # of which few take more
    if args.compile:
        pore_model.encoder.compile()  # not the transformer, whose context has another length at each step

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

    print(f"pretrained weights: {run.save('pore_model.pt', pore_model.state_dict())}")
    if len(validation):
        metrics = validate(models, validation, args, device)
        if last % steps_per_epoch:  # --max-steps within an epoch; --resume will cut this line off again
            run.log(last, **metrics)
        chance = 1 / min(args.batch_size, len(validation) // world_size() * world_size())
        run.picture("accuracy", draw_accuracy(metrics, args.future_steps, chance))


if __name__ == "__main__":
    sys.exit(main(parse_args(Args)))
