"""What pretraining brings, in a few minutes, with no data and no GPU: `make demo`.

Simulated reads -> masked events on their current alone -> a basecaller fine-tuned from it with the labels of a single
read, and one from scratch -> a table and two pictures. `python -m benchmark.demo --seed 1` does it with other reads.

The pore is simulate.py's easy one: 6 to 12 samples per base, a third of the noise. So a few minutes are enough. What
pretraining brings to real reads: docs/results.md.
"""

import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import tyro

from benchmark.plot_runs import plot, table


def run(title, command):
    """Says what comes, runs it with this Python, and stops the demo if it fails."""
    print(f"\n== {title}\n$ python {command}", flush=True)
    subprocess.run([sys.executable, *shlex.split(command)], check=True)


def main(seed: int = 0):
    """seed: of the reads, the weights and the choice of the labelled read."""
    folder = Path("runs") / f"demo__{seed}__{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    reads = folder / "reads.hdf5"
    run("1/4 simulate 120 reads of an easy pore", f"-m common.reads.simulate {reads} --reads 120 --easy --seed {seed}")
    ours = f"--data {reads} --size tiny --seed {seed}"
    run(
        "2/4 pretrain a pore model: hide events of the current, predict their levels",
        f"masked.py {ours} --chunk-len 600 --batch-size 32 --lr 3e-3 --warmup-steps 30 --cosine --epochs 8 "
        f"--run-dir {folder}/masked",
    )
    tuning = (
        f"finetune_basecaller.py {ours} --label-fraction 0.01 --batch-size 16 --lr 8e-3 --steps 150 --mask-chance 0"
    )
    weights = f"--weights {folder}/masked/pore_model.pt"
    run(
        "3/4 fine-tune it into a basecaller, with one labelled read", f"{tuning} {weights} --run-dir {folder}/finetuned"
    )
    run("4/4 the same from scratch: the baseline", f"{tuning} --run-dir {folder}/scratch")

    runs = {"from scratch": folder / "scratch", "masked events, then fine-tuned": folder / "finetuned"}
    plot(runs, folder / "comparison.png")
    (folder / "comparison.md").write_text(table(runs) + "\n")
    print(f"\n== Validation on reads that no step has seen\n{table(runs)}")
    print(f"\ntable: {folder}/comparison.md\npictures: {folder}/comparison.png, {folder}/masked/events.png")
    print(
        "Shown: with the labels of one read of an easy, simulated pore, pretraining on current alone helps. Not shown: "
        "how much it helps with real reads, or with many labels. See docs/results.md."
    )


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {' '.join(error.cmd[1:])} failed; its message is above")
