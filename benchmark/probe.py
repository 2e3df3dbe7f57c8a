"""How much a pore model knows of bases, before any fine-tuning: a linear probe on its frozen frames.

    python -m benchmark.probe runs/*/pore_model.pt --data labelled.hdf5

For each file, and for random weights of the same size: the share (%) of frames of which least squares on the context
tells the base before, at and after the frame's centre, trained on few and on many labelled chunks of 1200 samples, and
tested on chunks of the validation reads. The commonest base alone is right in 25 to 30 %. A random transformer blurs
what a random encoder keeps: the encoder's frames alone are the better baseline, and have a row, too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from tyro.conf import Positional

from common import InputError
from common.args import ChunkLength, parse_args
from common.chunks import Chunks, open_data
from common.pore_model import HOP, PoreModel, load_tensors

RIDGE = 0.01  # of ridge regression on standardised features, for each frame


@dataclass
class Args:
    weights: Positional[tuple[Path, ...]]
    """pore_model.pt or basecaller.pt of any size"""
    data: tuple[Path, ...] = ()
    """labelled reads; simulated reads if none"""
    few: PositiveInt = 20
    """labelled chunks"""
    many: PositiveInt = 300
    """labelled chunks; as many are tested on, if there are so many"""
    chunk_len: ChunkLength = 1200
    """samples per chunk"""
    by_layer: bool = False
    """a row after each layer of the transformer; layer 0 is the encoder alone"""


def bases_of_frames(chunks, read, start):
    """The base (0-3) before, at and after the centre of each frame of a chunk, (T, 3); -1 where it is not known."""
    bases, starts = chunks.bases(read, start)
    if len(starts) > 1 and not starts.any():
        raise InputError("--data: these labels have no places in the signal (Bonito's arrays); give mapped signal")
    frames = chunks.chunk_len // HOP
    base = np.searchsorted(starts, HOP * np.arange(frames) + HOP // 2, "right") - 1  # the one at the centre
    padded = np.concatenate([[0, 0], bases, [0, 0]]).astype(np.int64) - 1
    found = np.stack([padded[base + 2 + other] for other in (-1, 0, 1)], axis=1)
    found[base < 0] = -1
    return torch.from_numpy(found)


def examples(chunks, count):
    """`count` random chunks, signal (count, L), and the bases of their frames (count, T, 3)."""
    count = min(count, len(chunks))
    reads, starts = chunks.places(0, 0, count)
    bases = [bases_of_frames(chunks, read, start) for read, start in zip(reads, starts, strict=True)]
    return chunks.batch(0, 0, count).signal, torch.stack(bases)


@torch.no_grad()
def features_of(pore_model, signal):
    """Context (N, T, C) of whole frames, in float64."""
    frames = signal.shape[1] // HOP
    return torch.cat([pore_model(part)[0][:, :frames] for part in signal.split(64)]).double()


def accuracies(features, bases, test_features, test_bases):
    """Percent of test frames told right, of the base before, at and after the centre: ridge regression on one-hots."""
    mean, std = features.mean((0, 1)), features.std((0, 1)) + 1e-6
    x, test = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (features, test_features))
    found = []
    for place in range(3):
        known, known_test = bases[..., place] >= 0, test_bases[..., place] >= 0
        a, b = x[known], F.one_hot(bases[..., place][known], 4).double()
        ridge = RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        told = (test[known_test] @ torch.linalg.solve(a.T @ a + ridge, a.T @ b)).argmax(1)
        found.append(100 * told.eq(test_bases[..., place][known_test]).double().mean().item())
    return found


def probe(pore_model, args, training, test):
    """A row of the table: accuracies of few and of many labelled chunks."""
    (signal, bases), (test_signal, test_bases) = training, test
    pore_model.eval()
    features, test_features = features_of(pore_model, signal), features_of(pore_model, test_signal)
    few = accuracies(features[: args.few], bases[: args.few], test_features, test_bases)
    return [few, accuracies(features, bases, test_features, test_bases)]


def main(args):
    stores = open_data(args.data)
    training = examples(Chunks(stores, args.chunk_len, "training", labelled=True), args.many)
    held_out = Chunks(stores, args.chunk_len, "validation", labelled=True)
    if not len(held_out):
        raise InputError("--data: no labelled validation read to test on; give more reads")
    test = examples(held_out, args.many)
    models, sizes = [], set()
    for path in args.weights:
        try:
            models.append((str(path), PoreModel.from_state_dict(load_tensors(path), dropout=0.0)))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
    print(f"| base before / at / after, % | {args.few} labelled chunks | {len(training[0])} labelled chunks |")
    print("|---|---|---|")
    for name, model in models:
        shape = model.channels, len(model.layers), model.layers[0].feed_forward[0].out_features, model.encoder.kind
        if shape not in sizes:
            sizes.add(shape)
            torch.manual_seed(0)
            random = PoreModel(*shape[:3], dropout=0.0, encoder=shape[3])
            with torch.no_grad():
                for part in training[0].split(16):
                    random(part)  # in training mode: BatchNorm's statistics become those of the reads
            print_row(f"random weights, {shape[0]} channels", probe(random, args, training, test))
            random.layers = torch.nn.ModuleList()
            print_row("random weights, the encoder alone", probe(random, args, training, test))
        layers = model.layers
        for count in range(0 if args.by_layer else len(layers), len(layers) + 1):
            model.layers = layers[:count]
            print_row(f"{name}, after layer {count}" if args.by_layer else name, probe(model, args, training, test))


def print_row(name, row):
    print(f"| {name} | {' | '.join(' / '.join(f'{share:.1f}' for share in cell) for cell in row)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main(parse_args(Args)))
