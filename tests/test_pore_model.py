"""The pore model and a projector compute for a padded row what torch's plain layers compute for that row alone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from barlow import Projector
from common import InputError
from common.pore_model import (
    SIZES,
    Dropout,
    FeatureEncoder,
    MaskedBatchNorm1d,
    PoreModel,
    TransformerLayer,
    frames_of,
    rotated,
    rotations,
    valid_positions,
)

WIDTH, LENGTHS = 93, [93, 64, 31, 7]  # odd and even, one row full, one of a single frame; the width is no multiple of 8
EMBEDDING = 16
BLOCKS = {"wide": [(3, 2, 1)] * 3 + [(3, 1, 1)], "thin": [(8, 8, 0)]}  # kernel, stride and padding
both_encoders = pytest.mark.parametrize("encoder", ["wide", "thin"])


def models(training, dtype=torch.float64, chunk_len=WIDTH, encoder="wide"):
    """A tiny pore model and a projector; no parameter or buffer is left where an error in its use would not show."""
    torch.manual_seed(0)
    model = PoreModel.of_size("tiny", dropout=0.0, encoder=encoder)
    projector = Projector(model.channels, chunk_len, EMBEDDING)
    for module in (*model.modules(), *projector.modules()):
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.to(dtype).train(training), projector.to(dtype).train(training)


def batch(lengths, dtype=torch.float64, width=WIDTH, garbage=0.0):
    """A signal with `garbage` at the padding, and the lengths."""
    lengths = torch.tensor(lengths)
    signal = torch.randn(len(lengths), width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return signal.masked_fill(~valid_positions(lengths, width), garbage), lengths


def loss_of(context, z):
    """A number that depends on every entry of both, with weights that no normalisation cancels."""
    return (z * torch.arange(z.numel()).sin().view_as(z)).sum() + (
        context * torch.arange(context.numel()).cos().view_as(context)
    ).sum()


def gradients(*modules):
    return {(i, name): p.grad for i, module in enumerate(modules) for name, p in module.named_parameters()}


def buffers(*modules):
    return {(i, name): b for i, module in enumerate(modules) for name, b in module.named_buffers()}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


# ----------------------------------------------------------------------------- references without padding or a mask


def filled(signal, encoder):
    """The last of the thin encoder's frames is filled up with zeros."""
    return F.pad(signal, (0, -signal.shape[-1] % 8)) if encoder == "thin" else signal


def plain_block(block, rows, stride, padding, activation):
    """Rows [(C, T_row)] through conv, BatchNorm over the frames of all rows, and the activation."""
    rows = [F.conv1d(row, block.conv.weight, None, stride, padding) for row in rows]
    normed = nn.BatchNorm1d.forward(block.norm, torch.cat(rows, 1).T).T  # torch's own, with this block's weights
    return [activation(row) for row in normed.split([row.shape[1] for row in rows], 1)]


def plain_layer(layer, x):
    """A transformer layer on one row x (T, C): features as complex numbers, positions as turns of them."""
    angle = torch.arange(len(x))[:, None] * 10000.0 ** -(torch.arange(32) / 32)
    y, turn = layer.norm1(x), torch.complex(angle.cos(), angle.sin())
    heads = []
    for query, key, value in zip(*(part.split(64, 1) for part in layer.query_key_value(y).chunk(3, 1)), strict=True):
        query, key = (torch.complex(*z.chunk(2, 1)) * turn for z in (query, key))
        heads.append(((query @ key.conj().T).real / 8).softmax(1) @ value)
    x = x + layer.output(torch.cat(heads, 1))
    return x + layer.feed_forward(layer.norm2(x))


def plain(model, projector, rows):
    """Context [(T_row, C)] and embeddings (N, R) of signals [(L_row,)], each of its own length."""
    rows = [filled(row[None], model.encoder.kind) for row in rows]
    for block, (_, stride, padding) in zip(model.encoder.blocks, BLOCKS[model.encoder.kind], strict=True):
        rows = plain_block(block, rows, stride, padding, F.gelu)
    context = []
    for row in rows:
        x = row.T
        for layer in model.layers:
            x = plain_layer(layer, x)
        context.append(model.norm(x))
    pooled = plain_block(projector.conv, [x.T for x in context], 1, 3, F.relu)
    pooled = [F.max_pool1d(F.pad(x, (0, projector.frames - x.shape[1])), 4).flatten() for x in pooled]
    return context, projector.mlp(torch.stack(pooled))


def torch_layer(layer):
    """torch's own pre-norm transformer layer with the weights of `layer`."""
    channels, feed_forward = layer.output.in_features, layer.feed_forward[0].out_features
    theirs = nn.TransformerEncoderLayer(
        channels, channels // 64, feed_forward, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = {
        "query_key_value.": "self_attn.in_proj_",
        "output.": "self_attn.out_proj.",
        "feed_forward.0.": "linear1.",
        "feed_forward.2.": "linear2.",
    }
    state = layer.state_dict()
    for ours, name in names.items():
        state = {key.replace(ours, name): value for key, value in state.items()}
    theirs.load_state_dict(state)
    return theirs


# -------------------------------------------------------------------------------------------------------- masking


@both_encoders
@pytest.mark.parametrize("lengths", [LENGTHS, [93, 93, 93], [50, 31, 17]], ids=["mixed", "full", "none full"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_padded_batch_equals_its_rows_without_padding(training, lengths, encoder):
    """Outputs, gradients and running statistics; in training BatchNorm is over the valid frames of all rows."""
    model, projector = models(training, encoder=encoder)
    plain_model, plain_projector = copy.deepcopy((model, projector))
    signal, lengths = batch(lengths)
    context, frame_lengths = model(signal, lengths)
    z = projector(context, frame_lengths)
    loss_of(context, z).backward()

    rows, plain_z = plain(
        plain_model, plain_projector, [row[:length] for row, length in zip(signal, lengths, strict=True)]
    )
    plain_context = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    loss_of(plain_context, plain_z).backward()
    assert frame_lengths.tolist() == [len(row) for row in rows]
    torch.testing.assert_close(context, plain_context)
    torch.testing.assert_close(z, plain_z)
    assert_same(gradients(model, projector), gradients(plain_model, plain_projector), rtol=1e-6, atol=1e-8)
    assert_same(buffers(model, projector), buffers(plain_model, plain_projector))


@both_encoders
@torch.no_grad()
def test_in_eval_each_row_alone_gives_what_the_padded_batch_gives(encoder):
    model, projector = models(training=False, encoder=encoder)
    signal, lengths = batch(LENGTHS)
    context, frame_lengths = model(signal, lengths)
    z = projector(context, frame_lengths)
    for row, length in enumerate(LENGTHS):
        alone, frames = model(signal[row : row + 1, :length])
        assert frames.tolist() == [frame_lengths[row]] == [frames_of(length)]
        torch.testing.assert_close(context[row, : frames[0]], alone[0])
        assert not context[row, frames[0] :].any()
        torch.testing.assert_close(z[row], projector(alone, frames)[0])
        torch.testing.assert_close(z[row], projector(alone, None)[0])


@both_encoders
@pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_garbage_in_the_padding_changes_no_bit(training, garbage, encoder):
    """Neither of the outputs, the loss, the gradients nor the running statistics; the padding's gradient is zero."""
    results = []
    for filling in (0.0, garbage):
        model, projector = models(training, torch.float32, encoder=encoder)
        signal, lengths = batch(LENGTHS, torch.float32, garbage=filling)
        signal.requires_grad_()
        context, frame_lengths = model(signal, lengths)
        z = projector(context, frame_lengths)
        loss = loss_of(context, z)
        loss.backward()
        valid = valid_positions(lengths, WIDTH)
        assert signal.grad[valid].all()
        assert (signal.grad[~valid] == 0).all()
        results.append(
            {"context": context, "z": z, "loss": loss, "signal": signal.grad}
            | gradients(model, projector)
            | buffers(model, projector)
        )
    assert_same(results[1], results[0], rtol=0, atol=0)


@both_encoders
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_full_lengths_none_and_torchs_own_layers_agree(training, encoder):
    model, projector = models(training, encoder=encoder)
    signal, lengths = batch([WIDTH] * 4)
    plain_encoder = nn.Sequential()
    for block, shape in zip(model.encoder.blocks, BLOCKS[encoder], strict=True):
        channels, inputs, _ = block.conv.weight.shape
        plain_encoder.extend([nn.Conv1d(inputs, channels, *shape, bias=False), nn.BatchNorm1d(channels), nn.GELU()])
    plain_encoder.double().train(training).load_state_dict(
        dict(zip(plain_encoder.state_dict(), model.encoder.state_dict().values(), strict=True))
    )
    x = plain_encoder(filled(signal, encoder)[:, None]).transpose(1, 2)
    for layer in model.layers:
        x = torch.stack([plain_layer(layer, row) for row in x])
    expected = F.layer_norm(x, (128,), model.norm.weight, model.norm.bias)
    for given in (None, lengths):
        context, frame_lengths = copy.deepcopy(model)(signal, given)
        assert frame_lengths.tolist() == [12] * 4
        torch.testing.assert_close(context, expected)
    again = models(training, encoder=encoder)[1]
    torch.testing.assert_close(projector(context, None), again(context, frame_lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_batch_norm_equals_batch_norm_of_the_valid_frames(dtype):
    """Outputs, gradients and running statistics over two steps, of channels with a mean of 3 standard deviations."""
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm1d(5).to(dtype), nn.BatchNorm1d(5).to(dtype)
    for norm in (ours, theirs):
        nn.init.constant_(norm.bias, 0.7)
    mask = valid_positions(torch.tensor([9, 4, 1]), 9)[:, None]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    for _ in range(2):
        x = (6 + 2 * torch.randn(3, 5, 9, dtype=dtype)).requires_grad_()
        found = ours(x * mask, mask).transpose(1, 2)[mask[:, 0]]
        expected = theirs(x.transpose(1, 2)[mask[:, 0]])
        torch.testing.assert_close(found, expected, **tolerance)
        weights = torch.randn_like(found)
        grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*grads, **tolerance)
    assert_same(ours.state_dict(), theirs.state_dict(), **tolerance)
    assert ours.num_batches_tracked == 2


@pytest.mark.parametrize("masked", [False, True])
def test_the_transformer_layer_without_positions_equals_torchs_own(masked):
    torch.manual_seed(0)
    ours = TransformerLayer(192, 80, dropout=0.0).double()
    for norm in (ours.norm1, ours.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 11, 192, dtype=torch.float64)
    valid = valid_positions(torch.tensor([11, 6, 1] if masked else [11, 11, 11]), 11)
    still = torch.ones(11, 3 * 192), torch.zeros(11, 3 * 192)
    found = ours(x, still, valid[:, None, None] if masked else None)
    expected = torch_layer(ours)(x, src_key_padding_mask=~valid if masked else None)
    torch.testing.assert_close(found[valid], expected[valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_torchs(dtype):
    """As many zeros, the rest scaled to the same mean; the gradient has the same mask; nothing in evaluation."""
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.rand(1000, 400).add(0.5).to(dtype).requires_grad_()
    y = dropout(x)
    kept = y != 0
    assert kept.float().mean() == pytest.approx(0.9, abs=0.001)  # sd 0.0005
    torch.testing.assert_close(y[kept], (x / 0.9)[kept])
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / torch.tensor(0.9, dtype=dtype))
    assert abs(torch.corrcoef(torch.stack([kept[:-1].flatten(), kept[1:].flatten()]).float())[0, 1]) < 0.01
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_of_any_length_share_a_compiled_graph(checkpointing):
    """torch falls back to plain Python after eight graphs of the same code."""
    counter = CompileCounter()
    torch.compiler.reset()
    model = PoreModel(64, 1, 64, checkpointing=checkpointing)
    model.compile(backend=counter)
    for longest in range(200, 390, 13):  # of all remainders by 8
        model(torch.randn(3, 400), torch.tensor([longest, 90, 101]))
    torch.compiler.reset()
    assert counter.frame_count == 1


def test_checkpointing_changes_no_bit():
    """Neither of context, gradients and running statistics, nor of what is drawn afterwards."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = PoreModel(128, 3, 128, dropout=0.1, checkpointing=checkpointing)
        context, _ = model(*batch(LENGTHS, torch.float32))
        context.square().sum().backward()
        found.append([context, gradients(model), buffers(model), torch.rand(5)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_dropout_acts_in_training_only():
    model, _ = models(training=True, dtype=torch.float32)
    model = PoreModel.from_state_dict(model.state_dict(), dropout=0.1)
    signal, lengths = batch(LENGTHS, torch.float32)
    assert not torch.equal(model(signal, lengths)[0], model(signal, lengths)[0])
    model.eval()
    assert torch.equal(model(signal, lengths)[0], model(signal, lengths)[0])


# ------------------------------------------------------------------------------------------------------ precision


@torch.no_grad()
def bf16_error(size, masked, training):
    """Relative error of the context in bfloat16, against float64, and what came to the layers and out."""
    torch.manual_seed(0)
    model, seen = PoreModel.of_size(size, dropout=0.0).train(training), []
    signal = torch.randn(4, 1200).cumsum(1).mul(0.1).sin() + 0.3 * torch.randn(4, 1200)
    lengths = torch.tensor([1200, 1150, 1000, 1100]) if masked else None
    expected = copy.deepcopy(model).double()(signal.double(), lengths)[0]
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].dtype))
    model.encoder.blocks[0].register_forward_hook(lambda block, inputs, x: seen.append(x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        context = model(signal, lengths)[0]
    return float((context - expected).norm() / expected.norm()), {*seen[1:], context.dtype}, seen[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("masked", [False, True])
def test_in_bfloat16_the_residual_stream_is_float32_whatever_the_mode(masked, training):
    """The encoder is bfloat16 in each. The bounds are 5 % above what was measured, below what a bfloat16 stream has."""
    error, stream, encoder = bf16_error("tiny", masked, training)
    assert stream == {torch.float32} and encoder == torch.bfloat16
    assert error < (0.0154 if training else 0.0076)


# --------------------------------------------------------------------------------------------------------- shapes


@both_encoders
def test_frames_of_is_the_number_of_frames_the_encoder_makes(encoder):
    encoder = FeatureEncoder(8, encoder).eval()
    lengths = [*range(1, 70), 3600]
    assert [frames_of(length) for length in lengths] == [encoder(torch.zeros(1, n))[0].shape[1] for n in lengths]
    assert frames_of(torch.tensor(lengths)).equal(encoder(torch.zeros(len(lengths), 3600), torch.tensor(lengths))[1])
    assert frames_of(torch.tensor(lengths)).tolist() == [-(-length // 8) for length in lengths]
    assert frames_of(3600) == 450


@pytest.mark.parametrize(("encoder", "before", "after"), [("wide", 15, 15), ("thin", 0, 7)])
@pytest.mark.parametrize("frame", [10, 11])
def test_a_frame_sees_31_samples_around_its_first_or_with_the_thin_encoder_its_own_8(frame, encoder, before, after):
    torch.manual_seed(0)
    signal = torch.randn(1, 200, dtype=torch.float64, requires_grad=True)
    FeatureEncoder(64, encoder).double().eval()(signal)[0][0, frame].sum().backward()
    assert signal.grad[0].nonzero().flatten().tolist() == list(range(8 * frame - before, 8 * frame + after + 1))


@pytest.mark.parametrize("chunk_len", [25, 77, 93, 96, 100])
def test_the_projector_takes_chunks_of_any_length_and_batches_shorter_than_the_chunk(chunk_len):
    """Also where the length is no multiple of 8, or the frames no multiple of 4: equal to the plain layers."""
    model, projector = models(False, chunk_len=chunk_len)
    for longest in (chunk_len, chunk_len - 11):
        signal, lengths = batch([longest, longest - 10], width=chunk_len)
        z = projector(*model(signal, lengths))
        assert z.shape == (2, EMBEDDING)
        torch.testing.assert_close(z, plain(model, projector, [x[:n] for x, n in zip(signal, lengths, strict=True)])[1])


def test_a_chunk_longer_than_the_projector_was_made_for_is_refused():
    model, projector = models(False, chunk_len=93)
    projector(*model(*batch([96, 40], width=96)))  # as many frames
    with pytest.raises(InputError, match="a chunk of 104 samples, but the projector was made for 96; make it for"):
        projector(*model(*batch([97, 40], width=97)))


def test_rows_in_groups_of_like_length_are_all_rows_at_once():
    """What a CPU does against what a GPU does: context and gradients, the rows in their own order."""
    torch.manual_seed(0)
    model = PoreModel.of_size("tiny", dropout=0.0).double()
    lengths = torch.tensor([9, 40, 1, 17, 25, 40, 3, 3, 31, 12, 8, 38, 22, 2, 5, 30, 11, 40, 19])
    frames = torch.randn(len(lengths), 40, 128, dtype=torch.float64)
    frames = (frames * valid_positions(lengths, 40)[:, :, None]).requires_grad_()
    found, expected = model.contextualise(frames, lengths), model.transform(frames, lengths)
    torch.testing.assert_close(found, expected)
    inputs, weight = [frames, *model.layers.parameters(), *model.norm.parameters()], torch.randn_like(found)
    gradients = [torch.autograd.grad((context * weight).sum(), inputs) for context in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_queries_and_keys_are_turned_as_complex_numbers_are():
    """RoFormer, eq. 12: features i and i + 32 of a head are a complex number; frame m turns it by m times its rate."""
    torch.manual_seed(0)
    x = torch.randn(2, 50, 3 * 128, dtype=torch.float64)
    heads = x.unflatten(2, (3, 2, 2, 32))  # queries, keys, values; heads; real and imaginary parts
    angle = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    turned = torch.complex(*heads.unbind(4)) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    expected = torch.stack([turned.real, turned.imag], dim=4)
    expected[:, :, 2] = heads[:, :, 2]
    found = rotated(x, rotations(50, 128, "cpu"))
    torch.testing.assert_close(found, expected.flatten(2), rtol=0, atol=2e-5)  # angles are float32


def test_attention_sees_how_far_apart_frames_are_and_not_where_they_stand():
    """Scores of queries and keys depend on their distance alone, and do depend on it."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 3 * 64).expand(1, 40, 3 * 64)  # equal queries, equal keys, equal values
    query, key, value = rotated(x, rotations(40, 64, "cpu")).chunk(3, dim=2)
    scores = (query @ key.mT)[0]  # (40, 40)
    assert torch.equal(value, x[:, :, 2 * 64 :])
    for distance in (-7, 0, 5):
        torch.testing.assert_close(scores.diagonal(distance), scores.diagonal(distance)[:1].expand(40 - abs(distance)))
    assert scores[0].std() > 0.1
    torch.testing.assert_close(scores.diagonal(), (x[0, :, :64] * x[0, :, 64:128]).sum(-1))


def test_with_a_window_a_frame_sees_that_many_frames_a_layer_and_padding_still_does_not_matter():
    pore_model, _ = models(training=False)
    signal, lengths = batch([8 * 40, 8 * 25 - 3], width=8 * 40)
    whole = pore_model(signal, lengths)[0]
    pore_model.window = 40
    assert torch.equal(pore_model(signal, lengths)[0], whole)
    pore_model.window = 2
    narrow = pore_model(signal, lengths)[0]
    assert (narrow - whole).abs().max() > 1e-3
    for row, length in zip(range(2), lengths, strict=True):
        alone, _ = pore_model(signal[row : row + 1, :length])
        torch.testing.assert_close(narrow[row, : alone.shape[1]], alone[0])
    changed = signal.clone()
    changed[0, 8 * 20] += 1  # frames 18 to 21 see this sample, at most
    moved = (pore_model(changed, lengths)[0] - narrow).abs().amax(2)[0] > 1e-9
    reach = 2 * len(pore_model.layers)
    assert moved[20 - reach : 21 + reach].all() and not moved[: 18 - reach].any() and not moved[22 + reach :].any()


# ---------------------------------------------------------------------------------------------------------- sizes


@both_encoders
@pytest.mark.parametrize(("size", "parameters"), [("thesis", 32e6), ("small", 3.3e6), ("tiny", 0.3e6)])
def test_of_every_size_a_state_dict_tells_the_size(size, parameters, encoder):
    with torch.device("meta"):  # shapes alone
        model = PoreModel.of_size(size, encoder=encoder)
        rebuilt = PoreModel.from_state_dict(model.state_dict())
    shapes = [{key: value.shape for key, value in made.state_dict().items()} for made in (model, rebuilt)]
    assert shapes[0] == shapes[1] and rebuilt.encoder.kind == encoder
    assert [block.conv.kernel_size + block.conv.stride for block in model.encoder.blocks] == [
        block[:2] for block in BLOCKS[encoder]
    ]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.11)


@both_encoders
def test_saved_weights_make_the_same_pore_model(encoder):
    model = models(training=True, dtype=torch.float32, encoder=encoder)[0]
    signal, lengths = batch([93, 40], torch.float32)
    model(signal, lengths)  # moves the running statistics, which have to be in the file
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    rebuilt = PoreModel.from_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(signal, lengths)[0], model.eval()(signal, lengths)[0])


def test_the_thesis_size_is_the_thesiss():
    with torch.device("meta"):
        model = PoreModel.of_size("thesis")
    assert [block.conv.out_channels for block in model.encoder.blocks] == [64, 128, 256, 512]
    assert len(model.layers) == 10
    assert {layer.feed_forward[0].out_features for layer in model.layers} == {2048}
    assert {layer.dropout.p for layer in model.layers} == {0.1}
    assert all(size["channels"] % 64 == 0 for size in SIZES.values())


def rubbish():
    state = PoreModel.of_size("tiny").state_dict()
    some = "layers.1.output.weight"
    return {
        "nothing": None,
        "an empty dict": {},
        "a list": [1, 2],
        "numbers": dict.fromkeys(state, 1),
        "another model": nn.Linear(2, 2).state_dict(),
        "a projector": Projector(128, WIDTH, 8).state_dict(),
        "a prefix": {f"module.{key}": value for key, value in state.items()},
        "one weight short": {key: value for key, value in state.items() if key != some},
        "one weight too many": state | {"stray.weight": torch.zeros(1)},
        "one weight of another shape": state | {some: torch.zeros(3, 3)},
        "a layer with no number": state | {"layers.x.weight": torch.zeros(1)},
        "an empty encoder": state | {"encoder.blocks.3.conv.weight": torch.tensor(0.0)},
    }


@pytest.mark.parametrize("state", rubbish().values(), ids=rubbish().keys())
def test_rubbish_is_refused(state):
    with pytest.raises(ValueError):
        PoreModel.from_state_dict(state)
