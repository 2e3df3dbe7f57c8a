"""Splits by read, chunks and batches: what a training script draws from read stores.

An epoch has every tile of every training read once. The tiles of a read lie side by side, all shifted by one random
offset, which is new each epoch: so no two chunks of a batch overlap, and negatives are other stretches of current.
"""

import hashlib
import zlib
from typing import NamedTuple

import numpy as np
import torch

from common import InputError
from common.device import all_gather_lists, copied_to, part_of, world_size
from common.reads.chemistry import say_chemistry
from common.reads.store import open_stores

VALIDATION = 0.1  # the share of reads kept for validation
PRETRAINING = 5 / 6  # its share of data that pretraining and fine-tuning are both given (thesis section 5.1)


def open_data(paths):
    """The read stores of `paths`: raw input is prepared once, into a cache; no paths: simulated reads, said aloud.

    InputError if a path cannot be used, or if the hosts of a run have other reads.
    """
    stores = open_stores(paths)
    if len(set(all_gather_lists([tuple(zlib.crc32(store.reads.tobytes()) for store in stores)]))) > 1:
        raise InputError("--data: other reads on each host; give all the same")
    say_chemistry(stores)
    return stores


def hash_of(read_id, seed=0):
    """64 bits that depend on the read's id (bytes) and the seed alone: a read stays in its split when data is added.

    What follows a colon, the place of a part in a split read, does not count: parts stay with the read and each other.
    """
    salt = seed.to_bytes(16, "little")
    return int.from_bytes(hashlib.blake2b(read_id.partition(b":")[0], digest_size=8, salt=salt).digest(), "little")


def in_validation(reads):
    """Which rows of a table of READ_DTYPE belong to the validation split, (reads,) bool."""
    high = np.array([hash_of(read_id) >> 32 for read_id in reads["id"]]) / 2**32
    return np.where(reads["split"] < 0, high < VALIDATION, reads["split"] == 1)


class Batch(NamedTuple):
    """N chunks. For unlabelled data targets are None."""

    signal: torch.Tensor  # (N, L) float32
    lengths: torch.Tensor  # (N,) int64, all L
    targets: torch.Tensor | None = None  # (N, longest) int64, 1-4, zero-padded
    target_lengths: torch.Tensor | None = None  # (N,) int64
    reads: tuple[str, ...] = ()  # ids of the reads that the chunks are of, also those of the other processes

    def to(self, device):
        return Batch(*(copied_to(device, x) if torch.is_tensor(x) else x for x in self))


class Chunks:
    """The chunks of one split of some stores; len() is how many an epoch has, for validation perhaps none.

    split: "training" or "validation", by the hash of the read's id. labelled: only labelled reads, with their bases.
    share: "pretraining" or "finetuning" takes that share of the reads (five to one, by the hash of the id), None all.
    label_fraction: this share of the training reads, at least one; which, depends on label_seed. A read that several
    stores have counts once.
    """

    def __init__(self, stores, chunk_len, split, labelled=False, share=None, label_fraction=1.0, label_seed=0):
        self.stores, self.chunk_len, self.split, self.labelled = stores, chunk_len, split, labelled
        self.reads = np.concatenate([store.reads for store in stores])
        self.store_of = np.repeat(np.arange(len(stores)), [len(store.reads) for store in stores])
        low = np.array([hash_of(read_id) % 2**32 for read_id in self.reads["id"]]) / 2**32
        held_out = in_validation(self.reads)
        if not labelled and held_out.all() and (self.reads["split"] < 0).all():
            held_out[:] = False  # by chance, as a single read may be: it is all there is to pretrain on
        keep = held_out == (split == "validation")
        if share is not None and split == "training":
            keep &= (low < PRETRAINING) == (share == "pretraining")
        if labelled:
            keep &= self.reads["bases_length"] > 0
        rows = np.flatnonzero(keep & ~self.reads["whole"])  # Bonito's chunks have numbers for ids
        keep[np.delete(rows, np.unique(self.reads["id"][rows], return_index=True)[1])] = False
        names = ", ".join(str(store.path) for store in stores)
        uncut = set(self.reads["length"][keep & self.reads["whole"]].tolist()) - {chunk_len}
        if labelled and uncut:
            length = max(uncut)
            raise InputError(
                f"{names}: Bonito's chunks of {length} samples cannot be cut anew; add --chunk-len {length}"
            )
        long_enough = self.reads["length"] >= chunk_len
        self.too_short = int((keep & ~long_enough).sum())
        keep = np.flatnonzero(keep & long_enough)
        if label_fraction < 1:
            place = np.array([hash_of(read_id, label_seed) for read_id in self.reads["id"][keep]], np.uint64)
            keep = keep[np.argsort(place)][: max(1, round(label_fraction * len(keep)))]
        self.number_of_reads = len(keep)
        tiles = self.reads["length"][keep] // chunk_len
        self.spare = self.reads["length"][keep] % chunk_len  # (reads,) samples that the tiles of a read leave over
        self.row_of = np.repeat(np.arange(len(keep)), tiles)  # (chunks,) index in spare
        self.read_of = keep[self.row_of]  # (chunks,) index in self.reads
        self.tile_of = np.arange(len(self.read_of)) - np.repeat(tiles.cumsum() - tiles, tiles)
        if len(self) < (1 if labelled else world_size()):  # parts that are compared have to be equal
            why = f"no {'labelled ' * labelled}{split} read{f' for {share}' if share else ''}"
            if len(self):
                why = f"only {len(self)} {split} chunks for {world_size()} processes; give more reads"
            elif labelled and not self.reads["bases_length"].any():
                why += ": none has bases; prepare_data.py makes labels, of a BAM or a genome"
            elif self.too_short:
                why += f" of at least {chunk_len} samples ({self.too_short} shorter); give a smaller --chunk-len"
            else:
                why += f" among {len(self.reads)}; give more reads"
            if split == "training":
                raise InputError(f"{names}: {why}")
            print(f"without validation: {names}: {why}")
            self.read_of = self.read_of[:0]
        self._epoch = self._order = self._offsets = None

    def __len__(self):
        return len(self.read_of)

    def steps_per_epoch(self, batch_size):
        """How many whole batches an epoch has. InputError if none, or if processes cannot have equal parts of them."""
        if batch_size > len(self):
            raise InputError(
                f"--batch-size {batch_size}: more than the {len(self)} training chunks there are; "
                "give a smaller one, a smaller --chunk-len or more reads"
            )
        if batch_size % world_size():
            raise InputError(f"--batch-size {batch_size}: cannot be split equally among {world_size()} processes")
        return len(self) // batch_size

    def places(self, seed, step, batch_size):
        """The reads (N,), rows of self.reads, and first samples (N,) of the training batch of this step.

        A function of the arguments alone. What an epoch has left over is left out.
        """
        epoch, place = divmod(step, len(self) // batch_size)
        if self._epoch != (seed, epoch):
            self._epoch, self._order = (seed, epoch), np.random.default_rng([seed, 0, epoch]).permutation(len(self))
            self._offsets = np.random.default_rng([seed, 1, epoch]).integers(0, self.spare + 1)  # (reads,)
        chosen = self._order[place * batch_size : (place + 1) * batch_size]
        return self.read_of[chosen], self.tile_of[chosen] * self.chunk_len + self._offsets[self.row_of[chosen]]

    def batch(self, seed, step, batch_size):
        """This process's part of the training batch of this step; `batch_size`: the chunks of all processes."""
        reads, starts = self.places(seed, step, batch_size)
        part = part_of(batch_size)
        return self._cut(reads[part], starts[part])._replace(reads=self._ids(reads))

    def tiles(self, batch_size, equal=False):
        """Yields this process's part of all tiles, in order, in batches of at most batch_size in all processes.

        equal: batches of equally many chunks, so that their losses compare; what is left over, or too few for the
        processes to have equal parts, is left out.
        """
        end = len(self)
        if equal and end:
            batch_size = min(batch_size, len(self) // world_size() * world_size())
            end -= end % batch_size
        for first in range(0, end, batch_size):
            rows = np.arange(first, min(first + batch_size, end))
            rows = rows[part_of(len(rows))]
            if len(rows):
                yield self._cut(self.read_of[rows], self.tile_of[rows] * self.chunk_len)

    def bases(self, read, start):
        """Bases 1-4 (B,) of the chunk of row `read` that begins at sample `start`, and the chunk's sample of each."""
        table, store = self.reads[read], self.stores[self.store_of[read]]
        rows = slice(table["bases_start"], table["bases_start"] + table["bases_length"])
        bases, starts = np.asarray(store.bases)[rows], np.asarray(store.base_starts)[rows]  # slices of memmap are slow
        first, end = starts.searchsorted(np.array([start, start + self.chunk_len], starts.dtype))
        return bases[first:end], starts[first:end] - start

    def sequences(self):
        """The bases 1-4 (B,) of each read that chunks are cut from."""
        rows, bases = np.unique(self.read_of), [np.asarray(store.bases) for store in self.stores]
        return [
            bases[number][read["bases_start"] :][: read["bases_length"]]
            for number, read in zip(self.store_of[rows], self.reads[rows], strict=True)
        ]

    def _cut(self, reads, starts):
        signal, first = np.empty((len(reads), self.chunk_len), np.float16), self.reads["start"][reads] + starts
        for number in np.unique(self.store_of[reads]):
            rows = self.store_of[reads] == number
            windows = np.lib.stride_tricks.sliding_window_view(self.stores[number].signal, self.chunk_len)
            signal[rows] = windows[first[rows]]  # a view of each stretch there is: these alone are read
        signal, lengths = torch.from_numpy(signal).float(), torch.full((len(reads),), self.chunk_len)
        if not self.labelled:
            return Batch(signal, lengths, reads=self._ids(reads))
        bases = [self.bases(read, start)[0] for read, start in zip(reads, starts, strict=True)]
        target_lengths = torch.tensor([len(row) for row in bases])
        targets = torch.zeros((len(reads), target_lengths.max()), dtype=torch.int64)
        for padded, row in zip(targets.numpy(), bases, strict=True):
            padded[: len(row)] = row
        return Batch(signal, lengths, targets, target_lengths, self._ids(reads))

    def _ids(self, reads):
        return tuple(read_id.decode() for read_id in self.reads["id"][reads])
