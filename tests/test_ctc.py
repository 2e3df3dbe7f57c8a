"""Greedy decoding against a loop; identity of called bases, of cases whose value is known beforehand."""

import random

import numpy as np
import pytest
import torch

from benchmark.evaluate_calls import matches
from common.ctc import ALPHABET, align, best_path, identity

REFERENCE = "".join(random.Random(0).choices("ACGT", k=500))
NEXT = {"A": "C", "C": "G", "G": "T", "T": "A"}


def inserted(number, at=250):
    """The reference with that many bases more, none of them equal to a neighbour of the place."""
    base = next(b for b in "ACGT" if b not in REFERENCE[at - 1 : at + 1])
    return REFERENCE[:at] + number * base + REFERENCE[at:]


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        (REFERENCE, 100.0),
        (REFERENCE[:250] + NEXT[REFERENCE[250]] + REFERENCE[251:], 100 * 499 / 500),
        (inserted(1), 100 * 500 / 501),
        (inserted(10), 100 * 500 / 510),
        (REFERENCE[:250] + REFERENCE[251:], 100 * 499 / 500),
        (REFERENCE[:250] + REFERENCE[260:], 100 * 490 / 500),
        (REFERENCE[100:400], 100.0),  # local: what is beyond the ends costs nothing
        (50 * "A" + REFERENCE + 50 * "C", 100.0),
        (REFERENCE[:245], 0.0),  # less than half
        (REFERENCE[:250], 100.0),  # half
        ("", 0.0),
    ],
    ids=[
        "perfect", "one mismatch", "one insertion", "ten insertions", "one deletion", "ten deletions", "the middle",
        "flanks", "less than half", "half", "nothing",
    ],
)  # fmt: skip
def test_identity_of_hand_made_alignments(called, expected):
    assert identity(called, REFERENCE) == pytest.approx(expected, abs=1e-9)


def test_identity_with_an_empty_reference_is_zero():
    assert identity(REFERENCE, "") == 0
    assert identity("", "") == 0


def test_inserted_bases_cover_nothing_of_the_reference():
    """240 of 500 reference bases in 280 columns are less than half."""
    assert identity(inserted(40, at=120)[:280], REFERENCE) == 0
    assert identity(inserted(40, at=120)[:280], REFERENCE, min_coverage=0.4) == pytest.approx(100 * 240 / 280)


def test_min_coverage_is_a_share_of_the_reference():
    assert identity(REFERENCE[:100], REFERENCE, min_coverage=0.2) == 100
    assert identity(REFERENCE[:100], REFERENCE, min_coverage=0.21) == 0


def garbled(reference, errors, rng):
    """The reference with that share of errors: substitutions, deletions and insertions alike."""
    called = ""
    for base in reference:
        kind = 3 * rng.random() / errors  # 0 to 1 a substitution, to 2 a deletion, to 3 an insertion
        called += NEXT[base] if kind < 1 else "" if kind < 2 else base
        called += rng.choice("ACGT") if 2 <= kind < 3 else ""
    return called


def pairs(number, errors, seed=0):
    rng = random.Random(seed)
    for _ in range(number):
        reference = "".join(rng.choices("ACGT", k=130))
        yield garbled(reference, errors, rng), reference


# of each pair what Bonito's aligner gives, parasail 1.3.4: sw_trace_striped_32(called, reference, 8, 4, dnafull)
PARASAIL = {
    0.05: [93.23, 90.3, 93.94, 90.3, 93.89, 93.89, 94.74, 94.66],
    0.15: [83.82, 79.29, 85.4, 87.97, 86.67, 87.5, 86.03, 81.56],
    0.25: [76.92, 78.26, 74.31, 83.21, 78.68, 82.09, 78.01, 81.95],
    0.35: [71.88, 71.01, 69.18, 73.19, 72.99, 75.56, 71.33, 77.61],
}


@pytest.mark.parametrize("errors", PARASAIL)
def test_identity_is_that_of_parasail(errors):
    found = [identity(*pair) for pair in pairs(8, errors)]
    assert found == pytest.approx(PARASAIL[errors], abs=0.005)


def best_score(called, reference):
    """Of the local alignments, by dynamic programming: match 5, mismatch -4, gaps 8 and 4 for each further base."""
    score, down, right = (np.full((len(called) + 1, len(reference) + 1), fill) for fill in (0.0, -np.inf, -np.inf))
    for i, base in enumerate(called, 1):
        for j, other in enumerate(reference, 1):
            down[i, j] = max(score[i - 1, j] - 8, down[i - 1, j] - 4)
            right[i, j] = max(score[i, j - 1] - 8, right[i, j - 1] - 4)
            diagonal = score[i - 1, j - 1] + (5 if base == other else -4)
            score[i, j] = max(0, diagonal, down[i, j], right[i, j])
    return score.max()


def test_the_alignment_is_the_best_there_is():
    for called, reference in pairs(10, 0.4, seed=1):
        rows = align(called, reference)
        expected, gap = 0, ""
        for base, other in zip(rows[0], rows[1], strict=True):
            kind = "reference" if base == "-" else "called" if other == "-" else ""
            expected += (-4 if kind == gap else -8) if kind else 5 if base == other else -4
            gap = kind
        assert expected == best_score(called, reference)


def test_greedy_decoding_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 2, 300):
        log_probs = (2 * torch.randn(steps, 5, generator=generator)).log_softmax(1)
        called, starts, before = "", [], 0
        for step, row in enumerate(log_probs.tolist()):
            symbol = row.index(max(row))
            if symbol not in (0, before):
                called, starts = called + ALPHABET[symbol], [*starts, step]
            before = symbol
        found, places = best_path(log_probs)
        assert found == called and places.tolist() == starts
    assert len(called) > 100


def test_blanks_alone_are_no_base():
    sequence, starts = best_path(torch.eye(5)[[0, 0, 0]])
    assert sequence == "" and len(starts) == 0


def test_the_called_bases_that_match():
    called = "CCCC" + REFERENCE[:30] + NEXT[REFERENCE[30]] + REFERENCE[31:60] + REFERENCE[65:100] + "CCCC"
    assert REFERENCE[100] != "C" and REFERENCE[60:65] != REFERENCE[65:70]
    expected = 4 * [-1] + 30 * [1] + [0] + (29 + 35) * [1] + 4 * [-1]
    assert matches(align(called, REFERENCE[:100]), len(called)).tolist() == expected
    assert matches(align("", REFERENCE), 0).tolist() == []
