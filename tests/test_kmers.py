"""The 21-mers that two sets of reads share, against sets of strings."""

import numpy as np
import pytest

from common.reads import kmers
from common.reads.kmers import shared_kmers

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def spelled(reads):
    texts = ["".join("NACGT"[base] for base in bases) for bases in reads]
    return {text[i : i + 21] for text in texts for i in range(len(text) - 20)}


def shares(tested, training):
    """The same by sets of strings."""
    wanted, held = spelled(tested), spelled(training)
    other = {word[::-1].translate(COMPLEMENT) for word in held}
    return len(wanted & held) / len(wanted), len(wanted & (held | other)) / len(wanted)


def reads_of(genome, number, rng):
    """Reads of some places of a genome, half of them of the other strand; also one of 20 bases and one of none."""
    for i in range(number):
        first = rng.integers(0, len(genome) - 200)
        bases = genome[first : first + rng.integers(21, 200)]
        yield 5 - bases[::-1] if i % 2 else bases
    yield from (genome[:20], genome[:0])


@pytest.fixture
def two_sets():
    rng = np.random.default_rng(0)
    genome = rng.integers(1, 5, 20_000).astype(np.uint8)
    return list(reads_of(genome, 100, rng)), list(reads_of(genome, 300, rng))  # more than are packed at a time


def test_shared_kmers_against_sets_of_strings(two_sets):
    same, either = expected = shares(*two_sets)
    assert 0.3 < same < either < 0.95
    assert shared_kmers(*two_sets) == pytest.approx(expected, abs=1e-12)


def test_a_sample_is_near_the_whole(two_sets, monkeypatch):
    monkeypatch.setattr(kmers, "COMPARED", 2**13)
    assert len(kmers.kmers(two_sets[0], 6)) == pytest.approx(len(spelled(two_sets[0])) / 6, rel=0.1)
    assert shared_kmers(*two_sets) == pytest.approx(shares(*two_sets), abs=0.05)


def test_no_21_mer_is_none_shared():
    short = [np.ones(20, np.uint8)]
    assert shared_kmers(short, [np.ones(50, np.uint8)]) == (0, 0) == shared_kmers([np.ones(50, np.uint8)], short)
