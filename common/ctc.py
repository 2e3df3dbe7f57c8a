"""Connectionist temporal classification (CTC): what it can emit, greedy decoding, and the identity of a call."""

import numpy as np
import torch
from Bio.Align import PairwiseAligner

ALPHABET = "NACGT"  # N, index 0, is the CTC blank and the padding
# Bonito's scores. To open a gap costs 8, its first base included.
ALIGNER = PairwiseAligner(mode="local", match_score=5, mismatch_score=-4, open_gap_score=-8, extend_gap_score=-4)


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
    """Biopython's best local alignment of two strings of ACGT; None if there is none.

    Its rows, [0] of the reference and [1] of `called`, have a - where the other has a base alone.
    """
    return next(iter(ALIGNER.align(reference, called)), None) if called and reference else None


def aligned_identity(aligned, reference, min_coverage=0.5):
    """identity() of what align() gave."""
    if aligned is None or np.ptp(aligned.coordinates[0]) < min_coverage * len(reference):
        return 0.0
    return 100.0 * sum(map(str.__eq__, aligned[0], aligned[1])) / aligned.length


def identity(called, reference, min_coverage=0.5):
    """Read identity in percent of a `called` sequence against its `reference`, both strings of ACGT.

    100 * matches / (matches + mismatches + insertions + deletions) of the best local alignment, as Bonito counts it,
    and 0 when less than `min_coverage` of the reference is aligned. 0 when nothing is called.
    """
    return aligned_identity(align(called, reference), reference, min_coverage)
