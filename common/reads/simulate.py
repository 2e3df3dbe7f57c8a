"""Simulated R9.4 reads with known bases, so that everything runs, and can be tested, with no data at all.

    python -m common.reads.simulate reads.hdf5 --reads 200 --easy

Written as mapped-signal HDF5, so that simulated and real reads take one path. The measured values below are those of
92 real E. coli R9.4 reads (489 001 bases, test reads of hasindu2008/f5c), in normalised (med-mad) units.
"""

import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import tyro
from tqdm import tqdm

from common import InputError
from common.reads.files import make_once, written_whole

# z-scored current of a 6-mer = the sum of four entries, one for each of its trinucleotides, by position (columns 0-3).
# A least-squares fit to Oxford Nanopore's public R9.4 6-mer table: it explains 99.8 % of the variance of 4096 entries.
TRINUCLEOTIDE_LEVELS = np.array([
    [-0.278, -0.264, -0.012, 0.256],  # AAA
    [0.336, -0.152, -0.400, 0.044],  # AAC
    [-0.403, -0.262, -0.069, 0.174],  # AAG
    [0.591, -0.393, -0.456, 0.126],  # AAT
    [-0.045, 0.335, 0.013, -0.121],  # ACA
    [0.150, 0.355, -0.113, -0.193],  # ACC
    [-0.200, 0.227, -0.031, -0.127],  # ACG
    [0.397, 0.072, -0.181, -0.110],  # ACT
    [-0.427, -0.503, -0.104, 0.161],  # AGA
    [0.259, -0.183, -0.312, 0.006],  # AGC
    [-0.600, -0.483, -0.128, 0.087],  # AGG
    [0.443, -0.603, -0.451, 0.069],  # AGT
    [0.055, 0.445, -0.094, -0.125],  # ATA
    [0.254, 0.821, -0.305, -0.204],  # ATC
    [0.004, 0.447, -0.198, -0.172],  # ATG
    [0.353, 0.261, -0.552, -0.115],  # ATT
    [-0.274, -0.020, 0.436, 0.323],  # CAA
    [0.209, 0.085, 0.172, 0.142],  # CAC
    [-0.456, -0.228, 0.314, 0.257],  # CAG
    [0.361, -0.160, 0.098, 0.219],  # CAT
    [-0.042, 0.237, 0.350, 0.173],  # CCA
    [0.219, 0.182, 0.207, 0.060],  # CCC
    [-0.206, 0.069, 0.292, 0.167],  # CCG
    [0.568, 0.043, 0.141, 0.139],  # CCT
    [-0.381, -0.224, 0.248, 0.279],  # CGA
    [0.285, -0.089, 0.107, 0.091],  # CGC
    [-0.514, -0.206, 0.244, 0.208],  # CGG
    [0.429, -0.411, 0.019, 0.165],  # CGT
    [0.086, 0.491, 0.266, 0.154],  # CTA
    [0.204, 0.632, 0.007, 0.017],  # CTC
    [-0.063, 0.333, 0.149, 0.111],  # CTG
    [0.211, 0.209, -0.212, 0.083],  # CTT
    [-0.386, -0.650, -0.220, 0.195],  # GAA
    [0.239, -0.290, -0.667, -0.146],  # GAC
    [-0.549, -0.478, -0.237, 0.113],  # GAG
    [0.492, -0.561, -0.702, -0.011],  # GAT
    [-0.128, 0.208, -0.008, -0.051],  # GCA
    [0.095, 0.310, -0.154, -0.143],  # GCC
    [-0.249, 0.160, -0.115, -0.057],  # GCG
    [0.309, 0.009, -0.255, -0.044],  # GCT
    [-0.676, -0.859, -0.229, 0.161],  # GGA
    [0.049, -0.226, -0.407, -0.048],  # GGC
    [-0.669, -0.570, -0.148, 0.086],  # GGG
    [0.169, -0.643, -0.493, 0.056],  # GGT
    [-0.134, 0.241, -0.220, -0.062],  # GTA
    [0.098, 0.655, -0.448, -0.187],  # GTC
    [-0.165, 0.332, -0.395, -0.118],  # GTG
    [0.198, 0.115, -0.698, -0.067],  # GTT
    [-0.132, -0.001, 0.396, 0.177],  # TAA
    [0.206, 0.045, 0.344, -0.076],  # TAC
    [-0.364, -0.027, 0.316, 0.104],  # TAG
    [0.529, -0.036, 0.444, 0.036],  # TAT
    [-0.109, 0.240, 0.586, -0.121],  # TCA
    [0.067, 0.142, 0.599, -0.236],  # TCC
    [-0.276, 0.162, 0.596, -0.121],  # TCG
    [0.390, 0.085, 0.660, -0.136],  # TCT
    [-0.496, -0.241, 0.236, 0.080],  # TGA
    [0.094, -0.034, 0.316, -0.187],  # TGC
    [-0.515, -0.017, 0.287, -0.009],  # TGG
    [0.301, -0.103, 0.492, -0.097],  # TGT
    [-0.027, 0.324, 0.290, -0.264],  # TTA
    [0.073, 0.333, 0.132, -0.482],  # TTC
    [-0.172, 0.220, 0.232, -0.317],  # TTG
    [0.210, 0.095, 0.026, -0.372],  # TTT
])  # fmt: skip
LEVEL_MEAN, LEVEL_SD = 90.21, 12.87  # pA
SIGNAL_BASE = 2  # the 6-mer that sets the current of base i starts at base i - 2 (correlation 0.99 on the real reads)

# Samples that a base stays: measured percentiles, and beyond the last an exponential tail of rare long stalls.
DWELL_PERCENTILES = np.array([0, 1, 5, 25, 50, 75, 95, 99]) / 100
DWELL_SAMPLES = np.array([0, 0, 1, 4, 7, 11, 21, 34])
DWELL_TAIL = 16.0  # puts the 99.9th percentile at 71
LEVEL_NOISE = 0.18  # sd of a base's level around the table
SAMPLE_NOISE = 0.12  # sd of the samples around their base's level, white

SAMPLE_RATE, DIGITISATION, RANGE, OFFSET = 4000.0, 8192.0, 1444.86, 6.0  # Hz, -, pA, -: a MinION's


def kmer_levels(bases):
    """Levels (B,) in z-scores of bases (B,) 0-3; beyond the ends stand As."""
    padded = np.concatenate([np.zeros(SIGNAL_BASE, int), bases, np.zeros(5 - SIGNAL_BASE, int)])
    trinucleotide = padded[:-2] * 16 + padded[1:-1] * 4 + padded[2:]
    return sum(TRINUCLEOTIDE_LEVELS[trinucleotide[j : j + len(bases)], j] for j in range(4))


def simulate_read(rng, bases, easy=False):
    """Signal (L,) in z-scored levels of bases (B,) 0-3, and the first sample of each base and the end (B + 1,).

    easy: no level noise, a third of the sample noise, and every base stays 6 to 12 samples.
    """
    if easy:
        dwell = rng.integers(6, 13, len(bases))
    else:
        chance = rng.random(len(bases))
        dwell = np.interp(chance, DWELL_PERCENTILES, DWELL_SAMPLES)
        dwell += (chance > DWELL_PERCENTILES[-1]) * rng.exponential(DWELL_TAIL, len(bases))
        dwell = dwell.round().astype(int)
    levels = kmer_levels(bases) + (0.0 if easy else LEVEL_NOISE) * rng.standard_normal(len(bases))
    signal = np.repeat(levels, dwell)
    signal += (SAMPLE_NOISE / 3 if easy else SAMPLE_NOISE) * rng.standard_normal(len(signal))
    return signal, np.concatenate([[0], dwell.cumsum()])


def write_simulated(path, reads, mean_bases=4000, seed=0, easy=False):
    """Writes `reads` simulated reads as mapped-signal HDF5; the file depends on the arguments alone."""
    if reads < 1 or mean_bases < 1 or seed < 0:
        raise InputError("--reads and --mean-bases should be at least 1, --seed 0 or more")
    image = io.BytesIO()  # HDF5 crashes where the disk is full; a plain write is an error
    with h5py.File(image, "w") as file:
        for number in tqdm(range(reads), desc=f"simulating {Path(path).name}", unit=" reads"):
            rng = np.random.default_rng([seed, number])
            bases = rng.integers(0, 4, max(1000, int(rng.gamma(4.0, mean_bases / 4.0))))
            signal, starts = simulate_read(rng, bases, easy)
            # pores and channels differ: each read has a gain and an offset of its own, which normalisation undoes
            current = (LEVEL_MEAN + rng.normal(0, 5)) + LEVEL_SD * rng.normal(1, 0.05) * signal
            dacs = np.clip(np.round(current * DIGITISATION / RANGE - OFFSET), -4096, 4095).astype(np.int16)
            read_id = f"simulated-{seed}-{number}"
            group = file.create_group(f"Reads/{read_id}")
            group.create_dataset("Dacs", data=dacs, compression="gzip", compression_opts=1)
            group.create_dataset("Reference", data=bases.astype(np.int16))
            group.create_dataset("Ref_to_signal", data=starts.astype(np.int32))
            shift = np.median(current)
            group.attrs.update(
                read_id=read_id, range=RANGE, offset=OFFSET, digitisation=DIGITISATION, sample_rate=SAMPLE_RATE,
                flow_cell_product_code="FLO-MIN106",  # whose pore this is
                shift_frompA=shift, scale_frompA=1.4826 * np.median(abs(current - shift)),
            )  # fmt: skip
    with written_whole(Path(path)) as part:
        part.write_bytes(image.getbuffer())


def simulated_file(folder):
    """The reads that scripts use when they are given no data: 300 of about 35 000 samples, made once in `folder`."""
    version = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=4).hexdigest()  # another simulator, other reads
    path = folder / f"simulated-300-{version}.hdf5"
    make_once(path, lambda: write_simulated(path, 300))
    return path


@dataclass
class Args:
    """Simulated R9.4 reads as mapped-signal HDF5."""

    out: tyro.conf.Positional[Path]
    """the file to write"""
    reads: int = 300
    """number of reads"""
    mean_bases: int = 4000
    """mean length of a read in bases; lengths follow a gamma distribution of shape 4"""
    seed: int = 0
    """reads of another seed share nothing"""
    easy: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """an easier pore: no noise of the levels, a third of the noise of the samples, 6 to 12 samples per base"""


if __name__ == "__main__":
    try:
        args = tyro.cli(Args)
        write_simulated(args.out, args.reads, args.mean_bases, args.seed, args.easy)
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(f"simulate.py: {error or 'interrupted'}")
    print(f"wrote {args.out}")
