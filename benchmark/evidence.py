"""What pretraining brings: every method, several label fractions, several seeds, against training from scratch.

    python benchmark/evidence.py                                          (simulated reads)
    python benchmark/evidence.py --pretraining-data reads.pod5 --labelled-data labelled.hdf5 --tune
    python benchmark/evidence.py --pretraining-data reads.pod5 --labelled-data labelled.hdf5

Each result is a row of benchmark/results/NAME-HOST.csv as soon as it is there, and no row of any NAME-*.csv is made
again: stop this at any time, start it again, or twice on one machine. Several machines need a folder in common, or
different --seeds; paths, as typed, are part of what makes a row the same. Jobs are ordered by seed, so that what is
there is whole seeds. The scripts run as anyone would run them; the rows have their commands and commits. A result is
that of the last weights, not of those that did best on the validation reads.

scratch-long spends on labels what the others spend on pretraining. With B chunks of L samples a step,

    steps = finetuning steps + pretraining steps * passes * (B L of pretraining) / (B L of fine-tuning)

where passes, forward and backward through the pore model, are 8/3 a chunk: those of BYOL and DINO, two views with
gradient and two without, which count a third. The other methods have fewer.

simulated is no self-supervised method but a yardstick: a basecaller trained on simulated reads and their labels, for as
many steps as scratch-long has more than scratch, and then fine-tuned, pore model and head, the pore model at a quarter
of the rate. Where the data are simulated, too, it is what more labels would bring. simulated+moco goes on from there
with MoCo on the raw reads, and is fine-tuned as simulated is, but with a new head; likewise the other methods. Their
control is simulated-new-head, which has no such stage, and no head of the simulated reads either.

--tune searches the learning rate of training from scratch on a part of the training reads. The grid takes the best of
each label fraction, in the mean over seeds, for all arms: the baseline is tuned, and the methods have to do with what
suits it.
"""

import contextlib
import csv
import errno
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmark/evidence.py` finds the modules below
# ruff: noqa: E402

import finetune_basecaller
from benchmark.plot_runs import read_metrics
from common import InputError
from common.data import Chunks, open_data
from common.files import make_once
from common.run import parse_args
from common.simulate import write_simulated

RUNS, RESULTS = Path("runs/evidence"), ROOT / "benchmark" / "results"
CHUNK, BATCH = 1200, 64  # of all pretraining, so that each method sees as many samples
PASSES = 8 / 3
# What differs from the scripts' defaults, which are for fifty epochs: in a few hundred steps the thesis's rates of 1e-5
# and 3e-5 move little, a queue of 8192 is never full of keys, and an average over 1000 steps stays where it began. At
# 1e-3 SimSiam's effective rank falls to 6 to 13 of 63, at 1e-4 to 25 to 28.
SHORT = {"lr": 1e-3, "warmup-steps": 25}
RECIPES = {
    "cpc": SHORT,
    "simclr": SHORT,
    "moco": SHORT | {"queue": 2048, "momentum": 0.99},
    "simsiam": SHORT | {"lr": 1e-4},
    "byol": SHORT | {"momentum": 0.99},
    "dino": SHORT | {"momentum": 0.99, "student-temperature": 0.5, "teacher-temperature": 0.3},
    "barlow": SHORT,
}
GENTLE = {"lr": 1e-4}  # on top of a recipe, to go on from weights that know bases already; the first rate tried
METHODS = ("scratch", "scratch-long", "simulated", *RECIPES)
ARMS = (*METHODS, "simulated-new-head", *(f"simulated+{method}" for method in RECIPES))
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
KEY = ("pretrain_command", "finetune_command")  # what determines a result: as run, but for folders
COLUMNS = (
    "name", "arm", "fraction", "seed", "size", "split", "validation_reads", "validation_chunks", "loss",
    "identity_mean", "identity_median", "finetuning_steps", "lr", "seconds", "pretraining_steps", "pretraining_seconds",
    "feature_spread", "effective_rank", "commit", "pretraining_commit", "hardware", *KEY,
)  # fmt: skip


@dataclass
class Args:
    name: str = "real"
    """of this collection of results"""
    pretraining_data: tuple[Path, ...] = ()
    """raw reads; without these and labelled ones: simulated reads, named simulated"""
    labelled_data: tuple[Path, ...] = ()
    """other reads, with bases"""
    size: Literal["thesis", "small", "tiny"] = "tiny"
    """size of the pore model"""
    methods: tuple[Literal[ARMS], ...] = METHODS
    """what to compare; further arms are simulated-new-head and simulated+METHOD"""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """shares of the labelled reads to train on"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of weights, views, order and the choice of labelled reads, in pretraining and fine-tuning"""
    pretraining_epochs: int = 1
    """of each method"""
    finetuning_steps: int = 400
    """of each arm but scratch-long"""
    lr: float | None = None
    """highest learning rate of fine-tuning; the best of --tune, or else the script's, if not given. With --tune: the
    only one to try"""
    tune: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """rather than the grid, find the learning rate for scratch at each of the fractions"""


# ------------------------------------------------------------------------------------------------------------- rows


def read_rows(name):
    """The rows of collection `name` from all machines, as dicts of strings. InputError if a file is none of them."""
    rows = []
    for path in sorted(RESULTS.glob(f"{name}-*.csv")):
        text = path.read_text()
        found = list(csv.DictReader(io.StringIO(text)))
        if not text.endswith("\n") or any(row.keys() != set(COLUMNS) or None in row.values() for row in found):
            raise InputError(f"{path}: has lines that are no rows of evidence.py; remove them, they will be made again")
        rows += [row for row in found if row["name"] == name]  # real-* are also those of a collection real-thesis
    return rows


def append_row(row):
    """Adds a row to this machine's file, whole or not at all."""
    path = RESULTS / f"{row['name']}-{platform.node()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:  # what a buffer keeps after an error would come later
        fcntl.lockf(file, fcntl.LOCK_EX)
        before, text = os.fstat(file.fileno()).st_size, io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not before:
            writer.writeheader()
        writer.writerow(row)
        try:
            text = text.getvalue().encode()
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, f"{path}: the disk is full")
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def key(row):
    return tuple(row[column] for column in KEY)


def best_rates(args):
    """{fraction: the learning rate with the highest mean identity among --tune's rows of this size and steps}.

    InputError if the rates of a fraction have been tried with different seeds, so that their means do not compare.
    """
    found, best = {}, {}
    for row in read_rows(args.name):
        if (row["split"], row["size"], row["finetuning_steps"]) == ("tune", args.size, str(args.finetuning_steps)):
            seeds = found.setdefault(float(row["fraction"]), {}).setdefault(float(row["lr"]), {})
            seeds[row["seed"]] = float(row["identity_mean"])
    for fraction, rates in found.items():
        for lr, seeds in rates.items():
            if missing := set().union(*rates.values()) - seeds.keys():
                raise InputError(
                    f"{args.name}: no row of --tune at {fraction} of the labels with lr {lr} and seed "
                    f"{', '.join(sorted(missing))}, with which other rates have been tried: let --tune end first"
                )
        means = {lr: statistics.mean(seeds.values()) for lr, seeds in rates.items()}
        best[fraction] = max(means, key=means.get)
    return best


# ------------------------------------------------------------------------------------------------------------- jobs


def result_of(command):
    """The file that a command of pretraining ends with."""
    return "basecaller_last.pt" if command.startswith("finetune_basecaller.py") else "pore_model.pt"


def stages(pretrain_command):
    """The commands, one after another, that a row's pretrain_command consists of; none of training from scratch."""
    return re.split(r" && (?=\w+\.py )", pretrain_command) if pretrain_command else []


def parts(arm):
    """What pretrains an arm, one after another."""
    return arm.removesuffix("-new-head").split("+")


def as_many_steps(args, pretraining_steps, batch):
    """How many steps of fine-tuning, of `batch` chunks, take as much as pretraining."""
    per_step = PASSES * BATCH * CHUNK / (batch * finetune_basecaller.RECIPES[args.size]["chunk_len"])
    return math.ceil(pretraining_steps * per_step)


def pretraining(args, arm, seed, steps):
    """The commands that pretrain an arm, joined by &&, and their steps.

    These are `steps` of a method, as many passes of simulated labels, or both.
    """
    commands, total = [], 0
    for part in parts(arm):
        if part == "simulated":
            recipe = finetune_basecaller.RECIPES[args.size]
            words = ["finetune_basecaller.py", "--data", simulated_reads("pretraining"), "--size", args.size]
            passes = as_many_steps(args, steps, recipe["batch_size"])
            words += ["--seed", seed, "--steps", passes]
            words += ["--lr", 2 * recipe["lr"]]  # --tune's best for all labels of tiny
            total += passes
        else:
            words = [f"{part}.py", "--data", *args.pretraining_data, "--size", args.size, "--chunk-len", CHUNK]
            words += ["--batch-size", BATCH, "--seed", seed, "--epochs", args.pretraining_epochs]
            recipe = RECIPES[part] | (GENTLE if commands else {})
            words += [word for name, value in recipe.items() for word in (f"--{name}", value)]
            words += ["--cosine", *(["--weights", result_of(commands[-1])] if commands else [])]
            total += steps
        commands.append(shlex.join(map(str, words)))
    return " && ".join(commands), total


def plan(args, pretraining_steps, batches):
    """The rows to be made, without what is known only afterwards; `batches`: {(fraction, seed): chunks a step}."""
    rates = {} if args.lr or args.tune else best_rates(args)
    default = args.lr or finetune_basecaller.RECIPES[args.size]["lr"]
    untuned = [fraction for fraction in args.fractions if fraction not in rates]
    if untuned and not (args.lr or args.tune):
        print(f"no rows of --tune for {', '.join(map(str, untuned))} of the labels: --lr {default} there")
    jobs = []
    for seed in args.seeds:
        for arm in ["scratch"] if args.tune else args.methods:
            for fraction in args.fractions:
                for lr in RATES if args.tune and not args.lr else [rates.get(fraction, default)]:
                    longer, batch = arm == "scratch-long", batches[fraction, seed]
                    steps = args.finetuning_steps + longer * as_many_steps(args, pretraining_steps, batch)
                    words = ["finetune_basecaller.py", "--data", *args.labelled_data, "--size", args.size]
                    words += ["--label-fraction", fraction, "--seed", seed, "--steps", steps, "--lr", lr]
                    words += ["--batch-size", batch]
                    words += ["--tune"] if args.tune else []
                    row = {"name": args.name, "arm": arm, "fraction": fraction, "seed": seed, "size": args.size}
                    row |= {"split": "tune" if args.tune else "validation", "finetuning_steps": steps, "lr": lr}
                    row |= {"pretraining_steps": 0, "pretrain_command": "", "pretraining_seconds": 0}
                    row |= dict.fromkeys(("feature_spread", "effective_rank", "pretraining_commit"), "")
                    if not arm.startswith("scratch"):
                        row["pretrain_command"], row["pretraining_steps"] = pretraining(
                            args, arm, seed, pretraining_steps
                        )
                        words += ["--weights", result_of(stages(row["pretrain_command"])[-1])]
                        words += ["--pore-model-lr", lr / 4] if arm.startswith("simulated") else []
                        words += ["--new-head"] if arm.endswith("-new-head") else []
                    jobs.append(row | {"finetune_command": shlex.join(map(str, words))})
    return jobs


@contextlib.contextmanager
def locked(path):
    """Whether this process has the lock `path`, until it and the scripts that it calls have ended, however they do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        os.set_inheritable(file.fileno(), True)  # a script may outlive this process, if that is killed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True


def call(words):
    """Runs a script to its end; its messages are shown. Ctrl-C lets it end with a checkpoint first."""
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    child = subprocess.Popen(words, **silent, process_group=0, close_fds=False)  # with the locks
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise


def complete(folder, command, result):
    """Runs `command` in `folder` until `result` is there, going on from a checkpoint. (commits, seconds) it took.

    InputError if it fails.
    """
    script, *words = shlex.split(command)
    attempts = folder / "attempts.jsonl"
    if not (folder / result).exists():
        if (folder / "checkpoint.pt").exists():
            words = ["--resume", folder]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that stopped too early to go on
            words += ["--run-dir", folder]
        start, commit = time.monotonic(), current_commit()
        try:
            code = call([sys.executable, str(ROOT / script), *map(str, words)])
        finally:
            if folder.exists():
                with open(attempts, "a") as file:
                    file.write(json.dumps({"commit": commit, "seconds": time.monotonic() - start}) + "\n")
        if code or not (folder / result).exists():
            raise InputError(f"python {command} failed, with exit code {code}")
    lines = [json.loads(line) for line in attempts.read_text().splitlines()] if attempts.exists() else []
    return ", ".join(dict.fromkeys(line["commit"] for line in lines)), round(sum(line["seconds"] for line in lines), 1)


def current_commit():
    """The commit that is checked out, with + if a script differs from it."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")


def hardware():
    """The GPU, or the CPU and the threads used of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{model}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def run_folder(row, *columns):
    """Where a row's pretraining (its pretrain_command alone) or fine-tuning (both commands) runs."""
    digest = blake2b("\n".join(row[column] for column in columns).encode(), digest_size=4).hexdigest()
    fraction = f"-{row['fraction']}" if len(columns) == 2 else ""
    return RUNS / row["name"] / f"{row['arm']}{fraction}-{row['seed']}-{digest}"


def pretrain(row):
    """Pretrains as the row says, unless that is done, and fills in what is known of it; returns the folder.

    None if another process is at it right now.
    """
    arms, commands, done, folder = parts(row["arm"]), stages(row["pretrain_command"]), [], None
    for number, command in enumerate(commands, 1):
        until = row | {"arm": "+".join(arms[:number]), "pretrain_command": " && ".join(commands[:number])}
        before, folder = folder, run_folder(until, "pretrain_command")
        with locked(folder.with_name(folder.name + ".lock")) as mine:
            if not mine:
                return None
            done.append(complete(folder, with_weights(command, before), result_of(command)))
    row["pretraining_commit"] = " && ".join(commit for commit, _ in done)
    row["pretraining_seconds"] = round(sum(seconds for _, seconds in done), 1)
    for line in read_metrics(folder):
        row |= {name: line[name] for name in ("feature_spread", "effective_rank") if name in line}
    return folder


def with_weights(command, folder):
    """The command with its --weights in `folder`."""
    return command.replace("--weights ", f"--weights {shlex.quote(str(folder))}/")


def do(row):
    """Makes a row, unless another process has. False if another process is at it, or at its pretraining, right now."""
    folder = run_folder(row, *KEY)
    with locked(folder.with_name(folder.name + ".lock")) as mine:
        if not mine:
            return False
        if key(row) in map(key, read_rows(row["name"])):
            return True
        command = row["finetune_command"]
        if row["pretrain_command"]:
            pretrained = pretrain(row)
            if pretrained is None:
                return False
            command = with_weights(command, pretrained)
        row["commit"], row["seconds"] = complete(folder, command, "basecaller_last.pt")
        last = [line for line in read_metrics(folder) if "validation/loss" in line][-1]
        row |= {name: last[f"validation/{name}"] for name in ("loss", "identity_mean", "identity_median")}
        append_row(row | {"hardware": hardware()})
        for weights in folder.glob("*.pt"):  # the log and the picture stay
            weights.unlink()
        return True


def remaining(jobs, rows):
    """Words for how long `jobs` will take, from the rows of this hardware and size; nothing if there are none yet."""
    rows = [row for row in rows if (row["hardware"], row["size"]) == (hardware(), jobs[0]["size"])] if jobs else []
    if not rows:
        return ""
    per_step = sum(float(row["seconds"]) for row in rows) / sum(int(row["finetuning_steps"]) for row in rows)
    seconds = per_step * sum(job["finetuning_steps"] for job in jobs)
    done, left = ([stage for row in some for stage in stages(row["pretrain_command"])] for some in (rows, jobs))
    if done:
        seconds += sum(float(row["pretraining_seconds"]) for row in rows) / len(done) * len(set(left) - set(done))
    return f"; about {seconds / 3600:.1f} hours more"


# ------------------------------------------------------------------------------------------------------------- main


def simulated_reads(kind):
    """A file of 1000 reads, for "pretraining", or one of 300 others, "labelled"; made once."""
    reads, seed = {"pretraining": (1000, 1), "labelled": (300, 2)}[kind]
    path = RUNS / "simulated" / f"{kind}.hdf5"
    make_once(path, lambda: write_simulated(path, reads, seed=seed))
    return path


def main(args):
    """The number of jobs that failed."""
    if bool(args.pretraining_data) != bool(args.labelled_data):
        raise InputError("give both --pretraining-data and --labelled-data, or neither for simulated reads")
    if not args.labelled_data:
        args.name = "simulated"
        args.pretraining_data, args.labelled_data = ((simulated_reads(k),) for k in ("pretraining", "labelled"))
    # here rather than in each script, so that what is wrong with the data is said before hours have passed
    recipe, stores = finetune_basecaller.RECIPES[args.size], open_data(args.labelled_data)
    labelled = partial(Chunks, stores, recipe["chunk_len"], labelled=True)
    validation = labelled("training", share="finetuning") if args.tune else labelled("validation")
    batches, share = {}, "pretraining" if args.tune else None
    for fraction, seed in product(args.fractions, args.seeds):  # each seed takes other reads
        chunks = labelled("training", share=share, label_fraction=fraction, label_seed=seed)
        batches[fraction, seed] = min(recipe["batch_size"], len(chunks))  # a few reads may have less than a batch
    steps_per_epoch = Chunks(open_data(args.pretraining_data), CHUNK, "training").steps_per_epoch(BATCH)
    jobs = plan(args, args.pretraining_epochs * steps_per_epoch, batches)
    for row in jobs:
        row |= {"validation_reads": validation.number_of_reads, "validation_chunks": len(validation)}
    have = set(map(key, read_rows(args.name)))
    left = [row for row in jobs if key(row) not in have]
    print(f"{args.name}: {len(jobs)} jobs, {len(jobs) - len(left)} of them done", flush=True)
    failed = []
    while left:
        waiting = []
        for number, row in enumerate(left):
            job = f"{row['arm']}, {row['fraction']:g} of the labels, lr {row['lr']:g}, seed {row['seed']}"
            try:
                if not do(row):
                    waiting.append(row)
                    continue
            except InputError as error:
                failed.append(job)
                print(f"{job}: {error}", file=sys.stderr)
                continue
            result = f"{row['identity_mean']:.2f} % mean identity" if "identity_mean" in row else "made elsewhere"
            rest = remaining(waiting + left[number + 1 :], read_rows(args.name))
            print(f"{job}: {result}{rest}", flush=True)
        if len(waiting) == len(left):
            time.sleep(10)  # other processes have all that is left
        left = waiting
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(1 if main(parse_args(Args)) else 0)
