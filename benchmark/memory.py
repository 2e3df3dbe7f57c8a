"""Does memory grow with the data? Barlow Twins for some steps on a read store of 50 MB and on one of 5 GB.

python -m benchmark.memory

Makes both stores, of simulated current, in a temporary folder. What counts is the memory that the process itself has
taken (RssAnon in /proc, so Linux alone): pages of the store that the system keeps in memory are given back when needed.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.reads.simulate import simulate_read
from common.reads.store import StoreWriter

READ = 50_000  # samples of a read; 100 kB
SIZES = {"50 MB": 500, "5 GB": 50_000}  # reads


def make_store(folder, reads):
    """A read store of `reads` reads, which differ by where in a long signal they begin."""
    rng = np.random.default_rng(0)
    signal = simulate_read(rng, rng.integers(0, 4, 200_000))[0].astype(np.float16)
    folder.mkdir()
    store = StoreWriter(folder)
    for number in tqdm(range(reads), desc=f"making {folder.name}", unit=" reads"):
        start = rng.integers(len(signal) - READ)
        store.add(f"read-{number}", signal[start : start + READ], sample_rate=4000, split=int(number < 10))
    store.close()


def peak(command):
    """Runs `command`, and gives the most memory that its process took, in MB."""
    highest = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    highest = max(highest, int(line.split()[1]))
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return highest / 1024


def main():
    print("| read store | memory |\n|---|---|")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name, reads in SIZES.items():
            store = Path(folder) / name
            make_store(store, reads)
            command = [sys.executable, "barlow.py", "--data", store, "--size", "tiny", "--batch-size", "16"]
            megabytes = peak([*command, "--max-steps", "20", "--run-dir", f"{store} run"])
            print(f"| {name} | {megabytes:.0f} MB |")


if __name__ == "__main__":
    main()
