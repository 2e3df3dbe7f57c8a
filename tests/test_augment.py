"""What each augmentation does to the valid samples of each row, and that it does nothing else."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.augment import (
    drop_points,
    flip_current,
    flip_time,
    gain_offset,
    mask_spans,
    moving_average,
    noise,
    random_crop,
    shuffle,
    time_warp,
)
from common.pore_model import valid_positions
from common.reads.simulate import SIGNAL_BASE, kmer_levels, simulate_read

WIDTH, LENGTHS = 403, torch.tensor([403, 250, 97, 8, 5, 1] * 4)
EACH = [noise, drop_points, shuffle, moving_average, random_crop, flip_time, flip_current, gain_offset, time_warp]
EACH = {augmentation.__name__: augmentation for augmentation in EACH}
EACH["mask_spans"] = lambda signal, lengths: mask_spans(signal, lengths)[:2]
each = pytest.mark.parametrize("augmentation", EACH.values(), ids=EACH)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(dtype=torch.float32, padding=0.0):
    """Every row is its own number times 1000, plus 1, 2, 3...: each sample tells its row and its place."""
    signal = 1000.0 * torch.arange(1, len(LENGTHS) + 1)[:, None] + torch.arange(1, WIDTH + 1)
    return signal.to(dtype).masked_fill(~valid_positions(LENGTHS, WIDTH), padding), LENGTHS


def valid_rows(signal, lengths):
    return [row[:length].numpy() for row, length in zip(signal, lengths, strict=True)]


# ------------------------------------------------------------------------------------------------ all of them


@each
def test_the_padding_stays_zero_and_the_input_unchanged(augmentation):
    signal, lengths = batch()
    before = signal.clone()
    out, out_lengths = augmentation(signal, lengths)
    assert out.shape == (len(signal), 360 if augmentation is drop_points else WIDTH) and out.dtype == signal.dtype
    assert out_lengths.dtype == torch.int64
    assert not out[~valid_positions(out_lengths, out.shape[1])].any()
    assert torch.equal(signal, before)
    assert augmentation is drop_points or torch.equal(out_lengths, lengths)


@each
@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_garbage_in_the_padding_reaches_no_valid_sample_and_comes_out_as_zero(augmentation, garbage):
    signal, lengths = batch()
    expected = augmentation(signal, lengths)
    torch.manual_seed(0)
    out = augmentation(batch(padding=garbage)[0], lengths)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@each
def test_the_seed_alone_decides(augmentation):
    signal, lengths = batch()
    first = augmentation(signal, lengths)
    assert (augmentation is moving_average) == torch.equal(first[0], augmentation(signal, lengths)[0])
    torch.manual_seed(0)
    again = augmentation(signal, lengths)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


# ------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.5])
def test_noise_is_white_and_of_the_given_sd(factor):
    signal, lengths = torch.randn(64, 3600), torch.tensor([3600, 1800] * 32)
    signal *= valid_positions(lengths, 3600)
    out, _ = noise(signal, lengths, factor)
    added = (out - signal)[valid_positions(lengths, 3600)].double()  # 172 800 samples
    assert abs(added.mean()) <= 5 * factor / len(added) ** 0.5
    assert added.std() == pytest.approx(factor, rel=0.01)
    assert abs(added[1:] @ added[:-1]) <= 5 * factor**2 * len(added) ** 0.5


# ------------------------------------------------------------------------------------------------ drop-point


def test_drop_points_keeps_a_subsequence_of_its_own_row_moved_together():
    signal, lengths = batch()
    out, out_lengths = drop_points(signal, lengths)
    rows = zip(valid_rows(signal, lengths), valid_rows(out, out_lengths), strict=True)
    for before, after in rows:
        if len(before) == 1 and not after[0]:
            continue  # its only sample was dropped
        assert (np.diff(after) > 0).all()  # in order, none twice, no gap
        assert np.isin(after, before).all()
        assert len(before) < 50 or len(after) < len(before)


def test_drop_points_draws_a_chance_for_each_row_from_the_given_range():
    """Share kept: 1 - U(0.25, 0.38), plus the binomial scatter of 4000 independent draws."""
    lengths = torch.tensor([4000, 2000] * 200)
    signal = torch.ones(400, 4000)
    shares = [(drop_points(signal, lengths)[1] / lengths).double() for _ in range(2)]
    scatter = (0.685 * 0.315 / 2000) ** 0.5  # of the shorter rows
    for share in shares:
        assert share.min() > 0.62 - 4 * scatter
        assert share.max() < 0.75 + 4 * scatter
        assert share.mean() == pytest.approx(0.685, abs=4 * 0.0375 / 20)
        quantiles = share.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        assert quantiles == pytest.approx([0.633, 0.685, 0.737], abs=0.015)
    assert abs(np.corrcoef(*shares)[0, 1]) < 0.2  # another chance in another view


def test_drop_points_drops_each_sample_independently():
    """Distances of kept samples are geometric, and no place in the row is preferred."""
    signal = torch.arange(1.0, 4001).expand(100, -1)
    out, lengths = drop_points(signal, torch.full((100,), 4000), 0.3, 0.3)
    distances = np.concatenate([np.diff(row) for row in valid_rows(out, lengths)])
    shares = np.bincount(distances.astype(int), minlength=5)[1:5] / len(distances)
    np.testing.assert_allclose(shares, [0.7, 0.21, 0.063, 0.0189], atol=0.005)
    kept = np.bincount(np.concatenate(valid_rows(out, lengths)).astype(int), minlength=4001)[1:]
    np.testing.assert_allclose(kept.reshape(10, 400).mean(1), 70, atol=5 * (21 / 400) ** 0.5)


def test_drop_points_at_the_ends_of_the_range():
    signal, lengths = batch()
    out, out_lengths = drop_points(signal, lengths, 0.0, 0.0)
    assert torch.equal(out, signal)
    assert torch.equal(out_lengths, lengths)
    out, out_lengths = drop_points(signal, lengths, 1.0, 1.0)  # a row keeps a length of 1: no method divides by zero
    assert not out.any() and out.shape[1] == 8
    assert (out_lengths == 1).all()


@pytest.mark.parametrize("chance", [0.01, 0.25, 0.38, 0.9])
@pytest.mark.parametrize("length", [200, 1200, 3600])
def test_a_million_rows_fit_into_the_width_of_a_view(length, chance):
    """Rows that all have the lowest chance to lose a sample; what they keep is binomial, as is tested above."""
    width = drop_points(torch.zeros(1, length), torch.tensor([length]), chance, chance)[0].shape[1]
    kept = np.random.default_rng(0).binomial(length, 1 - chance, 1_000_000)
    assert kept.max() <= width and width % 8 == 0 and (width - kept.mean()) / kept.std() < 6.1 + 8 / kept.std()


def test_what_does_not_fit_into_the_width_of_a_view_is_cut(monkeypatch):
    """Here half of the rows, since the width has room for no more than the mean."""
    signal, lengths = torch.arange(1.0, 401).expand(50, -1), torch.full((50,), 400)
    torch.manual_seed(1)
    whole, whole_lengths = drop_points(signal, lengths, 0.3, 0.3)
    monkeypatch.setattr("math.sqrt", lambda _: 0)
    torch.manual_seed(1)
    out, out_lengths = drop_points(signal, lengths, 0.3, 0.3)
    assert out.shape[1] == 280 and 10 < (whole_lengths > 280).sum() < 40
    assert torch.equal(out, whole[:, :280]) and torch.equal(out_lengths, whole_lengths.clamp(max=280))


# ------------------------------------------------------------------------------------------------ the others


def test_shuffle_puts_the_eight_segments_of_each_row_in_a_random_order():
    signal, lengths = batch()
    out, _ = shuffle(signal, lengths)
    for before, after in zip(valid_rows(signal, lengths), valid_rows(out, lengths), strict=True):
        bounds = [-(-k * len(before) // 8) for k in range(9)]
        segments = {s[0]: s for s in np.split(before, bounds[1:-1]) if len(s)}
        assert len(before) < 8 or {len(s) for s in segments.values()} <= {len(before) // 8, len(before) // 8 + 1}
        start = 0
        while start < len(after):  # take the segment that begins here; each is there once
            segment = segments.pop(after[start])
            np.testing.assert_array_equal(after[start : start + len(segment)], segment)
            start += len(segment)
        assert not segments


def test_shuffle_puts_each_segment_in_each_place_equally_often():
    signal = torch.arange(8.0).repeat(4000, 1)
    out, _ = shuffle(signal, torch.full((4000,), 8))
    counts = torch.stack([(out == k).sum(0) for k in range(8)])
    assert (counts - 500).abs().max() < 5 * (4000 / 8 * 7 / 8) ** 0.5
    assert len(out.unique(dim=0)) > 3500  # an order for each row, out of 40 320


def test_moving_average_is_the_mean_of_the_valid_samples_within_three():
    signal, lengths = batch(torch.float64)
    out, _ = moving_average(signal, lengths)
    for before, after in zip(valid_rows(signal, lengths), valid_rows(out, lengths), strict=True):
        expected = [before[max(0, i - 3) : i + 4].mean() for i in range(len(before))]
        np.testing.assert_allclose(after, expected, rtol=1e-12)


def test_random_crop_stretches_a_part_of_half_to_all_of_the_row():
    """A ramp 0, 1, 2... stays a ramp; its ends tell what was cut."""
    lengths = torch.tensor([900, 40] * 200)
    ramp = torch.arange(900.0).double().expand(400, -1) * valid_positions(lengths, 900)
    out, _ = random_crop(ramp, lengths)
    last = (lengths - 1).double()
    first, end = out[:, 0], out.gather(1, lengths[:, None] - 1)[:, 0]
    expected = first[:, None] + ((end - first) / last)[:, None] * torch.arange(900)
    torch.testing.assert_close(out, expected * valid_positions(lengths, 900), rtol=0, atol=2e-3)
    part = (end - first) / last
    assert (first >= 0).all()
    assert (end <= last).all()
    assert part.min() >= 0.5 - 1e-6
    assert part.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist() == pytest.approx(
        [0.55, 0.75, 0.95], abs=0.05
    )
    place = first / (last * (1 - part))  # uniform: 0 is the earliest that fits, 1 the latest
    assert place.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist() == pytest.approx(
        [0.1, 0.5, 0.9], abs=0.1
    )


def test_random_crop_interpolates_as_numpy_does():
    signal, lengths = torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64), LENGTHS
    ramp = torch.arange(WIDTH).double().expand_as(signal)
    torch.manual_seed(1)
    places, _ = random_crop(ramp, lengths)
    torch.manual_seed(1)
    out, _ = random_crop(signal, lengths)
    for before, place, after in zip(*(valid_rows(x, lengths) for x in (signal, places, out)), strict=True):
        np.testing.assert_allclose(after, np.interp(place, np.arange(len(before)), before), atol=1e-6)


def test_random_crop_of_all_is_the_row_itself():
    signal, lengths = batch(torch.float64)
    torch.testing.assert_close(random_crop(signal, lengths, smallest=1.0)[0], signal)


@pytest.mark.parametrize(
    ("flip", "reference"), [(flip_time, np.flip), (flip_current, np.negative)], ids=["time", "current"]
)
def test_a_flip_turns_half_of_the_rows_and_undoes_itself(flip, reference):
    lengths = torch.tensor([50, 37] * 1000)
    signal = torch.randn(2000, 50) * valid_positions(lengths, 50)
    torch.manual_seed(1)
    out, _ = flip(signal, lengths)
    turned = 0
    for before, after in zip(valid_rows(signal, lengths), valid_rows(out, lengths), strict=True):
        if not np.array_equal(after, before):
            np.testing.assert_array_equal(after, reference(before))
            turned += 1
    assert abs(turned - 1000) < 5 * 500**0.5
    torch.manual_seed(1)
    assert torch.equal(flip(out, lengths)[0], signal)


def test_gain_offset_is_one_line_for_each_row():
    """A gain about 1 and an offset about 0, both normal, independent of each other and of the row."""
    signal, lengths = torch.randn(4000, 50, dtype=torch.float64), torch.tensor([50, 37] * 2000)
    signal *= valid_positions(lengths, 50)
    out, _ = gain_offset(signal, lengths, gain=0.3, offset=0.5)
    gains = (out[:, 1] - out[:, 0]) / (signal[:, 1] - signal[:, 0])
    offsets = out[:, 0] - gains * signal[:, 0]
    expected = (gains[:, None] * signal + offsets[:, None]) * valid_positions(lengths, 50)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    for draws, sd in ((gains - 1, 0.3), (offsets, 0.5)):
        assert abs(draws.mean()) < 5 * sd / 4000**0.5
        assert draws.std() == pytest.approx(sd, rel=0.05)
    assert abs(np.corrcoef(gains, offsets)[0, 1]) < 0.08


def test_time_warp_repeats_and_skips_samples_in_order_from_first_to_last():
    signal, lengths = batch()
    out, _ = time_warp(signal, lengths)
    changed = 0
    for before, after in zip(valid_rows(signal, lengths), valid_rows(out, lengths), strict=True):
        assert after[0] == before[0] and after[-1] == before[-1]
        assert np.isin(after, before).all()
        assert (np.diff(after) >= 0).all()
        changed += not np.array_equal(after, before)
    assert changed == 12  # those longer than the 32 samples that run at one speed


def test_time_warp_runs_at_log_normal_speeds():
    """Steps of a ramp within each stretch; the first stretch, whose first step there is none of, is left out."""
    ramp = torch.arange(3200.0).expand(500, -1)
    out, _ = time_warp(ramp, torch.full((500,), 3200), strength=0.5)
    speed = (out[:, 63::32] - out[:, 31:-32:32]) / 32  # (500, 99), each over a stretch
    assert speed.mean() == pytest.approx(1, abs=0.01)
    assert speed.log().std() == pytest.approx(0.5, rel=0.05)
    inside = out[:, 33:64].diff(dim=1)  # at one speed samples are repeated or skipped evenly
    assert (inside.amax(1) - inside.amin(1) <= 1).all()


def test_time_warp_of_no_strength_is_the_row_itself():
    signal, lengths = batch(torch.float64)
    assert torch.equal(time_warp(signal, lengths, strength=0.0)[0], signal)


def test_mask_spans_sets_whole_spans_to_zero_and_the_given_share_in_all():
    signal, lengths = torch.ones(300, 2000), torch.full((300,), 2000)
    out, _, masked = mask_spans(signal, lengths, share=0.4, span=25)
    assert masked.dtype == torch.bool and torch.equal(out, 1.0 - masked.float())
    assert masked.double().mean() == pytest.approx(0.4, abs=0.01)
    for at in (slice(0, 30), slice(-30, None)):  # not fewer at the ends of the row
        assert masked[:, at].double().mean() == pytest.approx(0.4, abs=0.06)
    edges = F.pad(masked, (1, 1)).byte().diff(dim=1)
    first, end = (edges == 1).nonzero(), (edges == 255).nonzero()
    inside = (first[:, 1] > 0) & (end[:, 1] < 2000)  # those at the ends may be cut
    assert (end - first)[inside, 1].min() == 25


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mask_spans_says_what_it_masked_and_the_padding_is_none_of_it(share):
    signal, lengths = batch()
    out, _, masked = mask_spans(signal, lengths, share=share)
    valid = valid_positions(lengths, WIDTH)
    assert torch.equal(out, signal * ~masked) and not masked[~valid].any()
    assert share == 0.3 or (masked[valid] == bool(share)).all()


def test_the_figures_of_the_page_on_augmentations():
    """docs/augmentations.md: what the views do to the levels, the dwell times and the places of a chunk."""
    rng = np.random.default_rng(0)
    _, starts = simulate_read(rng, rng.integers(0, 4, 200_000))
    dwell = np.diff(starts)
    for chance, lost in ((0.25, 0.02), (0.38, 0.04)):
        assert np.mean(chance ** dwell[dwell > 0]) == pytest.approx(lost, abs=0.01)

    kmers = np.array(list(itertools.product(range(4), repeat=6)))
    levels = {tuple(kmer): kmer_levels(kmer)[SIGNAL_BASE] for kmer in kmers}
    table = np.array(list(levels.values()))
    reverse, complement = ([levels[tuple(kmer)] for kmer in other] for other in (kmers[:, ::-1], 3 - kmers))
    assert np.corrcoef(table, reverse)[0, 1] == pytest.approx(-0.07, abs=0.005)
    assert np.corrcoef(table, complement)[0, 1] == pytest.approx(-0.66, abs=0.005)
    following = np.array([[levels[(*kmer[1:], base)] for base in range(4)] for kmer in kmers])
    assert np.mean(abs(following - table[:, None]) < 0.25) == pytest.approx(1 / 7, abs=0.02)

    length = rng.uniform(0.5, 1, (2, 100_000))
    start = rng.uniform(0, 1 - length)
    both = np.minimum(*(start + length)) - np.maximum(*start)
    assert both.mean() == pytest.approx(0.63, abs=0.01)
