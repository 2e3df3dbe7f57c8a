"""From raw reads and a genome to a basecaller, without a labelled read: call, align, label, fine-tune, again.

    python -m benchmark.from_genome reads.pod5 genome.fasta --tests ecoli.hdf5

Starts with a basecaller of simulated reads, or with --basecaller. Each round labels the reads with the last round's
basecaller (prepare_data.py, needs mappy) and goes on from its weights. The table at the end has the identity of each
round's chunks: on the held-out loci of the last round's labels, and on the labelled reads of --tests.
"""

import shlex
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from tyro.conf import Positional

from benchmark.demo import run
from benchmark.unseen import identities_by_read
from common import InputError
from common.args import parse_args
from common.chunks import open_data

SIMULATED = 1000  # reads


@dataclass
class Args:
    reads: Positional[Path]
    """raw reads: a file, or a folder of them"""
    genome: Positional[Path]
    """FASTA that they come from"""
    tests: tuple[Path, ...] = ()
    """labelled reads of another genome"""
    basecaller: Path | None = None
    """a basecaller.pt to start from; one of simulated reads is trained if not given"""
    size: Literal["thesis", "small", "tiny"] = "tiny"
    """size of the pore model"""
    rounds: PositiveInt = 3
    """of labels and fine-tuning"""
    steps: PositiveInt = 1000
    """of each fine-tuning"""
    seed: NonNegativeInt = 0
    """of simulated reads, weights and batches"""


def identity(weights, data, splits=("training", "validation")):
    found = [*identities_by_read(weights, data, splits=splits).values()]
    return np.mean(np.concatenate(found)) if found else np.nan


def main(args):
    folder = Path("runs") / f"from_genome__{args.seed}__{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    tune = f"finetune_basecaller.py --size {args.size} --steps {args.steps} --seed {args.seed}"
    reads, genome, before = shlex.quote(str(args.reads)), shlex.quote(str(args.genome)), args.basecaller
    if before is None:
        simulated, before = folder / "simulated.hdf5", folder / "simulated/basecaller_last.pt"
        run("simulate reads", f"-m common.reads.simulate {simulated} --reads {SIMULATED} --seed {args.seed}")
        run("train a basecaller on them", f"{tune} --data {simulated} --lr 4e-3 --run-dir {before.parent}")
    tried = [before]
    for number in range(1, args.rounds + 1):
        store, tuned, last = folder / f"labels{number}", folder / f"round{number}", shlex.quote(str(tried[-1]))
        label = f"prepare_data.py {reads} --reference {genome} --basecaller {last} -o {store}"
        run(f"round {number}: label the reads by the genome", label)
        run(f"round {number}: fine-tune", f"{tune} --data {store} --weights {last} --run-dir {tuned}")
        tried.append(tuned / "basecaller_last.pt")

    columns = ["basecaller", "reads labelled before", "held-out loci", *(test.stem for test in args.tests)]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for number, weights in enumerate(tried):
        labelled = len(open_data((folder / f"labels{number}",))[0].reads) if number else ""
        cells = [identity(weights, store, ("validation",)), *(identity(weights, test) for test in args.tests)]
        name = f"round {number}" if number else "at the start"
        print(f"| {name} | {labelled} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    args = parse_args(Args)
    try:
        main(args)
    except subprocess.CalledProcessError as error:
        raise InputError(f"{' '.join(error.cmd[1:])} failed; its message is above") from error
