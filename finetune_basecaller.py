"""Fine-tune a pretrained pore model into a CTC basecaller, or train one from scratch: the baseline.

The pore model turns 8 samples into a frame; a linear head projects each frame to two time steps of five
log-probabilities (blank, A, C, G, T). R9.4 strands move at 8.8 samples per base and CTC needs a blank between equal
neighbours, so with one step per frame most chunks would be infeasible. The loss is CTC (Graves et al. 2006), per base:

    loss = mean over chunks of  -log p(reference | signal) / bases

with infeasible chunks, which have too many bases for their time steps, left out and counted (`infeasible`).

Against overfitting, chunks are run through at speeds that change, and half of them have events hidden as in masked.py:
CTC has to read those from their neighbours, as SpecAugment makes it do with speech (https://arxiv.org/abs/1904.08779).
What is validated and saved is an exponential moving average of the weights.

    python finetune_basecaller.py --data reads.hdf5 --size tiny --weights runs/RUN/pore_model.pt
    python finetune_basecaller.py --data reads.hdf5 --size tiny
"""

import copy
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from common import InputError
from common.args import Fraction, Probability, Share, parse_args
from common.augment import gain_offset, noise, time_warp
from common.chunks import Chunks, open_data
from common.ctc import ALPHABET, best_path, ctc_steps_needed, identity
from common.device import (
    all_gather,
    all_gather_lists,
    autocast,
    average_gradients,
    evaluation,
    pick_device,
    rank,
    seed_step,
)
from common.pore_model import HOP, PoreModel
from common.reads.chemistry import Chemistry, agreed, chemistries_of
from common.reads.kmers import shared_kmers
from common.run import LOG_EVERY, Run, say_cost, stop_if_not_finite
from masked import find_events, hide

STEPS_PER_FRAME = 2
VALIDATE_EVERY = 50  # steps, or each epoch where one is longer
LEAST_STEPS = 1000  # however few the labelled reads are, if neither --epochs nor --steps is given

# Used where an argument is not given. tiny: docs/results/studies.md; small: not searched; thesis: not tried, a guess.
RECIPES = {
    "thesis": {"chunk_len": 3600, "lr": 5e-4, "batch_size": 32, "epochs": 20, "dropout": 0.1},
    "small": {"chunk_len": 1200, "lr": 1e-3, "batch_size": 32, "epochs": 30, "dropout": 0.0},
    "tiny": {"chunk_len": 1200, "lr": 8e-3, "batch_size": 32, "epochs": 30, "dropout": 0.0},
}


@dataclass
class Args:
    data: tuple[Path, ...] = ()
    """labelled reads: mapped-signal HDF5, Bonito folders, read stores, or folders of them; simulated reads if none"""
    weights: Path | None = None
    """a pretrained pore_model.pt, or another basecaller.pt, to start from; from scratch if not given"""
    new_head: bool = False
    """take the pore model alone of another basecaller.pt, not its head"""
    size: Literal["thesis", "small", "tiny"] = "thesis"
    """size of the pore model, that of the weights; tiny trains on two cores"""
    encoder: Literal["wide", "thin"] = "wide"
    """its encoder, that of the weights; thin for those of cpc.py --encoder thin, and for their baseline"""
    label_fraction: Fraction = 1.0
    """train on this share of the labelled reads; an epoch shrinks with it"""
    shared_data: bool = False
    """pretraining was given the same --data: train on the one read in six that it left out"""
    tune: bool = False
    """validate on one in six of the training reads, which training leaves out: choices made by it have then not seen
    the validation reads"""
    chunk_len: PositiveInt | None = None
    """samples per chunk; by size if not given"""
    batch_size: PositiveInt | None = None
    """chunks per step; by size if not given"""
    lr: PositiveFloat | None = None
    """highest learning rate, after the warm-up; by size if not given"""
    pore_model_lr: PositiveFloat | None = None
    """another one for the pore model, --lr then being the head's"""
    warmup_steps: NonNegativeInt | None = None
    """steps over which the learning rate rises from 0, to fall as a cosine; 200 or a tenth of all if not given"""
    freeze_steps: NonNegativeInt = 0
    """train the head alone for this many steps first; the pore model's warm-up begins after them"""
    dropout: Probability | None = None
    """of the pore model; by size if not given"""
    gain_jitter: NonNegativeFloat = 0.05
    """each chunk is scaled by 1 + this * N(0, 1)"""
    offset_jitter: NonNegativeFloat = 0.05
    """and moved by this * N(0, 1)"""
    noise_jitter: NonNegativeFloat = 0.0
    """and given white noise of this standard deviation"""
    time_warp: NonNegativeFloat = 0.2
    """strength of local changes of speed: strands and runs differ in it, by 8.8 to 10.7 samples per base in the mean"""
    mask_chance: Share = 0.5
    """chance of a chunk to have events hidden, as masked.py does: their bases have to be told from those around them"""
    ema: Probability = 0.99
    """momentum of the average of the weights, which is what is validated and saved; 0 for the weights themselves"""
    epochs: PositiveInt | None = None
    """passes over the training reads; the cosine ends with them; by size, and 1000 steps at least, if not given"""
    steps: PositiveInt | None = None
    """this many steps rather than --epochs; the cosine ends with them"""
    max_steps: PositiveInt | None = None
    """stop early, after this many steps"""
    seed: NonNegativeInt = 0
    """of weights, order of the chunks, jitter, dropout and the choice of reads that --label-fraction takes"""
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
    chemistry: tyro.conf.Suppress[str] = ""  # of the training reads: no option, but a line of args.json


class Basecaller(nn.Module):
    """A pore model and a linear head of two time steps per frame."""

    chemistry = Chemistry()  # of the reads it was trained on

    def __init__(self, pore_model):
        super().__init__()
        self.pore_model = pore_model
        self.head = nn.Linear(pore_model.channels, STEPS_PER_FRAME * len(ALPHABET))

    @classmethod
    def from_state_dict(cls, state):
        """The basecaller that `state`, the content of basecaller.pt, holds. ValueError if it holds none."""
        try:
            model = cls(PoreModel.from_state_dict(state))
            model.load_state_dict({name: state[name] for name in state if name != "chemistry"})
            if "chemistry" in state:  # not in files of before
                model.chemistry = Chemistry(*json.loads(bytes(state["chemistry"].tolist())))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError("these are not a basecaller's weights") from error
        return model

    def to_file(self):
        """The content of basecaller.pt: the state dict, and the chemistry as JSON in bytes."""
        text = json.dumps(self.chemistry).encode()
        return self.state_dict() | {"chemistry": torch.tensor([*text], dtype=torch.uint8)}

    def forward(self, signal, lengths=None):
        """signal (N, L), lengths (N,) or None -> log-probabilities (N, 2 T, 5) in float32, their lengths (N,)."""
        context, lengths = self.pore_model(signal, lengths)
        scores = self.head(context).reshape(len(signal), -1, len(ALPHABET))
        return F.log_softmax(scores.float(), dim=-1), lengths * STEPS_PER_FRAME


def ctc_per_base(log_probs, lengths, targets, target_lengths):
    """CTC loss per base of each chunk, which chunks count, and which are infeasible, each (N,).

    log_probs (N, S, 5), lengths (N,), targets (N, B) of 1-4, target_lengths (N,). Chunks without bases, or with more
    than S steps can emit, do not count; their loss is 0.
    """
    if log_probs.device.type == "mps":  # which has no CTC
        log_probs, lengths, targets, target_lengths = (x.cpu() for x in (log_probs, lengths, targets, target_lengths))
    infeasible = ctc_steps_needed(targets, target_lengths) > lengths
    counts = ~infeasible & (target_lengths > 0)
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), targets, lengths, target_lengths, reduction="none", zero_infinity=True
    )  # (N,)
    return torch.where(counts, loss / target_lengths.clamp(min=1), 0.0), counts, infeasible


def ctc_loss(log_probs, lengths, targets, target_lengths):
    """The mean of ctc_per_base over the chunks that count, and {"infeasible": the share of those that cannot}."""
    per_base, counts, infeasible = ctc_per_base(log_probs, lengths, targets, target_lengths)
    per_base, counts, infeasible = all_gather(per_base, counts.float(), infeasible.float())
    return per_base.sum() / counts.sum().clamp(min=1), {"infeasible": infeasible.mean()}


def augment(batch, args):
    """The chunks (N, L) with jitter, at speeds that change, and in a random share of them with hidden events."""
    signal, _ = gain_offset(batch.signal, batch.lengths, args.gain_jitter, args.offset_jitter)
    signal, _ = noise(signal, batch.lengths, args.noise_jitter)
    signal, _ = time_warp(signal, batch.lengths, args.time_warp)
    masked, _ = hide(signal, find_events(signal), gap=2)
    return torch.where(torch.rand(len(signal), 1, device=signal.device) < args.mask_chance, masked, signal)


@torch.no_grad()
def update_average(average, model, momentum):
    """average <- momentum * average + (1 - momentum) * model, BatchNorm's running statistics included."""
    states = [list(x.state_dict().values()) for x in (average, model)]
    torch._foreach_lerp_(*([x for x in state if x.is_floating_point()] for state in states), 1 - momentum)
    torch._foreach_copy_(*([x for x in state if not x.is_floating_point()] for state in states))  # counts of batches


def learning_rate(step, warmup_steps, total):
    """Share of the highest learning rate at `step` of `total`: a linear rise, then a cosine to 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))


def identities_of(log_probs, targets, target_lengths):
    """Identity in percent of each chunk that has bases: log_probs (N, S, 5), targets (N, B), target_lengths (N,)."""
    identities = []
    for row, bases in enumerate(target_lengths.tolist()):
        if bases:
            reference = "".join(ALPHABET[base] for base in targets[row, :bases].tolist())
            identities.append(identity(best_path(log_probs[row])[0], reference))
    return identities


def validate(model, chunks, batch_size, device, precision):
    """Mean loss per base and identity over all validation chunks, as a dict of the logged metrics."""
    losses, infeasible, aligned = [], [], []
    with evaluation(model), ThreadPoolExecutor() as pool:  # which decodes and aligns while the model goes on
        for batch in chunks.tiles(batch_size):
            targets, target_lengths = batch.targets, batch.target_lengths
            batch = batch.to(device)
            with autocast(device, precision):
                log_probs, lengths = model(batch.signal)
            per_base, counts, beyond = ctc_per_base(log_probs, lengths, batch.targets, batch.target_lengths)
            losses += per_base[counts].tolist()
            infeasible += beyond.tolist()
            aligned.append(pool.submit(identities_of, log_probs.cpu(), targets, target_lengths))
            if len(aligned) > 32:  # no more wait
                aligned[-33].result()
    identities = [percent for batch in aligned for percent in batch.result()]
    losses, infeasible, identities = map(all_gather_lists, (losses, infeasible, identities))
    return {
        "validation/loss": float(np.mean(losses)) if losses else math.inf,
        "validation/infeasible": float(np.mean(infeasible)),
        "validation/identity_mean": float(np.mean(identities)),
        "validation/identity_median": float(np.median(identities)),
    }


@torch.no_grad()
def draw_calls(model, chunks, device, precision):
    """A picture of the first of `chunks`: its current, its bases and those called, at their places."""
    from common.reads.pictures import draw_read  # matplotlib takes long to import, and basecall.py needs none

    model.eval()
    signal = next(chunks.tiles(1)).signal
    with autocast(device, precision):
        log_probs, _ = model(signal.to(device))
    called, steps = best_path(log_probs[0].cpu())
    bases, starts = chunks.bases(chunks.read_of[0], 0)
    end = signal.shape[1]
    rows = {"reference": (bases, [*starts, end])} if any(starts) else {}  # Bonito's arrays have no places
    rows["called"] = [ALPHABET.index(base) for base in called], [*(HOP // STEPS_PER_FRAME * s for s in steps), end]
    return draw_read(signal[0], 0, rows)


class Best:
    """The lowest validation loss so far: a part of the checkpoint."""

    loss = math.inf

    def state_dict(self):
        return {"loss": self.loss}

    def load_state_dict(self, state):
        self.loss = float(state["loss"])


def load_weights(model, path, new_head):
    """Puts the weights at `path`, a pore model or a basecaller, into `model`, a Basecaller. InputError if neither.

    With new_head the head stays as it is.
    """
    state = model.pore_model.load_weights(path)
    if "head.weight" in state and not new_head:
        try:
            model.load_state_dict(Basecaller.from_state_dict(state).state_dict())
        except ValueError as error:
            raise InputError(f"--weights {path}: {error}") from error


def main(args):
    least = 0 if args.epochs else LEAST_STEPS
    for name, value in RECIPES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    pore_model = PoreModel.of_size(args.size, args.dropout, args.encoder, args.activation_checkpointing)
    model = Basecaller(pore_model).to(device)
    if args.weights and not args.resume:
        load_weights(model, args.weights, args.new_head)
    if args.tune and args.shared_data:
        raise InputError("--tune: validates on the one read in six that --shared-data trains on; leave one of them out")
    stores = open_data(args.data)
    share = "finetuning" if args.shared_data else "pretraining" if args.tune else None
    chunks = Chunks(stores, args.chunk_len, "training", True, share, args.label_fraction, args.seed)
    held_out = ("training", True, "finetuning") if args.tune else ("validation", True)
    validation = Chunks(stores, args.chunk_len, *held_out)
    model.chemistry = agreed(chemistry for chemistry, _ in chemistries_of(chunks.reads[np.unique(chunks.read_of)]))
    args.chemistry = str(model.chemistry)
    print(
        f"training: {chunks.number_of_reads} reads, {len(chunks)} chunks; "
        f"validation: {validation.number_of_reads} reads, {len(validation)} chunks"
    )
    if rank() == 0:
        held, _ = shared_kmers(validation.sequences(), chunks.sequences())
        if held > 0.5:
            print(
                f"training reads hold {held:.1%} of validation reads' 21-mers (same strand): "
                "identity is also a test of memory; test on reads of another genome, or of another part of it"
            )
    steps_per_epoch = chunks.steps_per_epoch(args.batch_size)
    total = args.steps = args.steps or max(least, args.epochs * steps_per_epoch)
    validate_every = steps_per_epoch * math.ceil(VALIDATE_EVERY / steps_per_epoch)
    last = min(total, args.max_steps or total)
    if args.warmup_steps is None:
        args.warmup_steps = min(200, total // 10)
    pore_model_lr = args.pore_model_lr or args.lr
    optimizer = torch.optim.AdamW(
        [
            {"params": model.head.parameters(), "lr": args.lr, "max_lr": args.lr},
            {"params": model.pore_model.parameters(), "lr": pore_model_lr, "max_lr": pore_model_lr},
        ],
        fused=True,
    )
    average = copy.deepcopy(model)
    models = nn.ModuleList([model, average])
    say_cost(pore_model, models, optimizer, chunks, args, args.chunk_len, trained=1)

    run = Run(args, __file__)
    best = Best()
    parts = {"model": model, "average": average, "optimizer": optimizer, "best": best}
    first = run.resume(parts, last)
    if args.compile:
        model.pore_model.compile()

    for step in run.steps(first, last):
        seed_step(args.seed, step)
        batch = chunks.batch(args.seed, step - 1, args.batch_size).to(device)
        signal = augment(batch, args)
        model.pore_model.requires_grad_(step > args.freeze_steps).train(step > args.freeze_steps)
        scale = learning_rate(step, args.warmup_steps, total)
        for group, frozen in zip(optimizer.param_groups, (0, args.freeze_steps), strict=True):  # each warms up
            group["lr"] = group["max_lr"] * min(scale, max(0, step - frozen) / max(1, args.warmup_steps))

        with autocast(device, args.precision):
            log_probs, lengths = model(signal)
        loss, terms = ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths)
        stop_if_not_finite(step, loss, terms, batch)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        update_average(average, model, min(args.ema, step / (step + 10)))  # soon rid of the weights it began with

        if step % LOG_EVERY == 0:
            run.log(step, loss=loss, **terms, lr=optimizer.param_groups[0]["lr"])
        if len(validation) and (step % validate_every == 0 or step == total):
            metrics = validate(average, validation, args.batch_size, device, args.precision)
            run.log(step, **metrics)
            if metrics["validation/loss"] < best.loss:
                best.loss = metrics["validation/loss"]
                run.save("basecaller.pt", average.to_file())
        if run.stop or run.checkpoint_due or step == last:
            run.checkpoint(step, parts)
        if run.stop:  # Ctrl-C or SIGTERM
            return run.stop

    if len(validation) and last % validate_every and last < total:  # --max-steps; --resume will cut this line off again
        run.log(last, **validate(average, validation, args.batch_size, device, args.precision))
    if best.loss == math.inf:  # there may be no validation
        run.save("basecaller.pt", average.to_file())
    run.save("basecaller_last.pt", average.to_file())
    if rank() == 0:  # which alone has the first chunk
        run.picture("calls", draw_calls(average, validation or chunks, device, args.precision))
    which = "of the last step" if best.loss == math.inf else "best by validation loss"
    print(f"basecaller, {which}: {run.folder / 'basecaller.pt'}")


if __name__ == "__main__":
    sys.exit(main(parse_args(Args)))
