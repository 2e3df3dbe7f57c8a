"""Runs commands one after another, and tests the basecaller that they end with on reads that none of them has seen.

    python -m benchmark.unseen --name masked --seeds 0 1 --tests runs/unseen/lambda_first.hdf5 \\
        --commands "masked.py --data reads.pod5 --size tiny --epochs 5" \\
        "finetune_basecaller.py --data labelled.hdf5 --size tiny --steps 1000 --weights pore_model.pt"

Each command starts from the weights of the one before, and gets --seed unless it has one. One row a seed in
benchmark/results/NAME.csv: the commands, and for each test file the mean identity of all its chunks, by the last
weights, and each read's, with its number of chunks. How many of a test's 21-mers the labelled reads of the last command
hold, on either strand, is printed first. No row is made twice, and no run: start it again, or twice on one
machine, with commands that share their beginning. `python -m benchmark.plot_unseen NAME` compares the rows.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import Timeout

from benchmark.evidence import CHUNK, RUNS, append_row, do, folder_of, key, read_rows
from benchmark.plot_unseen import options_of
from common import InputError
from common.args import parse_args
from common.chunks import Chunks, open_data
from common.device import pick_device
from common.pore_model import load_tensors
from common.reads.kmers import K, shared_kmers
from finetune_basecaller import Basecaller, identities_of


@dataclass
class Args:
    commands: tuple[str, ...]
    """of the scripts, one after another, the last one of finetune_basecaller.py"""
    tests: tuple[Path, ...]
    """labelled reads; all of them are tested on"""
    name: str = "unseen"
    """of this collection of results"""
    seeds: tuple[int, ...] = (0,)
    """of each command without a --seed of its own"""


@torch.no_grad()
def identities_by_read(weights, data, chunk_len=CHUNK, splits=("training", "validation")):
    """{read: identities in percent of its chunks} of the labelled reads `data`, by the basecaller.pt `weights`."""
    model, device = Basecaller.from_state_dict(load_tensors(weights)).eval(), pick_device("auto")
    model, stores, found = model.to(device), open_data((data,)), {}
    for split in splits:
        chunks = Chunks(stores, chunk_len, split, labelled=True)
        for batch in chunks.tiles(64):
            with_bases = [read for read, bases in zip(batch.reads, batch.target_lengths.tolist(), strict=True) if bases]
            identities = identities_of(model(batch.signal.to(device))[0].cpu(), batch.targets, batch.target_lengths)
            for read, percent in zip(with_bases, identities, strict=True):
                found.setdefault(read, []).append(percent)
    return found


def sequences_of(data):
    """The bases 1-4 (B,) of all labelled reads of the files `data`."""
    stores = open_data(data)
    splits = [Chunks(stores, CHUNK, split, labelled=True) for split in ("training", "validation")]
    return [bases for chunks in splits for bases in chunks.sequences()]


def main(args):
    """The exit code: 0, or the jobs that failed, which sys.exit prints."""
    trained_on = sequences_of([*map(Path, shlex.split(options_of(args.commands[-1]).get("data", "")))])
    for test in args.tests:
        print(f"{test}: training reads hold {shared_kmers(sequences_of([test]), trained_on)[1]:.2%} of the {K}-mers")
    failed = []
    for seed in args.seeds:
        *before, last = commands = [
            command if " --seed " in command else f"{command} --seed {seed}" for command in args.commands
        ]
        row = {"name": args.name, "seed": seed, "pretrain_command": " && ".join(before), "finetune_command": last}
        if key(row) in read_rows(args.name):
            continue
        try:
            results = do(commands)
            for test in args.tests:
                weights = folder_of(commands) / "basecaller_last.pt"
                reads = identities_by_read(weights, test)
                row[f"identity_{test.stem}"] = round(float(np.mean(np.concatenate([*reads.values()]))), 3)
                row[f"reads_{test.stem}"] = " ".join(f"{np.mean(of):.2f}x{len(of)}" for of in reads.values())
            append_row(row | results)
            print(" ".join(f"{name} {value}" for name, value in row.items() if name[:8] == "identity"), flush=True)
        except Timeout:
            print(f"seed {seed}: another process is at it", flush=True)
        except InputError as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            failed.append(str(seed))
    return f"failed: seeds {', '.join(failed)}" if failed else 0


if __name__ == "__main__":
    RUNS.mkdir(parents=True, exist_ok=True)
    sys.exit(main(parse_args(Args)))
