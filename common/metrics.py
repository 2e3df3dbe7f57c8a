"""What the logs report: how alike the features are (collapse), and how well a basecaller reads."""

import parasail
import torch


def feature_spread(r):
    """Mean over dimensions of the standard deviation of the L2-normalised representations r (N, R), times sqrt(R).

    About 1 for directions spread evenly over the sphere, 0 when all representations point the same way
    (Chen & He 2021, "Exploring Simple Siamese Representation Learning", figure 2).
    """
    unit = torch.nn.functional.normalize(r.detach().float(), dim=1)
    return float(unit.std(0, correction=0).mean() * r.shape[1] ** 0.5)


def effective_rank(r):
    """exp of the entropy of the normalised singular values of the centred representations r (N, R): 1 to min(N - 1, R).

    Roy & Vetterli 2007, "The effective rank", definition 1. 0 when all representations are equal.
    """
    centred = r.detach().float() - r.detach().float().mean(0)
    singular = torch.linalg.svdvals(centred)
    total = singular.sum()
    if total < 1e-6 * r.detach().float().norm().clamp(min=1e-12):
        return 0.0
    p = singular / total
    return float(torch.exp(torch.special.entr(p).sum()))


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
