"""The largest batch that 24 and 80 GB of a GPU take, as predicted by the formula of common/memory.py.

python -m benchmark.largest_batch

Of each script with its own defaults (thesis size, chunks of 3600 samples), in bfloat16, with and without activation
checkpointing: a table in Markdown. Needs no GPU. A tenth of the memory is left to CUDA, cuBLAS and gaps.
"""

import importlib
import itertools
import tempfile
from pathlib import Path
from unittest.mock import patch

from benchmark.speed import PASSES, Done
from common import memory


def largest(limit, *given):
    """The most rows, in eights, whose step takes no more than `limit` bytes."""
    pore_model, models, optimizer, samples, trained, checkpointing = given
    for rows in itertools.count(8, 8):
        if memory.step_memory(pore_model, models, optimizer, rows, samples, trained, "bf16", checkpointing) > limit:
            return rows - 8


def main():
    print("| | 24 GB | with checkpointing | 80 GB | with checkpointing |\n|---|---|---|---|---|")
    for name in (*PASSES, "finetune_basecaller"):
        script = importlib.import_module(name)

        def say(pore_model, models, optimizer, chunks, args, samples, trained, averaged=0):
            found = (
                largest(0.9 * gigabytes * 1e9, pore_model, models, optimizer, samples, trained, checkpointing)
                for gigabytes, checkpointing in itertools.product((24, 80), (False, True))
            )
            print("|", " | ".join([f"`{name}.py`", *map(str, found)]), "|")
            raise Done

        as_on_a_gpu = patch.object(memory, "works_by_row", lambda _: False)
        with tempfile.TemporaryDirectory() as folder, patch.object(script, "say_cost", say), as_on_a_gpu:
            try:
                script.main(script.Args(device="cpu", run_dir=Path(folder) / "run"))
            except Done:
                continue


if __name__ == "__main__":
    main()
