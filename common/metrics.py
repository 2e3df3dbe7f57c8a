"""What is logged of the embeddings to see a collapse: feature spread and effective rank."""

import torch


def feature_spread(embeddings):
    """Mean over dimensions of the standard deviation of the L2-normalised embeddings (N, R), times sqrt(R).

    About 1 for directions spread evenly over the sphere, 0 when all embeddings point the same way
    (Chen & He 2021, "Exploring Simple Siamese Representation Learning", figure 2).
    """
    unit = torch.nn.functional.normalize(embeddings.detach().float(), dim=1)
    return float(unit.std(0, correction=0).mean() * embeddings.shape[1] ** 0.5)


def effective_rank(embeddings):
    """exp of the entropy of the normalised singular values of the centred embeddings (N, R): 1 to min(N - 1, R).

    Roy & Vetterli 2007, "The effective rank", definition 1. 0 when all embeddings are equal. On the CPU, since MPS has
    no float64; by the smaller Gram matrix, which takes an eighth of the time of an SVD at 512 x 2048.
    """
    embeddings = embeddings.detach().cpu().double()
    centred = embeddings - embeddings.mean(0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if total < 1e-6 * embeddings.norm().clamp(min=1e-12):
        return 0.0
    p = singular / total
    return float(torch.exp(torch.special.entr(p).sum()))
