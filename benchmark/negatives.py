"""How many batches hold two chunks that overlap in a read: as they are drawn, and if each tile drew a place of its own.

    python -m benchmark.negatives reads.pod5 more.pod5

prints a Markdown table of one epoch for three shapes of batch. Overlapping chunks would be false negatives in SimCLR,
MoCo and CPC.
"""

import sys
from pathlib import Path

import numpy as np

from common.chunks import Chunks, open_data

SHAPES = ((64, 1200), (64, 3600), (384, 200))  # chunks, samples


def overlaps(reads, starts, chunk_len):
    """Whether two of the chunks that begin at `starts` (N,) of `reads` (N,) share a sample."""
    order = np.lexsort((starts, reads))
    reads, starts = reads[order], starts[order]
    return bool(((np.diff(reads) == 0) & (np.diff(starts) < chunk_len)).any())


def shares(chunks, batch_size, seed=0):
    """The shares of an epoch's batches with an overlap: as drawn, and with a place of its own for each chunk."""
    drawn, own, steps = 0, 0, chunks.steps_per_epoch(batch_size)
    for step in range(steps):
        reads, starts = chunks.places(seed, step, batch_size)
        drawn += overlaps(reads, starts, chunks.chunk_len)
        last = chunks.reads["length"][reads] - chunks.chunk_len
        own += overlaps(reads, np.random.default_rng([seed, 1, step]).integers(0, last + 1), chunks.chunk_len)
    return drawn / steps, own / steps


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    stores = open_data(tuple(map(Path, sys.argv[1:])))
    print("| batch | one offset a read and epoch | a place for each chunk |\n|---|---|---|")
    for batch_size, chunk_len in SHAPES:
        drawn, own = shares(Chunks(stores, chunk_len, "training"), batch_size)
        print(f"| {batch_size} x {chunk_len} | {drawn:.1%} | {own:.1%} |")
