"""Identity of called bases with a reference, of cases whose value is known beforehand."""

import random

import pytest

from common.ctc import identity

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
