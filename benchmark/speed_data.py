"""Is the data fast enough for the model? One line of JSON for each of preparing, batches, fine-tuning and basecalling.

    python -m benchmark.speed_data --raw reads.pod5 --labelled mapped.hdf5

A sample counts as the two bytes that it takes in memory, in raw data and in the read store. Times are the best of
three, since other processes may run beside; fine-tuning's are of the median epoch. Files are read from the system's
memory: how fast a disk is, is not told.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
from pydantic import Field, PositiveInt
from tqdm import tqdm

import basecall
import finetune_basecaller
from common.args import parse_args
from common.chunks import Chunks
from common.device import pick_device
from common.pore_model import load_tensors
from common.reads.store import prepare

STEPS = 300  # batches that are timed


@dataclass
class Args:
    raw: tuple[Path, ...]
    """raw reads, to be prepared and basecalled"""
    labelled: Path
    """labelled reads, for fine-tuning"""
    epochs: Annotated[int, Field(ge=2)] = 3  # what lies between two validations is timed
    """of fine-tuning at --size tiny; the basecaller that comes out calls the raw reads"""
    reads: PositiveInt = 20
    """how many of the raw reads are called"""
    chunk_len: PositiveInt = 3600
    """samples per chunk, of the batches"""
    batch_size: PositiveInt = 64
    """chunks per batch, of the batches"""


def row(what, **figures):
    print(json.dumps({"what": what} | {name: float(f"{x:.4g}") for name, x in figures.items()}), flush=True)


def seconds(function):
    since = time.perf_counter()
    function()
    return time.perf_counter() - since


def measure_preparing(args, folder):
    """The read stores of the raw and of the labelled reads."""
    numbers = itertools.count()
    took = min(seconds(lambda: prepare(args.raw, folder / f"raw-{next(numbers)}")) for _ in range(3))
    store = prepare(args.raw, folder / "raw")
    signal = 2 * store.info["samples_read"] / 1e6
    files = sum(file.stat().st_size for path in args.raw for file in basecall.raw_files(path)) / 1e6
    row("preparing", seconds=took, signal_mb=signal, signal_mb_a_second=signal / took, file_mb_a_second=files / took)
    return store, prepare([args.labelled], folder / "labelled")


def measure_batches(what, store, args, labelled):
    chunks = Chunks([store], args.chunk_len, "training", labelled)
    batch_size = min(args.batch_size, len(chunks))
    took = min(seconds(lambda: [chunks.batch(0, step, batch_size) for step in range(STEPS)]) for _ in range(3))
    speed = STEPS * batch_size / took
    row(what, chunks_a_second=speed, signal_mb_a_second=2 * speed * args.chunk_len / 1e6)


def measure_fine_tuning(store, args, folder):
    """Weights of the basecaller that was trained."""
    spans, validate = [], finetune_basecaller.validate

    def timed(*settings):
        since = time.perf_counter()
        metrics = validate(*settings)
        spans.append((since, time.perf_counter()))
        return metrics

    settings = finetune_basecaller.Args(data=(store.path,), size="tiny", epochs=args.epochs, run_dir=folder / "run")
    each_epoch = patch.object(finetune_basecaller, "VALIDATE_EVERY", 1)  # short as it may be
    with each_epoch, patch.object(finetune_basecaller, "validate", timed):
        finetune_basecaller.main(settings)
    trained = statistics.median(since - before for (_, before), (since, _) in itertools.pairwise(spans))
    validation = statistics.median(end - since for since, end in spans)
    row("fine-tuning, an epoch", training=trained, validation=validation, share=validation / (trained + validation))
    return folder / "run" / "basecaller_last.pt"


@torch.no_grad()
def measure_basecalling(weights, args, folder):
    device = pick_device("auto")
    model = basecall.Basecaller.from_state_dict(load_tensors(weights)).to(device).eval()
    settings = basecall.Args(weights, args.raw, folder / "calls.fastq")
    model.pore_model.window = basecall.trained_chunk_len(weights.parent / "args.json") // 2 // basecall.HOP
    inputs, samples = [], []

    def call():
        inputs.clear(), samples.clear()
        files = {file: True for path in args.raw for file in basecall.raw_files(path)}
        reads = itertools.islice(basecall.usable_reads(files, Counter(), Counter(), tqdm(disable=True)), args.reads)
        with basecall.writer(settings.out) as write:
            for one in basecall.basecalls(model, reads, settings, device):
                write(one)
                samples.append(one.samples)

    def forward():
        for given in inputs:
            with basecall.autocast(device, settings.precision):
                log_probs, _ = model(*given)
        log_probs.cpu()

    took, bare = [], []
    for _ in range(3):  # in turn
        hook = model.register_forward_pre_hook(lambda _, given: inputs.append(given))
        took.append(seconds(call))
        hook.remove()
        bare.append(seconds(forward))
    total = sum(samples)
    row("basecalling", samples_a_second=total / min(took), forward_alone=total / min(bare), ratio=min(took) / min(bare))


def main(args):
    with tempfile.TemporaryDirectory(dir=".") as folder:
        raw, labelled = measure_preparing(args, Path(folder))
        measure_batches("batches", raw, args, labelled=False)
        measure_batches("batches, labelled", labelled, args, labelled=True)
        weights = measure_fine_tuning(labelled, args, Path(folder))
        measure_basecalling(weights, args, Path(folder))


if __name__ == "__main__":
    main(parse_args(Args))
