"""SimSiam as it is, without its stop-gradient, and without its predictor: the table of docs/metrics.md.

python -m benchmark.collapse runs/collapse
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import simsiam
from benchmark.plot_runs import read_metrics
from common.reads.simulate import write_simulated


def loss_without_stop_gradient(z1, z2, p1, p2):
    """simsiam_loss, but with gradients into z1 and z2."""
    cosine1, cosine2 = F.cosine_similarity(z1, p2).mean(), F.cosine_similarity(z2, p1).mean()
    return 2 - cosine1 - cosine2, {"cosine1": cosine1, "cosine2": cosine2}


def collapse_args(data, folder):
    """Small and at a high learning rate, so that 60 steps are enough."""
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 200, "batch_size": 32, "embedding_dim": 64}
    return simsiam.Args(data=(data,), run_dir=folder, lr=1e-2, max_steps=60, **settings)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    write_simulated(out / "reads.hdf5", reads=12, mean_bases=1000, seed=1)
    as_it_is, predictor = simsiam.simsiam_loss, simsiam.Predictor
    rows = []
    for name, loss, part in (
        ("as it is", as_it_is, predictor),
        ("no stop-gradient", loss_without_stop_gradient, predictor),
        ("no predictor", as_it_is, torch.nn.Identity),
    ):
        simsiam.simsiam_loss, simsiam.Predictor = loss, part
        simsiam.main(collapse_args(out / "reads.hdf5", out / name.replace(" ", "_")))
        steps = [line for line in read_metrics(out / name.replace(" ", "_")) if "loss" in line]
        for key in ("loss", "feature_spread", "effective_rank"):
            rows.append(f"| {name}: {key} | " + " | ".join(f"{line[key]:.3g}" for line in steps) + " |")
    print("\n".join(rows))
