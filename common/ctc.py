"""Connectionist temporal classification (CTC): what it can emit, greedy decoding, and the identity of a call."""

import numpy as np
import parasail
import torch

ALPHABET = "NACGT"  # N, index 0, is the CTC blank and the padding


def ctc_steps_needed(targets, target_lengths):
    """Time steps (N,) that CTC needs for each row of targets (N, B): a blank has to stand between equal neighbours."""
    inside = torch.arange(targets.shape[1], device=targets.device)[1:] < target_lengths[:, None]
    return target_lengths + ((targets[:, 1:] == targets[:, :-1]) & inside).sum(1)


def best_path(log_probs):
    """Greedy CTC decoding: log_probs (S, 5) -> a string of ACGT, and the step (B,) at which each base of it begins."""
    symbols = log_probs.numpy().argmax(1)
    starts = np.flatnonzero((symbols > 0) & (np.diff(symbols, prepend=0) != 0))
    return "".join(ALPHABET[symbol] for symbol in symbols[starts]), starts


def align(called, reference):
    """parasail's result of the best local alignment of two strings of ACGT, with Bonito's scores.

    Match 5, mismatch -4, gap 8 to open and 4 to extend. The query and ref of its traceback have a - where the
    other has a base alone, its comp a | at each match; end_query is the last aligned base of `called`.
    """
    return parasail.sw_trace_striped_32(called, reference, 8, 4, parasail.dnafull)


def identity(called, reference, min_coverage=0.5):
    """Read identity in percent of a `called` sequence against its `reference`, both strings of ACGT.

    100 * matches / (matches + mismatches + insertions + deletions) of the best local alignment, as Bonito counts it,
    and 0 when less than `min_coverage` of the reference is aligned. 0 when nothing is called.
    """
    if not called or not reference:
        return 0.0
    aligned = align(called, reference).traceback
    if len(aligned.ref.replace("-", "")) < min_coverage * len(reference):
        return 0.0
    return 100.0 * aligned.comp.count("|") / len(aligned.comp)
