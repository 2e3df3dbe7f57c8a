"""Masked events on raw nanopore current: hide whole events, and predict their levels from the events around them.

A method of PoreSSL's own. Its relatives hide and predict words (BERT, https://arxiv.org/abs/1810.04805), spans of
speech (wav2vec 2.0, https://arxiv.org/abs/2006.11477; HuBERT, https://arxiv.org/abs/2106.07447) or patches of images
(masked autoencoders, https://arxiv.org/abs/2111.06377). While a k-mer is in the pore the current keeps its level: an
event. Each base takes part in some six events in a row, so those around a hidden one determine it: to predict its level
a model has to learn k-mers. No second view, no negatives, nothing to collapse. The head is thrown away at the end.

    t_i = |mean(x_i .. x_{i+3}) - mean(x_{i-4} .. x_{i-1})| / sqrt(2 v_i / 4)     v_i: pooled variance, 0.01 at least
    border before sample i: t_i > 2.7, and the largest of the five around it
    loss = -mean over hidden events of sum_b q_b log p_b(half-frame at its middle)   q: its bin of 32, smeared by 0.7

Bins have equal mass, so to know nothing costs 5 bits; `gained` is how many of them the model knows. `floor` is how many
the neighbours' levels tell, without bases: p(b | left, right) ~ p(b | left) p(right | b), counted on training reads.

Departures from the relatives
1. Whole events are hidden, and one sample more on each side. Spans of a fixed length would be wrong here: they begin
   and end within events, and that the level goes on is then most of what there is to learn.
2. Hidden events stand alone, with `gap` others at least between two, and become white noise.
3. The target is the level itself, in bins: no clusters, no codebook, no decoder.

    python masked.py --data reads/ --size tiny --chunk-len 1200 --warmup-steps 50 --cosine
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from common.args import BatchSize, ChunkLength, Probability, parse_args
from common.augment import gain_offset
from common.chunks import Chunks, open_data
from common.device import all_gather, autocast, average_gradients, evaluation, pick_device, seed_step, sum_over_ranks
from common.metrics import effective_rank, feature_spread
from common.pore_model import HOP, PoreModel
from common.run import LOG_EVERY, Run, say_cost, stop_if_not_finite

BINS = 32  # B
THRESHOLD = 2.7  # of the t-statistic at a border between two events


@dataclass
class Args:
    # Arguments of the method
    gap: PositiveInt = 2
    """events left as they are on each side of a hidden one; with fewer, more are hidden and the task is harder"""
    batch_size: BatchSize = 64
    """chunks per step; a chunk of 1200 samples has some 20 hidden events"""
    lr: PositiveFloat = 2e-3
    """learning rate; tried with the tiny model alone"""
    dropout: Probability = 0.0
    """of the pore model"""

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


class Events(NamedTuple):
    of_sample: torch.Tensor  # (N, L) int64, the event of each sample
    start: torch.Tensor  # (N, S), first samples; a chunk has fewer than S events, and the last ones are empty
    length: torch.Tensor  # (N, S), samples
    level: torch.Tensor  # (N, S), means


def find_events(signal):
    """Cuts signal (N, L) where the four samples before differ from the four from there on, by a t-statistic."""
    mean = F.avg_pool1d(signal[:, None], 4, 1)[:, 0]  # (N, L - 3), of the four samples from each on
    variance = F.avg_pool1d(signal.square()[:, None], 4, 1)[:, 0] - mean.square()
    pooled = (variance[:, :-4] + variance[:, 4:]) * 4 / 6
    t = (mean[:, 4:] - mean[:, :-4]).abs() / (pooled.clamp(min=0.01) * 2 / 4).sqrt()
    t = F.pad(t, (4, 3))  # (N, L), of a border before each sample
    border = (t > THRESHOLD) & (t == F.max_pool1d(t[:, None], 5, 1, 2)[:, 0])
    places = signal.shape[1] // 3 + 1  # borders are three samples apart, but for ties, one in 2000
    of_sample = border.long().cumsum(1).clamp(max=places - 1)
    empty = signal.new_zeros(len(signal), places)
    length = empty.scatter_add(1, of_sample, torch.ones_like(signal))
    level = empty.scatter_add(1, of_sample, signal) / length.clamp(min=1)
    return Events(of_sample, length.cumsum(1) - length, length, level)


def hide(signal, events, gap):
    """signal (N, L) with random events of 3 to 40 samples in white noise, and which they are, (N, S) bool."""
    number = torch.arange(events.length.shape[1], device=signal.device)
    may = (events.length >= 3) & (events.length <= 40) & (number > 0) & (number < events.of_sample[:, -1:])
    draw = torch.rand_like(events.level).masked_fill(~may, -1)
    hidden = may & (draw == F.max_pool1d(draw[:, None], 2 * gap + 1, 1, gap)[:, 0])
    noisy = F.max_pool1d(hidden.gather(1, events.of_sample).to(signal.dtype)[:, None], 3, 1, 1)[:, 0] > 0
    return torch.where(noisy, torch.randn_like(signal), signal), hidden


def count_levels(chunks, args):
    """Edges (B - 1,) of bins of equal mass, and log p(b | a before it) (B, B), of the first 2048 training chunks."""
    batches = [chunks.batch(args.seed, step, args.batch_size).signal for step in range(-(-2048 // args.batch_size))]
    events = find_events(*all_gather(torch.cat(batches)))
    there = events.length > 0
    levels = events.level[there].sort().values
    edges = levels[len(levels) * torch.arange(1, BINS) // BINS]
    bins = torch.bucketize(events.level, edges)
    pairs = (BINS * bins[:, :-1] + bins[:, 1:])[there[:, 1:]].bincount(minlength=BINS**2).view(BINS, BINS) + 1.0
    return edges, (pairs / pairs.sum(1, keepdim=True)).log()


def masked_loss(logits, bins, hidden, chain):
    """Loss of logits (N, S, B) for bins (N, S) of hidden events, and terms; chain (B, B): log p(b | a before it)."""
    log_p = logits.float().log_softmax(2)
    distance = torch.arange(BINS, device=bins.device) - bins[:, :, None]
    smeared = (-0.5 * (distance / 0.7) ** 2).softmax(2)  # q
    of_chain = (chain[bins.roll(1, 1)] + chain.T[bins.roll(-1, 1)]).log_softmax(2)  # (N, S, B), of both neighbours
    plain, floor = (-x.gather(2, bins[:, :, None])[:, :, 0] for x in (log_p, of_chain))
    near = (log_p.argmax(2) - bins).abs() <= 1
    in_bits = [math.log2(BINS) - x / math.log(2) for x in (plain, floor)]
    parts = [-(smeared * log_p).sum(2), plain, *in_bits, near, hidden]
    sums = sum_over_ranks(torch.stack([(part * hidden).sum() for part in parts]))  # over all processes
    loss, *terms = sums[:-1] / sums[-1].clamp(min=1)
    return loss, dict(zip(("cross_entropy", "gained", "floor", "within_a_bin"), terms, strict=True))


def forward(models, batch, args):
    """Loss of a batch, its terms, contexts of the middle frames, and what a picture shows: training and validation."""
    signal, _ = gain_offset(batch.signal, batch.lengths, 0.05, 0.05)
    events = find_events(signal)
    noisy, hidden = hide(signal, events, args.gap)
    with autocast(signal.device, args.precision):
        context, _ = models["pore_model"](noisy)  # (N, T, C)
        halves = models["head"](context).view(len(signal), -1, BINS)  # (N, 2 T, B): two predictions a frame
    middle = ((events.start + events.length / 2).long() // (HOP // 2)).clamp(max=halves.shape[1] - 1)  # (N, S)
    logits = halves.gather(1, middle[:, :, None].expand(-1, -1, BINS))  # (N, S, B)
    loss, terms = masked_loss(logits, torch.bucketize(events.level, models.edges), hidden, models.chain)
    counts = torch.stack([(hidden * events.length).sum(1) / signal.shape[1], (events.length > 0).sum(1)], dim=1)
    embeddings, counts = all_gather(context[:, context.shape[1] // 2], counts)
    terms |= dict(zip(("hidden_share", "events_per_chunk"), counts.mean(0), strict=True))
    return loss, terms, embeddings, (signal, events, hidden, logits)


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

    c = pore_model.channels
    head = nn.Sequential(nn.Linear(c, c), nn.GELU(), nn.LayerNorm(c), nn.Linear(c, 2 * BINS))
    models = nn.ModuleDict({"pore_model": pore_model, "head": head}).to(device)
    for name, value in zip(("edges", "chain"), count_levels(chunks, args), strict=True):
        models.register_buffer(name, value.to(device))
    optimizer = torch.optim.AdamW(models.parameters(), fused=True)
    say_cost(pore_model, models, optimizer, chunks, args, args.chunk_len, trained=1)
    if args.compile:
        pore_model.compile()

    # Run folder and resume: equal in all methods
    run = Run(args, __file__)
    parts = {"models": models, "optimizer": optimizer}
    first = run.resume(parts, last)

    for step in run.steps(first, last):
        seed_step(args.seed, step)  # of views and dropout, so that a resumed run draws what the whole run would have
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        loss, terms, embeddings, _ = forward(models, batch, args)
        stop_if_not_finite(step, loss, terms, batch)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, total)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)  # over processes
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
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

    from common.reads.pictures import draw_events  # here, since matplotlib takes long to import

    with evaluation(models):
        *_, seen = forward(models, next((validation or chunks).tiles(args.batch_size, equal=True)).to(device), args)
    run.picture("events", draw_events(*seen, models.edges))


if __name__ == "__main__":
    sys.exit(main(parse_args(Args)))
