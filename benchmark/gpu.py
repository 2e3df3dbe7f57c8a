"""How PoreSSL does on your GPU, in one folder to attach to an issue.

    python -m benchmark.gpu --data reads/ --labelled labelled.hdf5 --tests other_genome.hdf5

1. The tests that need a GPU.
2. The speed of each method's step, eager and compiled (benchmark/speed.py).
3. What pretraining brings: Barlow Twins as in the thesis and masked events on --data, then fine-tuning from each and
   from scratch with 1, 10 and 100 % of the labelled reads, tested on --tests (benchmark/unseen.py).

runs/gpu__TIME/report has report.md with the tables, the pictures, and all that was printed. A part that fails is said
there, and the others go on. Without a GPU it runs on the CPU: --size tiny --epochs 1 --steps 10 to see that it does.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt

from benchmark import plot_runs, plot_unseen
from benchmark.evidence import ROOT, current_commit, folder_of
from benchmark.speed import PASSES
from common.args import parse_args
from common.chunks import Chunks, open_data
from finetune_basecaller import RECIPES

FRACTIONS = (0.01, 0.1, 1.0)
# Barlow Twins with the thesis's learning rate and batch. Masked events were tried with the tiny model alone; a quarter
# of its learning rate is a guess
METHODS = {
    "Barlow Twins": "barlow.py --lr 1e-5 --batch-size 64",
    "masked events": "masked.py --lr 5e-4 --warmup-steps 50 --cosine",
}


@dataclass
class Args:
    data: tuple[Path, ...]
    """raw reads, to pretrain on"""
    labelled: tuple[Path, ...]
    """labelled reads, to fine-tune on"""
    tests: tuple[Path, ...]
    """labelled reads of another genome, to test on"""
    size: Literal["thesis", "small", "tiny"] = "thesis"
    """size of the pore model"""
    epochs: PositiveInt = 10
    """of pretraining"""
    steps: PositiveInt = 1000
    """of each fine-tuning"""


def run(words, log):
    """Runs `python words` in a process of its own, in the folder above that of `log`, which gets what it prints.

    Returns the exit code and the lines.
    """
    title = f"$ python {shlex.join(words)}\n"
    print(f"\n{title}", end="", flush=True)
    lines, environment = [], os.environ | {"PYTHONPATH": str(ROOT)}
    with open(log, "a") as file:
        file.write(title)
        with subprocess.Popen(
            [sys.executable, *words],
            cwd=log.parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                lines.append(line.rstrip("\n"))
    return process.returncode, lines


def first_line(*command):
    """What a program prints first; unknown if there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or "unknown"
    except OSError:
        return "unknown"


def facts(args):
    gpu = torch.cuda.is_available()
    card = "none"
    if gpu:
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB"
    driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "none"
    of = {"card": card, "driver": driver, "torch": torch.__version__, "CUDA of torch": torch.version.cuda or "none"}
    of |= {"Python": platform.python_version(), "system": f"{platform.platform()}, {os.cpu_count()} cores"}
    of |= {"commit": f"{current_commit()} (+: scripts differ from it)"}
    of |= {"model": f"{args.size}, {args.epochs} epochs of pretraining, {args.steps} steps of fine-tuning"}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in of.items())])


def check(args, report):
    code, lines = run(["-m", "pytest", "-q", "-rs", str(ROOT / "tests/test_real_gpu.py")], report / "tests.txt")
    if code:
        yield "**Failed**: tests.txt says how."
    yield lines[-1] if lines else "Nothing was printed."


def speed(args, report):
    """A process for each method, eager and compiled, so that one which fails leaves the others."""
    rows = ["| | compiled | chunks per step | chunks / s | ms a step | step / bound | of matmul | peak memory, GB |"]
    rows.append("|---" * 8 + "|")
    ceilings = []
    for compiled, method in product((False, True)[: 1 + torch.cuda.is_available()], PASSES):
        words = ["-m", "benchmark.speed", "--sizes", args.size, "--methods", method, "--compile", str(compiled)]
        code, lines = run(words, report / "speed.txt")
        start = f"| {method} | {'yes' if compiled else 'no'} |"
        for row in [json.loads(line) for line in lines if line.startswith("{")]:
            ceilings.append(f"{row['matmul'] / 1e12:.3g} ({row['precision']})")
            cells = ["", "out of memory", "", "", ""]
            if "step" in row:
                cells = [f"{row['chunks_per_second']:.4g}", f"{1000 * row['step']:.4g}", f"{row['bound_ratio']:.2f}"]
                cells += [f"{100 * row['utilisation']:.0f} %", f"{(row['peak_memory'] or 0) / 1000:.2f}"]
            rows.append(f"{start} {row['batch_size']} | {' | '.join(cells)} |")
        if code:
            rows.append(f"{start} | failed: speed.txt says how | | | | |")
    yield "\n".join(rows)
    yield "On a GPU the second row of a method that is not compiled has the largest power of two that fits."
    yield f"Large matrix products, TFLOP/s, measured before each method: {', '.join(dict.fromkeys(ceilings))}."


def commands_of(args, fraction):
    """{arm: its commands} with this share of the labelled reads."""
    recipe, stores = RECIPES[args.size], open_data(args.labelled)
    chunks = Chunks(stores, recipe["chunk_len"], "training", labelled=True, label_fraction=fraction)
    usual = f"--size {args.size} --seed 0"
    tune = f"finetune_basecaller.py --data {shlex.join(map(str, args.labelled))} {usual} --label-fraction {fraction} "
    tune += f"--steps {args.steps} --batch-size {min(recipe['batch_size'], len(chunks))}"  # a few reads may have less
    arms = {"from scratch": (tune,)}
    for name, method in METHODS.items():
        pretrain = f"{method} --data {shlex.join(map(str, args.data))} {usual} --epochs {args.epochs}"
        arms[name] = pretrain, f"{tune} --weights pore_model.pt"
    return arms


def learning(args, report):
    name, folders = str(report / "identities"), {}  # an absolute path, so that the rows go there
    for fraction in FRACTIONS:
        for arm, commands in commands_of(args, fraction).items():
            words = ["-m", "benchmark.unseen", "--name", name, "--tests", *map(str, args.tests), "--commands"]
            code, _ = run([*words, *commands], report / "learning.txt")
            if code:
                yield f"**Failed**: {arm}, {100 * fraction:g} % of the labels. learning.txt says how."
                continue
            if len(commands) > 1:
                folders[arm] = report.parent / folder_of(commands[:1])
            folders[f"{arm}, {100 * fraction:g} %"] = report.parent / folder_of(commands)
    arms = plot_unseen.read_arms(name)
    yield "\n".join(plot_unseen.table(arms))
    if folders:
        yield plot_runs.table(folders)
        plot_runs.plot(folders, report / "runs.png")
    if (folders.get("masked events", Path()) / "events.png").exists():
        shutil.copy(folders["masked events"] / "events.png", report)
    plot_unseen.plot(arms, report / "gains.png")


PARTS = {"The tests that need a GPU": check, "Speed": speed, "What pretraining brings": learning}


def main(args):
    """The exit code: 0, or 1 if something failed."""
    for name in ("data", "labelled", "tests"):
        setattr(args, name, tuple(path.resolve() for path in getattr(args, name)))  # the parts run in another folder
        open_data(getattr(args, name))  # what is wrong with them is said at once
    report = Path(f"runs/gpu__{datetime.now():%Y%m%d-%H%M%S}/report").resolve()
    report.mkdir(parents=True)
    text = f"# PoreSSL on a GPU\n\n{facts(args)}\n"
    for title, part in PARTS.items():
        start = time.monotonic()
        paragraphs = []
        try:
            for paragraph in part(args, report):
                paragraphs.append(paragraph)
        except Exception as error:  # whatever it is, the other parts are worth having
            paragraphs.append(f"**Failed**: {type(error).__name__}: {error}")
        text += f"\n## {title}\n\n" + "\n\n".join(paragraphs)
        text += f"\n\nThis took {(time.monotonic() - start) / 60:.1f} minutes.\n"
        (report / "report.md").write_text(text)
    print(f"\n{text}\nThe folder to attach: {report}")
    return int("failed" in text.lower())


if __name__ == "__main__":
    sys.exit(main(parse_args(Args)))
