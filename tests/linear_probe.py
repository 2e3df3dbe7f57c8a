"""How much a frozen pore model's features tell of the base in the pore, with few labels: a linear probe."""

import numpy as np
import torch
import torch.nn.functional as F

HALF = 100  # samples before and after the central one
EVERY = 48  # samples from one example to the next


def examples_of(store):
    """Chunks (n, 200) of a labelled read store and the base in the pore at the centre of each, (n,) of 0-3."""
    chunks, bases = [], []
    for read in store.reads:
        signal = store.signal[read["start"] : read["start"] + read["length"]]
        labels = slice(read["bases_start"], read["bases_start"] + read["bases_length"])
        starts = store.base_starts[labels]
        for centre in range(starts[0] + HALF, len(signal) - HALF, EVERY):
            chunks.append(signal[centre - HALF : centre + HALF])
            bases.append(store.bases[labels][np.searchsorted(starts, centre, "right") - 1] - 1)
    return torch.tensor(np.stack(chunks), dtype=torch.float32), torch.tensor(np.array(bases), dtype=torch.long)


@torch.no_grad()
def probe_accuracy(pore_model, examples, labels=100, draws=20):
    """Percent of bases told by ridge regression on the central frame's context, from `labels` random examples.

    The first half of the examples is for training, the second, of other reads but one, for testing.
    """
    chunks, bases = examples
    pore_model.eval()
    features = torch.cat([pore_model(part)[0][:, HALF // 8] for part in chunks.split(256)]).double()  # (n, C)
    half = len(bases) // 2
    targets = F.one_hot(bases, 4).double()
    correct = 0.0
    for draw in range(draws):
        chosen = torch.randperm(half, generator=torch.Generator().manual_seed(draw))[:labels]
        mean, std = features[chosen].mean(0), features[chosen].std(0) + 1e-6
        x = F.pad((features - mean) / std, (0, 1), value=1.0)
        a = x[chosen]
        weights = torch.linalg.solve(a.T @ a + 10 * torch.eye(a.shape[1], dtype=a.dtype), a.T @ targets[chosen])
        correct += (x[half:] @ weights).argmax(1).eq(bases[half:]).double().mean().item()
    return 100 * correct / draws
