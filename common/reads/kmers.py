"""How much sequence two sets of reads share, by their 21-mers, which seldom are at two places of a genome."""

import numpy as np

K = 21
COMPARED = 2**23  # where there are more 21-mers, a sample of about so many is compared


def kmers(reads, one_in=1, complement=False):
    """The different 21-mers of reads, a list of arrays of 1-4 = A, C, G, T: (M,) uint64, two bits a base, sorted.

    one_in: a sample, chosen by the 21-mer alone. complement: those of the other strand.
    """
    found = [np.zeros(0, np.uint64)]
    for first in range(0, len(reads), 256):  # at a time, so that memory does not grow with the reads
        some = [5 - bases[::-1] if complement else bases for bases in reads[first : first + 256]]
        lengths = [len(bases) for bases in some]
        bases, ends = np.concatenate(some).astype(np.uint64) - 1, np.repeat(np.cumsum(lengths), lengths)
        packed = np.zeros(max(0, len(bases) - K + 1), np.uint64)
        for i in range(K):
            packed <<= 2
            packed |= bases[i : i + len(packed)]
        packed = packed[np.arange(K, K + len(packed)) <= ends[: len(packed)]]  # none goes on into the next read
        found.append(packed[(packed * np.uint64(0x9E3779B97F4A7C15) >> 32) % one_in == 0])
    found = np.sort(np.concatenate(found))
    return found[found.searchsorted(found) == np.arange(len(found))]  # the first of equals; np.unique takes far longer


def shared_kmers(tested, training):
    """Shares of the different 21-mers of the reads `tested` that the reads `training` hold: same strand, either."""
    one_in = 1 + sum(map(len, [*tested, *training])) // COMPARED
    wanted = kmers(tested, one_in)
    same, other = (
        held.searchsorted(wanted, "right") > held.searchsorted(wanted)
        for held in (kmers(training, one_in), kmers(training, one_in, complement=True))
    )
    return same.sum() / max(1, len(wanted)), (same | other).sum() / max(1, len(wanted))
