"""How much memory a training step takes, by a formula, and how much there is."""

import os

import torch

from common.device import autocast
from common.pore_model import HOP, ROWS, works_by_row


def step_memory(pore_model, models, optimizer, rows, samples, passes, precision, checkpointing):
    """Bytes that a training step takes at most: weights, and what is kept for the backward pass.

    rows, samples: chunks of this process, and the width of a view; passes: views of all chunks that have gradients.
    Heads and losses are left out, since they take little where memory is short. On a CPU rows are cut to their own
    length, which saves about as much as the gaps between pieces of memory take.
    """
    weight = pore_model.norm.weight
    with autocast(weight.device, precision):
        half = torch.is_autocast_enabled(weight.device.type)
    number = 2 if half else 4  # bytes, of what convolutions and products make; of the residual stream always 4
    layer, channels = pore_model.layers[0], pore_model.channels
    width = layer.feed_forward[0].out_features
    mask = (number if works_by_row(weight) else 1) * (layer.dropout.p > 0)  # bytes, of each number that may be dropped

    # a frame: residual stream and mask, twice; inputs of three products, queries, keys, values; feed-forward, twice
    of_layer = channels * (2 * (4 + mask) + 6 * number) + 2 * width * number
    backward = channels * 8 + 2 * width * number  # gradients within a layer
    kept = channels * (8 + mask + 2 * number)  # before the first layer and after the last
    if checkpointing:
        kept += len(pore_model.layers) * 4 * channels
        backward += of_layer
    else:
        kept += len(pore_model.layers) * of_layer
    stride = 1
    for block in pore_model.encoder.blocks:  # inputs of BatchNorm, in float32, of the activation, of what comes next
        stride *= block.conv.stride[0]
        kept += HOP // stride * block.conv.out_channels * (4 + 2 * number)

    at_once = min(rows, ROWS) if works_by_row(weight) else rows
    frames = -(-samples // HOP)
    trained = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    weights = sum(x.nbytes for x in models.state_dict().values()) + 2 * trained  # Adam's moments
    if half:
        weights += trained / 2  # autocast keeps a copy
    # gradients of the step before are there until the backward pass begins
    return weights + frames * passes * rows * kept + max(trained, frames * at_once * backward)


def whole_memory(device):
    """Bytes of memory of `device`, whoever has them now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
