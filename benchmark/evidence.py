"""What does pretraining add? Each method against training from scratch, by share of the labels and seed.

    python benchmark/evidence.py --pretraining-data reads.pod5 --labelled-data labelled.hdf5 --tune
    python benchmark/evidence.py --pretraining-data reads.pod5 --labelled-data labelled.hdf5

The first searches the learning rate of training from scratch on held-out training reads. The second takes the best one
of each label fraction for all arms: it is the baseline that is tuned.

The scripts run as anyone would run them. Each result is a row of benchmark/results/NAME.csv, of a run's last weights.
The row has its commands, and no row is made twice: stop this at any time and start it again, or start it twice on one
machine. A job that another process is at is skipped.
"""

import csv
import json
import math
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from pydantic import PositiveFloat, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmark/evidence.py` finds the modules below
# ruff: noqa: E402

from benchmark.plot_runs import read_metrics
from common import InputError
from common.args import Fraction, parse_args
from common.chunks import Chunks, open_data
from common.reads.files import make_once, written_whole
from common.reads.simulate import write_simulated
from finetune_basecaller import RECIPES

RUNS, RESULTS = Path("runs/evidence"), ROOT / "benchmark" / "results"
CHUNK, BATCH = 1200, 64  # of all pretraining, so that each method sees as many samples
LEARNING_RATES = (0.001, 0.002, 0.004, 0.008, 0.016)  # that --tune tries

# The scripts' defaults are for fifty epochs, these options for a few hundred steps
PRETRAIN = (
    f"--data {{raw}} --size {{size}} --chunk-len {CHUNK} --batch-size {BATCH} --seed {{seed}} "
    "--epochs {epochs} --lr {pretraining_lr} --warmup-steps 25"
)
METHODS = {
    "cpc": f"cpc.py {PRETRAIN} --cosine",
    "simclr": f"simclr.py {PRETRAIN} --cosine",
    "moco": f"moco.py {PRETRAIN} --queue 2048 --momentum 0.99 --cosine",
    "simsiam": f"simsiam.py {PRETRAIN} --cosine",
    "byol": f"byol.py {PRETRAIN} --momentum 0.99 --cosine",
    "dino": f"dino.py {PRETRAIN} --momentum 0.99 --student-temperature 0.5 --teacher-temperature 0.3 --cosine",
    "barlow": f"barlow.py {PRETRAIN} --cosine",
    "masked": f"masked.py {PRETRAIN} --cosine",
}
SIMULATED = "finetune_basecaller.py --data {simulated} --size {size} --seed {seed} --steps {long} --lr {simulated_lr}"
FINETUNE = (
    "finetune_basecaller.py --data {labelled} --size {size} --label-fraction {fraction} --seed {seed} "
    "--steps {finetuning_steps} --lr {lr} --batch-size {batch}"
)
FROM_METHOD, FROM_LABELS = f"{FINETUNE} --weights pore_model.pt", f"{FINETUNE} --weights basecaller_last.pt"
SLOWER = "--pore-model-lr {quarter_lr}"
# What each arm runs, one command after another; --weights are those that the command before it ends with
ARMS = {
    "scratch": (FINETUNE,),
    "scratch-long": (FINETUNE,),  # as many passes through the pore model as the costliest method and its fine-tuning
    "simulated": (SIMULATED, f"{FROM_LABELS} {SLOWER}"),  # from a basecaller of simulated reads, for as many passes
    "simulated-new-head": (SIMULATED, f"{FROM_LABELS} {SLOWER} --new-head"),  # the control of simulated+METHOD
}
for _name, _method in METHODS.items():
    ARMS[_name] = _method, FROM_METHOD
    ARMS[f"simulated+{_name}"] = SIMULATED, f"{_method} --weights basecaller_last.pt", f"{FROM_METHOD} {SLOWER}"


@dataclass
class Args:
    pretraining_data: tuple[Path, ...]
    """raw reads"""
    labelled_data: tuple[Path, ...]
    """other reads, with bases"""
    name: str = "real"
    """of this collection of results"""
    size: Literal["thesis", "small", "tiny"] = "tiny"
    """size of the pore model"""
    methods: tuple[Literal[tuple(ARMS)], ...] = ("scratch", "scratch-long", "simulated", *METHODS)
    """the arms to compare"""
    fractions: tuple[Fraction, ...] = (0.01, 0.1, 1.0)
    """shares of the labelled reads to train on"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of pretraining, fine-tuning and the choice of labelled reads"""
    pretraining_epochs: PositiveInt = 1
    """of each method"""
    finetuning_steps: PositiveInt = 400
    """of each arm but scratch-long"""
    lr: PositiveFloat | None = None
    """learning rate of fine-tuning; the best of --tune, or else the script's, if not given; the only one of --tune"""
    tune: bool = False
    """rather than the grid, try learning rates for scratch"""


def key(row):
    return row["pretrain_command"], row["finetune_command"]


def read_rows(name):
    """{its commands: row} of a collection; rows are dicts of strings."""
    path = RESULTS / f"{name}.csv"
    return {key(row): row for row in csv.DictReader(path.read_text().splitlines())} if path.exists() else {}


def append_row(row):
    """Adds a row to its collection, whole or not at all."""
    path = RESULTS / f"{row['name']}.csv"
    with FileLock(RUNS / f"{path.name}.lock"), written_whole(path) as part, open(part, "w", newline="") as file:
        rows = read_rows(row["name"]) | {key(row): row}
        writer = csv.DictWriter(file, next(iter(rows.values())), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def tuned_learning_rate(args, fraction):
    """The best of --tune's, by the mean identity of the seeds that all were tried with; None if there are none."""
    tried = {}
    for row in read_rows(args.name).values():
        of = row["split"], float(row["fraction"]), row["size"], int(row["finetuning_steps"])
        if of == ("tune", fraction, args.size, args.finetuning_steps):
            tried.setdefault(float(row["lr"]), {})[row["seed"]] = float(row["identity_mean"])
    seeds = set.intersection(*map(set, tried.values())) if tried else ()
    return max(tried, key=lambda lr: sum(tried[lr][seed] for seed in seeds)) if seeds else None


def plan(args):
    """Yields (row, commands) of each job, ordered by seed; the row as far as it is known before."""
    recipe, stores, simulated = RECIPES[args.size], open_data(args.labelled_data), RUNS / "simulated/pretraining.hdf5"
    arms, rates = (("scratch",), LEARNING_RATES) if args.tune else (args.methods, (None,))
    if any("simulated" in arm for arm in arms):
        make_once(simulated, lambda: write_simulated(simulated, 1000, seed=1))
    split, share = ("training", "pretraining") if args.tune else ("validation", None)  # as the script's --tune does
    validation = Chunks(stores, recipe["chunk_len"], split, True, "finetuning")
    epoch = Chunks(open_data(args.pretraining_data), CHUNK, "training").steps_per_epoch(BATCH)
    # in chunks of fine-tuning. BYOL and DINO have 8/3: two views with gradient, and two without, which count a third
    passes = 8 / 3 * args.pretraining_epochs * epoch * BATCH * CHUNK / recipe["chunk_len"]
    fixed = {"raw": shlex.join(map(str, args.pretraining_data)), "labelled": shlex.join(map(str, args.labelled_data))}
    fixed |= {"epochs": args.pretraining_epochs, "long": math.ceil(passes / recipe["batch_size"])}
    fixed |= {"simulated": simulated, "simulated_lr": recipe["lr"] / 2}
    best = {fraction: args.lr or tuned_learning_rate(args, fraction) or recipe["lr"] for fraction in args.fractions}
    for seed, arm, fraction, lr in product(args.seeds, arms, args.fractions, (args.lr,) if args.lr else rates):
        chunks = Chunks(stores, recipe["chunk_len"], "training", True, share, fraction, seed)
        batch, lr = min(recipe["batch_size"], len(chunks)), lr or best[fraction]  # a few reads may have less
        steps = args.finetuning_steps + (math.ceil(passes / batch) if arm == "scratch-long" else 0)
        row = {"name": args.name, "arm": arm, "fraction": fraction, "seed": seed, "size": args.size, "lr": lr}
        row |= {"split": "tune" if args.tune else "validation", "finetuning_steps": steps}
        row |= {"validation_reads": validation.number_of_reads, "validation_chunks": len(validation)}
        # at 1e-3 SimSiam's effective rank falls to 6 to 13 of 63; after labels 1e-4 was the first value tried
        pretraining_lr = 1e-4 if "+" in arm else {"simsiam": 1e-4, "masked": 2e-3}.get(arm, 1e-3)
        values = fixed | row | {"batch": batch, "quarter_lr": lr / 4, "pretraining_lr": pretraining_lr}
        *before, last = commands = [command.format(**values) + " --tune" * args.tune for command in ARMS[arm]]
        yield row | {"pretrain_command": " && ".join(before), "finetune_command": last}, commands


def current_commit():
    """The commit that is checked out, with + if a script differs from it."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit, changed = git(["git", "rev-parse", "--short", "HEAD"]), git(["git", "status", "--porcelain", "--", "*.py"])
    return commit.stdout.strip() + ("+" if changed.stdout else "")


def finish(command, folder, before):
    """Runs a command in `folder`, from the weights in the folder `before`; one that was stopped goes on."""
    result = folder / ("basecaller_last.pt" if command.startswith("finetune_basecaller") else "pore_model.pt")
    with FileLock(f"{folder}.lock", blocking=False):
        if result.exists():
            return
        script, *words = shlex.split(command.replace("--weights ", f"--weights {before}/"))
        words += ["--run-dir", str(folder)]
        if (folder / "checkpoint.pt").exists():
            words = ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before its first checkpoint
            Path(f"{folder}.commits").unlink(missing_ok=True)
        with open(f"{folder}.commits", "a") as file:
            print(current_commit(), file=file)
        code = subprocess.run([sys.executable, str(ROOT / script), *words], stdout=subprocess.DEVNULL).returncode
        if code:
            raise InputError(f"python {command} failed, with exit code {code}")
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # the largest file


def log_of(folder):
    """The last value of all that a run logged, the seconds that its steps took, and the commits that it ran at."""
    batch, last = json.loads((folder / "args.json").read_text())["batch_size"], {"step": 0, "seconds": 0}
    for line in read_metrics(folder):
        if "chunks_per_second" in line:
            last["seconds"] += round(batch * (line["step"] - last["step"]) / line["chunks_per_second"], 2)
        last |= line
    return last | {"commit": ", ".join(dict.fromkeys(Path(f"{folder}.commits").read_text().split()))}


def folder_of(commands):
    """Where the last of these commands, run one after another, has its run folder."""
    digest = blake2b(" && ".join(commands).encode(), digest_size=4).hexdigest()
    return RUNS / f"{commands[-1].partition('.')[0]}-{digest}"


def do(commands):
    """Runs commands, each from the weights of the one before, and returns the rest of the row.

    InputError if one fails, Timeout if another process is at one.
    """
    folder, logs = None, []
    for end, command in enumerate(commands, 1):
        before, folder = folder, folder_of(commands[:end])
        finish(command, folder, before)
        logs.append(log_of(folder))
    *pretraining, last = logs
    row = {name: last.get(f"validation/{name}", "") for name in ("loss", "identity_mean", "identity_median")}
    row |= {name: logs[-2:][0].get(name, "") for name in ("feature_spread", "effective_rank")}
    row |= {"seconds": last["seconds"], "pretraining_seconds": sum(log["seconds"] for log in pretraining)}
    row |= {"commit": last["commit"], "pretraining_commit": " && ".join(log["commit"] for log in pretraining)}
    row |= {"pretraining_steps": sum(log["step"] for log in pretraining)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return row | {"hardware": f"{device}, {torch.get_num_threads()} threads"}


def main(args):
    """The exit code: 0, or the jobs that failed, which sys.exit prints."""
    failed = []
    for row, commands in plan(args):
        job = f"{row['arm']}, {row['fraction']:g} of the labels, lr {row['lr']:g}, seed {row['seed']}"
        if key(row) in read_rows(args.name):
            continue
        try:
            row |= do(commands)
            append_row(row)
            print(f"{job}: {row['identity_mean']:.2f} % mean identity", flush=True)
        except Timeout:
            print(f"{job}: another process is at it", flush=True)
        except InputError as error:
            print(f"{job}: {error}", file=sys.stderr)
            failed.append(job)
    return f"failed: {'; '.join(failed)}" if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the script ends with this process
    sys.exit(main(parse_args(Args)))
