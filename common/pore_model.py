"""The pore model: a convolutional feature encoder and a transformer, exact on padded rows; and its weights from a file.

"Pore model" is the thesis's word for this network; in this field it is also the name of a table of k-mer levels.

Rows of a batch differ in length (drop-point shortens each by its own amount). Everything here computes, for a padded
row, what it would compute for that row alone: padding is set to zero after every convolution, BatchNorm counts valid
positions only, and attention does not see padded keys. Shapes: N chunks, L samples, T frames, C channels.
"""

import warnings
import zipfile
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import InputError
from common.device import all_gather, part_of, sum_over_ranks, world_size

# cuDNN's attention with a mask has gradients that are not numbers, on an H100 where 64 frames are left over from 128s
# (https://github.com/pytorch/pytorch/issues/196678)
torch.backends.cuda.enable_cudnn_sdp(False)

# The width of a head is the same everywhere, so the weights alone tell how many heads there are.
HEAD_WIDTH = 64
HOP = 8  # samples per frame
ROWS = 8  # of like length, that the transformer takes at once on a CPU
ENCODERS = {"wide": ((3, 2), (3, 2), (3, 2), (3, 1)), "thin": ((8, 8),)}  # (kernel, stride) of each block
SIZES = {
    "thesis": {"channels": 512, "layers": 10, "feed_forward": 2048},
    "small": {"channels": 256, "layers": 4, "feed_forward": 1024},
    "tiny": {"channels": 128, "layers": 3, "feed_forward": 128},
}


def frames_of(length):
    """Frames that the encoder makes of `length` samples (an int or a tensor of them), the last one begun included."""
    return (length + HOP - 1) // HOP


def valid_positions(lengths, width):
    """(N,) lengths -> (N, width) bool, True before each row's length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def works_by_row(x):
    """Whether work on x is to follow the lengths of its rows: on a CPU. On a GPU, or compiled, shapes stay the same."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the valid positions of x (N, C, T) or (N, C), in all processes' parts of the batch.

    `mask` (N, 1, T) bool says which are valid, None all. x must be zero at the padding; what comes out there is not
    zero and has to be masked again.
    """

    def forward(self, x, mask=None):
        if self.training and x.ndim == 2:  # a head's: small enough for each process to have the whole batch
            (whole,) = all_gather(x)
            return super().forward(whole)[part_of(len(whole))]
        if not self.training or (mask is None and world_size() == 1):
            return super().forward(x)
        given, x = x.dtype, x.to(self.weight.dtype)  # bfloat16 sums would be too coarse
        count = x.new_full((), x[:, 0].numel()) if mask is None else mask.sum()
        sums = sum_over_ranks(torch.cat([count[None], x.sum((0, 2)), x.square().sum((0, 2))]))
        count, total, squares = sums.split([1, len(self.weight), len(self.weight)])
        mean = total / count
        var = (squares / count - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return torch.addcmul((self.bias - mean * scale)[:, None], x, scale[:, None]).to(given)


class ConvBlock(nn.Module):
    """Conv1d -> BatchNorm -> activation on x (N, C, T), with padding zero before, within and after."""

    def __init__(self, inputs, outputs, kernel, stride, activation):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, padding=(kernel - stride + 1) // 2, bias=False)
        self.norm = MaskedBatchNorm1d(outputs)
        self.activation = activation

    def forward(self, x, lengths):
        """x (N, C, T) zero at the padding, lengths (N,) of the *output* or None -> (N, C', T') zero at the padding."""
        spare = -x.shape[2] % self.conv.stride[0]  # filled up, so that the last frame begun counts
        x = self.conv(F.pad(x, (0, spare)) if spare else x)
        if lengths is None:
            return self.activation(self.norm(x))
        mask = valid_positions(lengths, x.shape[2])[:, None]
        return self.activation(self.norm(x * mask, mask)) * mask


class FeatureEncoder(nn.Module):
    """Blocks of Conv1d -> BatchNorm -> GELU, 8 samples per frame.

    "wide": four blocks of kernel 3; each frame sees 31 samples, so neighbours share most of them. "thin": one block of
    kernel 8; each frame sees its own 8 samples and no others.
    """

    def __init__(self, channels, kind="wide"):
        super().__init__()
        self.kind = kind
        blocks = ENCODERS[kind]
        widths = [1, *(channels >> i for i in reversed(range(len(blocks))))]
        self.blocks = nn.ModuleList(
            ConvBlock(widths[i], widths[i + 1], kernel, stride, F.gelu) for i, (kernel, stride) in enumerate(blocks)
        )

    def forward(self, signal, lengths=None):
        """signal (N, L), lengths (N,) or None -> frames (N, T, C), zero at the padding, and their lengths or None."""
        x = signal[:, None]
        if lengths is not None:
            x = x.masked_fill(~valid_positions(lengths, signal.shape[1])[:, None], 0.0)
        for block in self.blocks:
            stride = block.conv.stride[0]
            lengths = None if lengths is None else (lengths + stride - 1) // stride
            x = block(x, lengths)
        return x.transpose(1, 2).contiguous(), lengths  # or else each LayerNorm copies


class Dropout(nn.Dropout):
    """nn.Dropout; torch's own draws Bernoulli numbers one by one on a CPU, which takes twice as long."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        kept = torch.rand_like(x, dtype=torch.float32) >= self.p  # bfloat16 numbers would be too coarse
        return x * kept.to(x.dtype).div_(1 - self.p)


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, with dropout on the output of both (Vaswani et al. 2017, section 5.4).

    torch's own nn.TransformerEncoderLayer drops attention weights too, which forbids the fused attention kernels: on
    two CPU cores a step of the tiny model then takes twice as long.

    Positions enter here, as rotations of queries and keys: see rotations().
    """

    def __init__(self, channels, feed_forward, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, feed_forward), nn.GELU(), nn.Linear(feed_forward, channels)
        )
        self.dropout = Dropout(dropout)

    def forward(self, x, rotation, mask=None):
        """x (N, T, C), rotations(T, C), mask of keys to attend to, which broadcasts to (N, heads, T, T), or None."""
        turned = rotated(self.query_key_value(self.norm1(x)), rotation)
        query, key, value = turned.unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, mask)  # (N, heads, T, 64)
        x = x + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class PoreModel(nn.Module):
    """Raw current to contextual features: FeatureEncoder, then a pre-norm transformer with rotary positions."""

    def __init__(self, channels, layers, feed_forward, dropout=0.1, encoder="wide", checkpointing=False):
        super().__init__()
        self.channels = channels
        self.encoder = FeatureEncoder(channels, encoder)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(TransformerLayer(channels, feed_forward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.checkpointing = checkpointing  # of layers: see transform()
        self.window = None  # frames to either side that a frame attends to, None for all: see basecall.py

    @classmethod
    def of_size(cls, size, dropout=0.1, encoder="wide", checkpointing=False):
        """A new pore model of one of SIZES, "thesis" (32 M parameters), "small" (3.3 M) or "tiny" (0.3 M)."""
        return cls(**SIZES[size], dropout=dropout, encoder=encoder, checkpointing=checkpointing)

    @classmethod
    def from_state_dict(cls, state, dropout=0.1):
        """The pore model, of whatever size and encoder, that `state` holds: its state dict, or a basecaller's.

        ValueError if it holds none.
        """
        try:
            if "head.weight" in state:
                prefix = "pore_model."
                state = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            channels = state["norm.weight"].shape[0]
            feed_forward = state["layers.0.feed_forward.0.weight"].shape[0]
            layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
            encoder = "wide" if "encoder.blocks.1.conv.weight" in state else "thin"
            model = cls(channels, layers, feed_forward, dropout, encoder)
            model.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]  # torch's has several lines
            raise ValueError(f"these are not a pore model's weights ({type(error).__name__}: {reason})") from error
        return model

    def load_weights(self, path):
        """Takes the weights of the file `path`, a pore_model.pt or a basecaller.pt, and returns what the file holds.

        InputError if they do not fit.
        """
        state = load_tensors(path)
        try:
            given = PoreModel.from_state_dict(state)
        except ValueError as error:
            raise InputError(f"--weights {path}: {error}") from error
        try:
            self.load_state_dict(given.state_dict())
        except RuntimeError as error:
            found, wanted = (
                f"{len(m.layers)} layers of {m.channels} channels and the {m.encoder.kind} encoder"
                for m in (given, self)
            )
            raise InputError(
                f"--weights {path}: a pore model with {found}, where this run has {wanted}: see --size, and --encoder "
                "where there is one"
            ) from error
        return state

    def forward(self, signal, lengths=None):
        """signal (N, L), lengths (N,) of valid samples or None for all -> context (N, T, C), frame lengths (N,).

        T is the number of frames of the signal, but on a CPU of the longest row; context is zero at the padding.
        """
        if lengths is None:
            frames, _ = self.encoder(signal)
            frame_lengths = torch.full((len(signal),), frames.shape[1], device=signal.device)
            return self.contextualise(frames), frame_lengths
        if works_by_row(signal):  # no work on frames that are padding in every row; a GPU would have to be waited for
            signal = signal[:, : HOP * frames_of(int(lengths.max()))]
        frames, frame_lengths = self.encoder(signal, lengths)
        return self.contextualise(frames, frame_lengths), frame_lengths

    def contextualise(self, frames, lengths=None):
        """The transformer on the encoder's frames (N, T, C), lengths (N,) or None -> context (N, T, C)."""
        if lengths is None or not works_by_row(frames):
            return self.transform(frames, lengths)
        # Rows of like length go together, so that little is padding and what a layer makes stays in the cache; a GPU,
        # where each kernel launched costs time, gets all rows at once.
        lengths, order = lengths.sort()
        parts = zip(frames.index_select(0, order).split(ROWS), lengths.split(ROWS), strict=True)
        parts = [self.transform(part[:, : inside[-1]], inside) for part, inside in parts]
        parts = [F.pad(part, (0, 0, 0, frames.shape[1] - part.shape[1])) for part in parts]
        return torch.cat(parts).index_select(0, order.argsort())

    def transform(self, frames, lengths=None):
        """contextualise() on all rows at once."""
        # the residual stream is float32 in training, validation and basecalling alike: see docs/speed.md
        x = self.dropout(frames.to(self.norm.weight.dtype))
        rotation = rotations(*frames.shape[1:], frames.device)
        valid = None if lengths is None else valid_positions(lengths, frames.shape[1])
        mask = None if valid is None else valid[:, None, None]
        if self.window is not None:
            frame = torch.arange(frames.shape[1], device=frames.device)
            distance = (frame[:, None] - frame).abs()
            # padding attends to itself, since attention to nothing is not a number
            mask = (distance <= self.window) & (True if mask is None else mask | (distance == 0))
        for layer in self.layers:
            # the backward pass computes a layer once more from its input; not the encoder: BatchNorm would count twice
            layer = partial(checkpoint, layer, use_reentrant=False) if self.checkpointing else layer
            x = layer(x, rotation, mask)
        x = self.norm(x)
        return x if valid is None else x * valid[:, :, None]


def rotations(frames, channels, device):
    """Cosines and sines, each (T, 3 C), that turn pairs of query and key features by angles that grow with the frame.

    Rotary positions (Su et al. 2021, "RoFormer", eq. 34): after them, the product of a query and a key depends on how
    far apart they stand and not on where the chunk was cut. Like the sinusoids added to the input that the thesis has,
    they have no parameters and no longest chunk; they train a tiny basecaller faster (docs/results/studies.md).
    Wavelengths are 2 pi to 20000 pi frames. Values are turned by 0: so all three are turned at once, in long runs of
    memory.
    """
    rate = 10000.0 ** -(torch.arange(0, HEAD_WIDTH, 2, device=device) / HEAD_WIDTH)
    angle = torch.arange(frames, device=device)[:, None] * rate
    angle = torch.cat([-angle, angle], dim=1).repeat(1, channels // HEAD_WIDTH)  # (T, C): cos(-a) = cos(a)
    angle = torch.cat([angle, angle, torch.zeros_like(angle)], dim=1)
    return angle.cos(), angle.sin()


def rotated(x, rotation):
    """x (N, T, 3 C), queries, keys and values, with features i and i + 32 of each head turned by the i-th angle."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.unflatten(2, (-1, 2, HEAD_WIDTH // 2)).unbind(3)
    swapped = torch.stack([second, first], dim=3).flatten(2)
    return torch.addcmul(x * cos, swapped, sin)


def pad_frames(x, frames):
    """x (N, C, T), T <= frames, with zeros up to (N, C, frames). InputError if it is longer."""
    if x.shape[2] > frames:
        raise InputError(
            f"a chunk of {HOP * x.shape[2]} samples, but the projector was made for {HOP * frames}; "
            "make it for the longest chunk"
        )
    return F.pad(x, (0, frames - x.shape[2]))


def load_tensors(path):
    """What torch.save wrote to `path`, on the CPU, read without executing anything. InputError if `path` has none."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip():  # torch does not look at the checksums
                    raise ValueError("damaged")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:
        raise InputError(f"{path}: not a PyTorch file of tensors, or damaged") from error
