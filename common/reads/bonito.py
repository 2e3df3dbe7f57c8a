"""Bonito's training arrays, both ways: chunks.npy, references.npy, reference_lengths.npy, perhaps indices.npy."""

import numpy as np

from common import InputError
from common.reads.files import NpyWriter, load_npy
from common.reads.formats import Rejected, first_line, is_bonito


def bonito_reads(path):
    """Yields (id, signal (L,), bases 1-4, split) of each chunk in the folder `path`, or Rejected.

    split: 0 training; 1 validation, those in validation/; -1 if there is no such folder. indices.npy, if there is one,
    says which chunks to use, and how often. InputError if the arrays do not fit together.
    """
    parts = [(path, 0), (path / "validation", 1)] if is_bonito(path / "validation") else [(path, -1)]
    for folder, split in parts:
        try:
            chunks, references, lengths = (
                load_npy(folder / f"{name}.npy") for name in ("chunks", "references", "reference_lengths")
            )
            rows = np.arange(lengths.size)
            if (folder / "indices.npy").exists():
                rows = load_npy(folder / "indices.npy")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: not a folder of Bonito's training arrays ({first_line(error)})") from error
        shapes = chunks.shape, references.shape, lengths.shape
        if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) > 1:
            raise InputError(
                f"{folder}: wrong shapes: chunks {shapes[0]}, references {shapes[1]}, reference_lengths {shapes[2]}; "
                "they should be (N, L), (N, longest), (N,)"
            )
        kinds = chunks.dtype.kind + references.dtype.kind + lengths.dtype.kind
        if kinds[0] != "f" or not set(kinds[1:]) <= set("iu"):
            raise InputError(f"{folder}: chunks should hold floats, references and reference_lengths whole numbers")
        if len(lengths) and (lengths.min() < 0 or lengths.max() > references.shape[1] or references.max(initial=0) > 4):
            raise InputError(f"{folder}: reference_lengths outside references' width, or bases other than 1 to 4")
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or (len(rows) and rows.min() < 0):
            raise InputError(f"{folder}: indices.npy should be a row of whole numbers from 0, the chunks to use")
        for i in rows[rows < len(lengths)].tolist():  # as Bonito, which passes over numbers that are too large
            bases = references[i, : lengths[i]]
            with np.errstate(over="ignore"):
                signal = chunks[i].astype(np.float16)
            if not np.isfinite(signal).all() or (len(bases) and bases.min() < 1):
                yield Rejected(f"chunk-{i}", "not finite" if len(bases) == 0 or bases.min() > 0 else "corrupt: base 0")
            else:
                yield f"chunk-{i}", signal, bases, split


def write_bonito(folder, batches, chunk_len, longest):
    """Writes labelled batches as Bonito's arrays into the new folder `folder`.

    batches: of signal (N, L), targets (N, B) of 1-4, zero-padded, and target_lengths (N,); longest: the largest B.
    """
    folder.mkdir(exist_ok=True)
    signal = NpyWriter(folder / "chunks.npy", np.float16, (chunk_len,))
    references = NpyWriter(folder / "references.npy", np.uint8, (longest,))
    lengths = NpyWriter(folder / "reference_lengths.npy", np.uint16)
    for batch in batches:
        labelled = batch.target_lengths > 0
        targets = batch.targets[labelled].numpy()
        signal.append(batch.signal[labelled].numpy())
        references.append(np.pad(targets, ((0, 0), (0, longest - targets.shape[1]))))
        lengths.append(batch.target_lengths[labelled].numpy())
    for file in (signal, references, lengths):
        file.close()
