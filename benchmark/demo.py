"""The whole of PoreSSL in a few minutes, with no data and no GPU: `make demo`.

Simulated reads -> Barlow Twins -> a basecaller fine-tuned from it, and one from scratch -> a table and a picture.

The pore is simulate.py's easy one: 6 to 12 samples per base, a third of the noise. So a few minutes are enough. On real
reads this basecaller trains for half an hour (docs/results/studies.md).
"""

import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from benchmark.plot_runs import plot, table

OURS = "--size tiny --chunk-len 1200 --shared-data"


def run(title, command):
    """Says what comes, runs it with this Python, and stops the demo if it fails."""
    print(f"\n== {title}\n$ python {command}", flush=True)
    subprocess.run([sys.executable, *shlex.split(command)], check=True)


def main():
    folder = Path("runs") / f"demo__{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    reads = folder / "reads.hdf5"
    run("1/4 simulate 400 reads of an easy pore", f"-m common.reads.simulate {reads} --reads 400 --easy")
    run(
        "2/4 pretrain a pore model on their current alone",
        f"barlow.py --data {reads} {OURS} --lr 1e-3 --max-steps 100 --run-dir {folder}/barlow",
    )
    tuning = f"finetune_basecaller.py --data {reads} {OURS} --epochs 5"
    weights = f"--weights {folder}/barlow/pore_model.pt"
    run("3/4 fine-tune it into a basecaller", f"{tuning} {weights} --run-dir {folder}/finetuned")
    run("4/4 the same from scratch: the baseline", f"{tuning} --run-dir {folder}/scratch")

    runs = {"from scratch": folder / "scratch", "Barlow Twins, then fine-tuned": folder / "finetuned"}
    plot(runs, folder / "comparison.png")
    (folder / "comparison.md").write_text(table(runs) + "\n")
    print(f"\n== Validation on reads that no step has seen\n{table(runs)}")
    print(f"\ntable: {folder}/comparison.md\npicture: {folder}/comparison.png")
    print("One seed and a hundred steps of pretraining show how it is done, not what it brings: see docs/results.md.")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {' '.join(error.cmd[1:])} failed; its message is above")
