"""How long a training step of each method takes, where its time goes, and how near it is to the pore model's own.

    python -m benchmark.speed             # a JSON line for each method, size and batch size
    python -m benchmark.speed --scale     # against batch, chunk length and size, with a picture

It runs the scripts themselves, on simulated reads, without validation, logs and checkpoints. A row has

step            seconds a training step, the median; chunks_per_second goes by it
parts           of that step: data, views, forward (with projectors), loss, backward, optimizer (with averages), and
                the rest, queue and centre included. On a GPU those of the same step once more, which waits for the
                device after each part
peak_memory     MB: of the tensors on a GPU, of the process on a CPU
bound           seconds of the pore model's passes alone: PlainPoreModel, forward and backward, on as many chunks, all
                as long as the views of this step on average. No padding, masks, views, head, loss or optimizer
bound_ratio     step / bound, the median of steps that have their bound timed right after them
padded          seconds of the step if the pore model is given no lengths, and so computes all columns; not for cpc
padded_ratio    and masked, which shorten nothing; step / padded, as above
flops           model FLOPs of a step
utilisation     flops / step, as a share of what a large matrix product reaches here in the same precision

Model FLOPs are two for each multiplication of a matrix product; a backward pass counts as two forward passes. A
forward pass of a chunk with T valid frames, C channels, F features of the feed-forward and R of the embedding:
2 K I O a position that a convolution of kernel K, from I to O channels, makes; 2 T (4 C^2 + 2 C F) + 4 T^2 C a layer;
14 T C^2 / 8 + 2 R (C / 8 frames / 4 + R) the projector; 4 R^2 a predictor; 2 P C (C + N) CPC's predictions and scores;
2 T C (C + 64) the head of masked events.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pydantic import PositiveInt
from torch import nn

from benchmark.memory import make_store
from common import InputError
from common.args import BatchSize, ChunkLength, parse_args
from common.chunks import Batch, Chunks
from common.device import autocast, pick_device
from common.pore_model import ENCODERS, HEAD_WIDTH, SIZES, PoreModel, frames_of

# passes of the pore model in a step: forward and backward, forward without gradient
PASSES = {"simclr": (2, 0), "moco": (1, 1), "simsiam": (2, 0), "byol": (2, 2), "dino": (2, 2), "barlow": (2, 0)}
PASSES |= {"cpc": (1, 0), "masked": (1, 0)}
BEFORE = 2  # steps that are not timed


@dataclass
class Args:
    methods: tuple[Literal[tuple(PASSES)], ...] = tuple(PASSES)
    """the scripts; with --scale the first"""
    sizes: tuple[Literal[tuple(SIZES)], ...] = ()
    """sizes of the pore model; if not given, thesis on a GPU, tiny and small without one"""
    batch_sizes: tuple[BatchSize, ...] = ()
    """chunks per step; if not given, 64 and, without --compile, the largest power of two that fits on a GPU, 32 without
    one"""
    chunk_len: ChunkLength = 3600
    """samples per chunk"""
    steps: PositiveInt = 5
    """timed steps per row"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to run"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """as in the scripts"""
    compile: tuple[bool, ...] = ()
    """with torch.compile, without, or both; if not given, False True on a GPU, False without one"""
    activation_checkpointing: bool = False
    """as in the scripts"""
    scale: bool = False
    """step time and memory against batch, chunk length and size; on a GPU until its memory ends"""
    picture: Path = Path("speed.png")
    """what --scale draws"""


class PlainLayer(nn.Module):
    """nn.TransformerEncoderLayer(norm_first=True), but for dropout of attention weights and between linear layers.

    Faster than torch's own without them, by a fifth on two CPU cores, so the bound is the lower one.
    """

    def __init__(self, channels, feed_forward, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.inputs, self.output = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        wide = nn.Linear(channels, feed_forward)
        self.feed_forward = nn.Sequential(wide, nn.GELU(), nn.Linear(feed_forward, channels))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        query, key, value = self.inputs(self.norm1(x)).unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.output(attended))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


def convolutions(channels):
    """(inputs, outputs, kernel, stride) of each convolution of the wide encoder."""
    widths = [1, *(channels >> i for i in reversed(range(4)))]
    return [(*width, *block) for width, block in zip(pairwise(widths), ENCODERS["wide"], strict=True)]


class PlainPoreModel(nn.Module):
    """The layers of the pore model in plain torch, and nothing else: no lengths, no masks, no positions."""

    def __init__(self, channels, layers, feed_forward, dropout=0.1):
        super().__init__()
        blocks = [
            (nn.Conv1d(*conv, padding=1, bias=False), nn.BatchNorm1d(conv[1]), nn.GELU())
            for conv in convolutions(channels)
        ]
        self.encoder = nn.Sequential(*(layer for block in blocks for layer in block))
        self.dropout = nn.Dropout(dropout)
        stack = [PlainLayer(channels, feed_forward, dropout) for _ in range(layers)]
        self.transformer = nn.Sequential(*stack, nn.LayerNorm(channels))

    def forward(self, signal, frames=None):
        """signal (N, L) -> context (N, T, C) of its frames, or of the first `frames` among themselves."""
        return self.transformer(self.dropout(self.encoder(signal[:, None]).transpose(1, 2)[:, :frames]))


def pore_model_flops(size, samples, frames):
    """Model FLOPs of the pore model's forward pass of a chunk, `frames` of which reach the transformer."""
    channels, layers, feed_forward = SIZES[size].values()
    flops = layers * (2 * frames * (4 * channels**2 + 2 * channels * feed_forward) + 4 * frames**2 * channels)
    for inputs, outputs, kernel, stride in convolutions(channels):
        samples = -(-samples // stride)
        flops += 2 * samples * kernel * inputs * outputs
    return flops


def step_flops(method, args, samples, frames):
    """Model FLOPs of a training step with views of `samples` samples."""
    channels, (trained, averaged) = SIZES[args.size]["channels"], PASSES[method]
    flops = pore_model_flops(args.size, samples, frames)
    if method == "cpc":
        return 3 * args.batch_size * (flops + 2 * args.future_steps * channels * (channels + args.batch_size))
    if method == "masked":
        return 3 * args.batch_size * (flops + 2 * frames * channels * (channels + 64))
    width, r = channels // 8, args.embedding_dim
    flops += 14 * frames * channels * width + 2 * r * (width * (frames_of(args.chunk_len) // 4) + r)
    predictor = 4 * r**2 if method in ("simsiam", "byol") else 0
    return args.batch_size * (3 * trained * (flops + predictor) + averaged * flops)


class Clock:
    """Seconds between start() and stop(), and those of its parts: of functions that `timed` made, of `with part`."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"

    def now(self, wait):
        if wait and self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, wait=False):
        """wait: for the GPU at the end of each part, too."""
        self.parts, self.wait, self.lengths, self.present = Counter(), wait, [], None
        self.since = self.now(wait=True)

    def stop(self):
        seconds = self.now(wait=True) - self.since
        self.parts["rest"] = seconds - self.parts.total()
        return seconds

    @contextlib.contextmanager
    def part(self, name, *others):
        before = self.now(self.wait)
        with contextlib.ExitStack() as stack:
            for other in others:
                stack.enter_context(other)
            yield
        self.parts[name] += self.now(self.wait) - before

    def timed(self, part, function):
        def call(*args, **settings):
            with self.part(part):
                result = function(*args, **settings)
            if isinstance(result, int):  # cpc's present frame
                self.present = result
            elif part == "views" and result[1].dim() == 1:  # lengths; those of events are of no views
                self.lengths.append(result[1])
            return result

        return call


class Done(Exception):
    """Ends a script's main when all steps are timed."""


def peak_memory(device, reset=False):
    """MB taken at most since the last reset; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError):
        if reset:
            return Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def measure(method, args, steps, padding=True):
    """The row of a method with these arguments of its script; one with out_of_memory if a GPU's is too small."""
    torch.compiler.reset()
    gc.collect()  # models and graphs of the row before
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    script, device = importlib.import_module(method), pick_device(args.device)
    plain, average = (PlainPoreModel(**SIZES[args.size], dropout=dropout).to(device) for dropout in (0.1, 0.0))
    if args.compile:
        for model in (plain, average):
            (model.encoder if method == "cpc" else model).compile()  # as the scripts do
    padding = padding and method not in ("cpc", "masked") and not args.compile
    whole_forward, clock, taken = PoreModel.forward, Clock(device), []

    def all_columns(model, signal, lengths):
        return whole_forward(model, F.pad(signal, (0, args.chunk_len - signal.shape[1])))

    def bound(signal, frames):
        clock.start()
        for _ in range(PASSES[method][0]):
            with autocast(device, args.precision):
                context = plain(signal, frames)
            context.backward(torch.ones_like(context))
        with autocast(device, args.precision), torch.no_grad():
            for _ in range(PASSES[method][1]):
                average(signal, frames)
        seconds = clock.stop()
        plain.zero_grad()
        return seconds

    def watched_steps(run, first, last):
        """Each step some times over, and its bound."""
        samples = None
        for step in range(1, BEFORE + steps + 1):
            row = {}
            peak_memory(device, reset=True)
            clock.start()
            yield step
            row["step"], row["peak_memory"] = clock.stop(), peak_memory(device)
            if clock.on_gpu:
                clock.start(wait=True)
                yield step
                clock.stop()
            row["parts"] = dict(clock.parts)
            if samples is None or not args.compile:  # the bound is compiled for one width
                samples = round(float(torch.cat(clock.lengths).float().mean()))
            frames = frames_of(samples) if clock.present is None else clock.present + 1
            row["flops"] = step_flops(method, args, samples, frames)
            row["bound"] = bound(torch.randn(args.batch_size, samples, device=device), frames)
            if padding:
                with patch.object(PoreModel, "forward", all_columns):
                    clock.start()
                    yield step
                    row["padded"] = clock.stop()
            taken.append(row)
        raise Done

    parts = [(Chunks, "batch", "data"), (Batch, "to", "data"), (script, "view", "views")]
    parts += [(script, name, "views") for name in ("random_present", "gain_offset", "find_events", "hide")]
    parts += [(script, f"{method}_loss", "loss")]
    parts += [(torch.Tensor, "backward", "backward"), (torch.optim.Adam, "zero_grad", "optimizer")]
    parts += [(torch.optim.Adam, "step", "optimizer"), (script, "update_average", "optimizer")]
    instead = {(at, name): clock.timed(part, getattr(at, name)) for at, name, part in parts if hasattr(at, name)}
    instead[script, "autocast"] = lambda *settings: clock.part("forward", autocast(*settings))
    instead[script.Run, "steps"], instead[script.Run, "log"] = watched_steps, lambda *_, **__: None
    instead[script, "validate"], instead[script, "say_cost"] = lambda *_: {}, lambda *_, **__: None
    instead[script, "LOG_EVERY"] = 10**9
    shown = ("size", "batch_size", "chunk_len", "compile", "activation_checkpointing")
    row = {"method": method} | {name: getattr(args, name) for name in shown}
    row["device"] = torch.cuda.get_device_name() if clock.on_gpu else f"cpu, {torch.get_num_threads()} threads"
    clock.start()  # for what is done before the first step
    try:
        with contextlib.ExitStack() as patches, contextlib.redirect_stdout(None):
            for (owner, name), other in instead.items():
                patches.enter_context(patch.object(owner, name, other))
            script.main(args)
    except Done:
        timed = sorted(taken[BEFORE:], key=lambda row: row["step"])
    except RuntimeError as error:  # close to the limit, libraries report it in words of their own
        if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "unable to find an engine")):
            raise
        return row | {"out_of_memory": True}
    row |= timed[(steps - 1) // 2]
    row["chunks_per_second"] = args.batch_size / row["step"]
    for name in ("bound", "padded")[: 1 + padding]:
        row[name] = statistics.median(step[name] for step in timed)
        row[f"{name}_ratio"] = statistics.median(step["step"] / step[name] for step in timed)
    return row


def matmul_flops(device, precision, width):
    """FLOPs a second of a product of two square matrices, the best of ten."""
    clock, seconds = Clock(device), []
    with autocast(device, precision):
        a = torch.randn(width, width, device=device)
        a = torch.mm(a, torch.eye(width, device=device))  # of the precision that products have
    for _ in range(10):
        clock.start()
        torch.mm(a, a)
        seconds.append(clock.stop())
    return 2 * width**3 / min(seconds), str(a.dtype).removeprefix("torch.")


def draw(axes, path):
    """Step time, its bound and peak memory of {axis: rows}; a line where memory ended."""
    figure = Figure(figsize=(4 * len(axes), 3.5), layout="constrained")
    for panel, (axis, rows) in zip(figure.subplots(1, len(axes)), axes.items(), strict=True):
        fit, memory = [row for row in rows if "step" in row], panel.twinx()
        for key, colour in (("step", "#0072B2"), ("bound", "#56B4E9")):
            panel.plot([str(row[axis]) for row in fit], [row[key] for row in fit], "o-", color=colour, label=key)
        memory.plot([str(row[axis]) for row in fit], [(row["peak_memory"] or 0) / 1000 for row in fit], "s--k")
        for row in rows[len(fit) :]:
            panel.axvline(str(row[axis]), color="#D55E00", label="out of memory")
        panel.set(xlabel=axis.replace("_", " "), ylabel="seconds a step", yscale="log")
        memory.set_ylabel("peak memory (GB, dashed)")
        memory.set_ylim(bottom=0)
        panel.legend()
    figure.savefig(path, dpi=130)


def main(args):
    device = pick_device(args.device)
    if device.type == "mps":
        raise InputError("--device auto: mps cannot be timed; give --device cpu")
    gpu = device.type == "cuda"
    ceiling, precision = matmul_flops(device, args.precision, 8192 if gpu else 2048)
    sizes = args.sizes or (("thesis",) if gpu else ("tiny", "small"))
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", 500)

        def row(method, shown=True, steps=args.steps, padding=True, **settings):
            settings = {"chunk_len": args.chunk_len, "device": args.device, "precision": args.precision} | settings
            run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
            settings |= {"data": (Path(folder) / "store",), "epochs": 10**9, "checkpoint_minutes": 1e9}
            settings["activation_checkpointing"] = args.activation_checkpointing
            steps *= 5 if method == "cpc" else 1  # whose time depends on the present frame, drawn anew each step
            row = measure(method, importlib.import_module(method).Args(run_dir=run_dir, **settings), steps, padding)
            row |= {"precision": precision, "matmul": ceiling}
            if "step" in row:
                row["utilisation"] = row["flops"] / row["step"] / ceiling
            if shown:
                short = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.4g}"))
                print(json.dumps(short), flush=True)
            return row

        if args.scale:
            usual = {"size": sizes[0], "batch_size": 64 if gpu else 8}
            axes = {"batch_size": [2**n for n in (range(4, 12) if gpu else range(2, 6))]}
            axes["chunk_len"] = [900 * 2**n for n in (range(1, 6) if gpu else range(4))]
            axes["size"] = list(reversed(SIZES)) if gpu else sizes
            for axis, values in axes.items():
                rows = []
                for value in values:
                    if not (rows and "out_of_memory" in rows[-1]):
                        rows.append(row(args.methods[0], padding=False, **usual | {axis: value}))
                axes[axis] = rows
            draw(axes, args.picture)
            return
        compiled = args.compile or ((False, True) if gpu else (False,))
        for size, compile, method in product(sizes, compiled, args.methods):
            same = {"size": size, "compile": compile}
            for batch_size in args.batch_sizes or (64 if gpu else 32,):
                row(method, batch_size=batch_size, **same)
            if gpu and not args.batch_sizes and not compile:  # each batch size would be compiled anew
                largest = 64
                while largest < 4096 and "step" in row(method, False, 1, False, batch_size=2 * largest, **same):
                    largest *= 2
                row(method, padding=False, batch_size=largest, **same)


if __name__ == "__main__":
    main(parse_args(Args))
