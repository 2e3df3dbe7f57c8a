"""Augmentations. Each takes signal (N, L) and lengths (N,) of valid samples, and returns both anew, padding zero.

All randomness comes from torch's global generator. The thesis's view is noise, then drop-points (its section 5.2); its
five others did not help there. gain_offset and time_warp imitate more of what differs between reads; mask_spans hides
parts, and returns which. docs/augmentations.md has pictures.
"""

import math

import torch
import torch.nn.functional as F

from common.pore_model import HOP, valid_positions


def noise(signal, lengths, factor=0.25):
    """Adds white noise of standard deviation `factor`, in normalised units, to the valid samples."""
    noisy = signal + factor * torch.randn_like(signal)
    return noisy.where(valid_positions(lengths, signal.shape[1]), 0), lengths


def width_kept(width, low):
    """The width of what drop_points makes of `width` samples. The host knows it without waiting for a GPU."""
    kept = width * (1 - low)
    return min(width, HOP * math.ceil(max(1, kept + 6 * math.sqrt(kept * low)) / HOP))


def drop_points(signal, lengths, low=0.25, high=0.38):
    """Drops each sample with a chance drawn for each row from U(low, high) and moves the rest together.

    It acts as a local change of the strand's speed. Rows end up shorter, padded on the right with zeros.

    So does the batch, to whole frames that have room for six standard deviations more than rows keep at `low`. What
    does not fit is cut: nothing in a million rows. A compiled pore model meets no other width.
    """
    rows, width = signal.shape
    room = width_kept(width, low)
    chance = torch.empty(rows, 1, device=signal.device).uniform_(low, high)
    keep = (torch.rand_like(signal) >= chance) & valid_positions(lengths, width)
    # dropped samples go to one extra column, cut off again
    place = torch.where(keep, (keep.cumsum(1) - 1).clamp(max=room), room)
    moved = signal.new_zeros(rows, room + 1).scatter_(1, place, signal)[:, :room]
    return moved.contiguous(), keep.sum(1).clamp(1, room)


def shuffle(signal, lengths, segments=8):
    """Cuts each row into `segments` equal parts and puts them together in a random order."""
    rows, width = signal.shape
    position = torch.arange(width, device=signal.device)
    segment = (position * segments // lengths[:, None]).clamp(max=segments)  # padding: one more segment, kept last
    rank = torch.rand(rows, segments, device=signal.device).argsort(1)
    rank = F.pad(rank, (0, 1), value=segments)
    moved = signal.gather(1, rank.gather(1, segment).argsort(dim=1, stable=True))
    return moved.where(valid_positions(lengths, width), 0), lengths


def moving_average(signal, lengths, width=7):
    """Replaces each sample by the mean of the valid ones among the `width` (odd) around it."""
    valid = valid_positions(lengths, signal.shape[1])
    signal, valid = signal.where(valid, 0), valid.to(signal.dtype)

    def window(x):
        return F.avg_pool1d(x[:, None], width, stride=1, padding=width // 2)[:, 0]

    return window(signal) / window(valid).clamp(min=1e-6) * valid, lengths


def random_crop(signal, lengths, smallest=0.5):
    """Cuts a part of U(smallest, 1) of the row at a random place and stretches it back by linear interpolation."""
    rows, width = signal.shape
    part = torch.empty(rows, 1, device=signal.device).uniform_(smallest, 1.0)
    last = (lengths[:, None] - 1).to(signal.dtype)
    start = torch.rand(rows, 1, device=signal.device) * (1 - part) * last
    source = (start + part * torch.arange(width, device=signal.device)).clamp(max=last)
    left = source.floor().long()
    right = (left + 1).minimum(lengths[:, None] - 1)
    stretched = torch.lerp(signal.gather(1, left), signal.gather(1, right), source - left)
    return stretched * valid_positions(lengths, width), lengths


def flip_time(signal, lengths):
    """Turns a random half of the rows end to end."""
    flipped = (lengths[:, None] - 1 - torch.arange(signal.shape[1], device=signal.device)).clamp(min=0)
    chosen = torch.rand(len(signal), 1, device=signal.device) < 0.5
    turned = torch.where(chosen, signal.gather(1, flipped), signal)
    return turned.where(valid_positions(lengths, signal.shape[1]), 0), lengths


def flip_current(signal, lengths):
    """Changes the sign of a random half of the rows."""
    sign = 1 - 2 * (torch.rand(len(signal), 1, device=signal.device) < 0.5).to(signal.dtype)
    return (signal * sign).where(valid_positions(lengths, signal.shape[1]), 0), lengths


def gain_offset(signal, lengths, gain=0.2, offset=0.2):
    """Scales each row by 1 + gain * N(0, 1) and moves it by offset * N(0, 1), as calibration and normalisation err."""
    rows = (len(signal), 1)
    signal = signal * (1 + gain * torch.randn(rows, device=signal.device, dtype=signal.dtype))
    signal = signal + offset * torch.randn(rows, device=signal.device, dtype=signal.dtype)
    return signal.where(valid_positions(lengths, signal.shape[1]), 0), lengths


def time_warp(signal, lengths, strength=0.7, stretch=32):
    """Runs through each row at a speed that changes every `stretch` samples, from first to last sample in all.

    Speeds are exp(strength * N(0, 1)), relative to their mean. Samples are repeated or skipped, not interpolated.
    """
    rows, width = signal.shape
    speed = (strength * torch.randn(rows, -(-width // stretch), device=signal.device)).exp()
    place = speed.repeat_interleave(stretch, 1)[:, :width].cumsum(1)
    place = place - place[:, :1]
    last = lengths[:, None] - 1
    end = place.gather(1, last).clamp(min=1e-6)
    source = (place / end * last).round().long().minimum(last)
    return signal.gather(1, source).where(valid_positions(lengths, width), 0), lengths


def mask_spans(signal, lengths, share=0.3, span=40):
    """Sets spans of `span` samples to 0, the median current; they begin anywhere and cover `share` on average.

    Returns signal, lengths and which samples are masked, (N, L) bool.
    """
    rows, width = signal.shape
    chance = 1 - (1 - share) ** (1 / span)  # of a span to begin at a sample
    begun = (torch.rand(rows, width + span - 1, device=signal.device) < chance).cumsum(1)
    valid = valid_positions(lengths, width)
    masked = (begun[:, span - 1 :] > F.pad(begun, (1, 0))[:, :width]) & valid
    return signal.where(valid & ~masked, 0), lengths, masked
