"""CPC on raw nanopore current (van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding";
2021 thesis).

From the current up to a present frame, predict the frames to come: for each of the next P, tell the true one of this
chunk from those at the same place in the other chunks of the batch. The encoder makes the frames z; the transformer,
which sees the past alone, makes the context c of the present one.

    f_k(z_j, c_t) = z_j^T W_k c_t                                          (paper, eq. 3, as its logarithm)
    loss = -mean over k = 1..P and chunks of log( exp f_k(z_{t+k}, c_t) / sum_j exp f_k(z_j, c_t) )     (paper, eq. 4)

z_j: frame t + k of chunk j of the batch. The present frame t is random, one for the batch.

Departures
1. From the thesis: its eq. 4.3 sums over the contexts of other chunks as well. Here, as in the paper, each context
   chooses among frames.
2. From the thesis: the pore model has rotary positions and drops no attention weights (see TransformerLayer).
3. From the paper: a transformer makes the context, not a GRU, as in the thesis; the negatives are the frames at the
   same place in the other chunks.
4. From the paper: 35 or 7 future steps, as in the thesis, not 12, and BatchNorm in the encoder.
5. The thesis leaves the learning rate open; 2e-4 is the paper's.
6. In training BatchNorm's mean and variance are over all frames of the batch, the future's included. They are the same
   for all chunks, so they cannot tell one from another.

A frame of the wide encoder sees 31 samples, 15 of them after its first: up to three frames ahead share samples with the
present, and predicting those is easy. The thin encoder's frames share none.

    python cpc.py --data reads/ --batch-size 32
    python cpc.py --data reads/ --batch-size 32 --encoder thin
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from common import InputError
from common.augment import EXTRA, view
from common.data import Chunks, open_data
from common.distributed import all_gather, average_gradients, world_size
from common.metrics import effective_rank, feature_spread
from common.pore_model import PoreModel, frames_of
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

    # Method specific arguments, the first two with defaults of its own
    noise_factor: float = 0.0
    """standard deviation of noise added to the chunks, in normalised units; the thesis's CPC adds none"""
    drop_chance: tuple[float, float] = (0.0, 0.0)
    """drop samples with a chance drawn between these two; the thesis's CPC drops none"""
    batch_size: int = 32
    """chunks a step; each future frame is compared with those of all others"""
    lr: float = 2e-4
    """learning rate"""
    encoder: Literal["wide", "thin"] = "wide"
    """wide: frames of 31 samples that overlap; thin: frames of 8 that do not"""
    future_steps: int | None = None
    """P, frames to predict, 8 samples each; 35 with the wide encoder and 7 with the thin one if not given"""


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
    """Means of loss and accuracies over the validation chunks, with present frames that are the same at every call."""
    pore_model, prediction = models.values()
    pore_model.eval()
    sums, batches = {}, 0
    for number, batch in enumerate(chunks.tiles(args.batch_size, equal=True)):
        seed_step(args.seed, number)
        batch = batch.to(device)
        view1 = view(batch.signal, batch.lengths, args.noise_factor, args.drop_chance, args.extra_augmentations)
        t = random_present(view1.lengths, args.future_steps)
        with autocast(device, args.precision):
            z, c = future_and_context(pore_model, *view1, t, args.future_steps)
        z, c = all_gather(z, c)
        loss, terms = cpc_loss(z, c, prediction.W)
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.item()
        batches += 1
    pore_model.train()
    return {f"validation/{name}": value / batches for name, value in sums.items()}


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
    pore_model = PoreModel.of_size(args.size, encoder=args.encoder).to(device)
    if args.weights and not args.resume:
        pore_model.load_weights(args.weights)
    stores = open_data(args.data)
    share = "pretraining" if args.shared_data else None
    chunks = Chunks(stores, args.chunk_len, "training", share=share)
    validation = Chunks(stores, args.chunk_len, "validation")
    steps_per_epoch = chunks.steps_per_epoch(args.batch_size)
    if args.batch_size < 2:
        raise InputError("--batch-size 1: the loss needs at least 2 chunks")
    drop = args.drop_chance[1]
    shortest = args.chunk_len * (1 - drop) - 5 * math.sqrt(args.chunk_len * drop * (1 - drop))  # in all probability
    frames = frames_of(max(0, int(shortest)))
    if frames <= args.future_steps:
        raise InputError(
            f"--future-steps {args.future_steps}: chunks may have only {frames} frames; "
            "give fewer, a larger --chunk-len or a smaller --drop-chance"
        )
    total = args.epochs * steps_per_epoch
    last = min(total, args.max_steps or total)

    prediction = Prediction(args.future_steps, pore_model.channels).to(device)
    optimizer = torch.optim.Adam([*pore_model.parameters(), *prediction.parameters()], fused=True)
    warn_if_slow(device, (pore_model, nn.Identity()), args.chunk_len, len(chunks), passes=1)

    run = Run(args, __file__)
    models = {"pore_model": pore_model, "prediction": prediction}
    # Resume: equal in all methods
    parts = models | {"optimizer": optimizer}
    first = run.resume(device, last, parts)["step"] if args.resume else 0
    # End of resume
    if args.compile:
        pore_model.encoder.compile()  # not the transformer, whose context has another length at each step

    for step in run.steps(first, last, args.batch_size):
        seed_step(args.seed, step)
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        view1 = view(batch.signal, batch.lengths, args.noise_factor, args.drop_chance, args.extra_augmentations)
        t = random_present(view1.lengths, args.future_steps)
        with autocast(device, args.precision):
            z, r1 = future_and_context(pore_model, *view1, t, args.future_steps)  # (N, P, C), (N, C)
        z, r1 = all_gather(z, r1)  # those of all processes
        loss, terms = cpc_loss(z, r1, prediction.W)
        stop_if_not_finite(step, loss, {"accuracy": terms["accuracy"]}, batch.reads)

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
    metrics = validate(args, models, validation, device)
    if last % steps_per_epoch:  # stopped within an epoch; --resume will cut this line off again
        run.log(last, **metrics)
    chance = 1 / min(args.batch_size, len(validation) // world_size() * world_size())
    run.save("pore_model.pt", pore_model.state_dict())
    run.picture("accuracy", draw_accuracy(metrics, args.future_steps, chance))
    print(f"pretrained weights: {run.folder / 'pore_model.pt'}")


if __name__ == "__main__":
    main(parse_args(Args))
