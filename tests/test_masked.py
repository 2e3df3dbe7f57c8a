"""masked.py: events, what is hidden, what reaches a prediction, the loss, and that it learns k-mers and nothing else."""

import math

import numpy as np
import pytest
import torch

import masked
from common.chunks import Batch
from common.reads.normalise import med_mad
from common.reads.simulate import simulate_read
from masked import BINS, THRESHOLD, find_events, hide, masked_loss


def simulated_chunks(chunks, samples, seed=0):
    """Normalised current (N, L) of the full simulator, and the borders of its bases, a list of samples of each chunk."""
    rng, signals, borders = np.random.default_rng(seed), [], []
    for _ in range(chunks):
        signal, starts = simulate_read(rng, rng.integers(0, 4, samples))
        shift, scale = med_mad(signal)
        signals.append((signal[:samples] - shift) / scale)
        borders.append(np.unique(starts[(starts > 0) & (starts < samples)]))
    return torch.tensor(np.array(signals), dtype=torch.float32), borders


def borders_by_a_loop(x):
    """The borders that the docstring defines, sample by sample, in float64."""
    t = np.zeros(len(x))
    for i in range(4, len(x) - 3):
        before, after = x[i - 4 : i], x[i : i + 4]
        pooled = max(0.01, (before.var() * 4 + after.var() * 4) / 6)
        t[i] = abs(after.mean() - before.mean()) / math.sqrt(2 * pooled / 4)
    return [i for i in range(len(x)) if t[i] > THRESHOLD and t[i] == max(t[max(0, i - 2) : i + 3])]


def test_events_are_those_of_a_plain_loop():
    signal, _ = simulated_chunks(3, 500)
    events = find_events(signal)
    for row, x in enumerate(signal.double().numpy()):
        starts = [0, *borders_by_a_loop(x), len(x)]
        length, level = events.length[row], events.level[row]
        there = int((length > 0).sum())
        assert length[:there].tolist() == np.diff(starts).tolist() and not length[there:].any()
        assert events.start[row, :there].tolist() == starts[:-1]
        means = [x[first:end].mean() for first, end in zip(starts[:-1], starts[1:], strict=True)]
        assert level[:there].tolist() == pytest.approx(means, abs=1e-5)
        assert events.of_sample[row].tolist() == np.repeat(range(there), np.diff(starts)).tolist()


def test_borders_are_found_and_few_are_false():
    """Against the steps of the full simulator that are seen at all: bases of two samples or more, levels that differ."""
    signal, borders = simulated_chunks(16, 2000, seed=1)
    events, right, found, wanted, true = find_events(signal), 0, 0, 0, 0
    for row, there in enumerate(borders):
        starts = events.start[row][events.length[row] > 0].numpy()[1:]
        found += len(starts)
        right += sum(np.abs(there - start).min() <= 3 for start in starts)
        x = signal[row].numpy()
        for left, border, end in zip([0, *there[:-1]], there, [*there[1:], len(x)], strict=True):
            if min(border - left, end - border) >= 4 and abs(x[left:border].mean() - x[border:end].mean()) > 0.4:
                wanted += 1
                true += np.abs(starts - border).min() <= 3
    print(true / wanted, right / found)
    assert true / wanted > 0.9 and right / found > 0.75


def test_hidden_events_are_whole_stand_alone_and_are_no_outer_ones():
    signal, _ = simulated_chunks(8, 1200)
    events = find_events(signal)
    for gap in (1, 2, 3):
        torch.manual_seed(gap)
        noisy, hidden = hide(signal, events, gap)
        assert events.length[hidden].min() >= 3 and events.length[hidden].max() <= 40
        for row in range(len(signal)):
            chosen = hidden[row].nonzero()[:, 0]
            assert chosen[0] > 0 and chosen[-1] < events.of_sample[row, -1] and (chosen.diff() > gap).all()
            expected = torch.zeros(signal.shape[1], dtype=torch.bool)
            for event in chosen:
                first = int(events.start[row, event])
                expected[first - 1 : first + int(events.length[row, event]) + 1] = True
            assert torch.equal(noisy[row] != signal[row], expected)
        covered = noisy[noisy != signal]
        assert abs(covered.mean()) < 0.1 and abs(covered.std() - 1) < 0.1


def models_of(size="tiny"):
    torch.manual_seed(0)
    pore_model = masked.PoreModel.of_size(size, 0.0)
    c = pore_model.channels
    models = torch.nn.ModuleDict({"pore_model": pore_model, "head": torch.nn.Linear(c, 2 * BINS)})
    models.register_buffer("edges", torch.linspace(-2, 2, BINS - 1))
    models.register_buffer("chain", torch.full((BINS, BINS), -math.log(BINS)))
    return models.eval()


def test_nothing_of_a_hidden_event_reaches_its_prediction(monkeypatch):
    """Other samples in its place give the same logits, bit for bit; and it has no gradient."""
    signal, _ = simulated_chunks(4, 1200)
    events, models, args = find_events(signal), models_of(), masked.Args(device="cpu", precision="fp32")
    _, hidden = hide(signal, events, args.gap)
    covered = hidden.gather(1, events.of_sample)
    monkeypatch.setattr(masked, "find_events", lambda signal: events)  # the same events, whatever is in them
    monkeypatch.setattr(masked, "gain_offset", lambda signal, *_: (signal, None))

    def logits_of(signal):
        batch = Batch(signal, torch.full((len(signal),), signal.shape[1]))
        torch.manual_seed(1)
        loss, _, _, (_, _, chosen, logits) = masked.forward(models, batch, args)
        return loss, chosen, logits

    torch.manual_seed(1)
    _, chosen, logits = logits_of(signal)
    covered = chosen.gather(1, events.of_sample)
    other = torch.where(covered, 10 * torch.randn_like(signal), signal)
    assert not torch.equal(other, signal)
    assert torch.equal(logits_of(other)[2], logits)
    given = signal.clone().requires_grad_()
    loss, _, logits = logits_of(given)
    logits[chosen].square().sum().backward()
    assert not given.grad[covered].any() and given.grad[~covered].any()


def reference(logits, bins, hidden, chain):
    """The loss and its terms, event by event, in float64."""
    losses, plain, floor, near = [], [], [], []
    for row, event in zip(*np.nonzero(hidden), strict=True):
        p = np.exp(logits[row, event] - logits[row, event].max())
        p /= p.sum()
        b = bins[row, event]
        q = np.exp(-0.5 * ((np.arange(BINS) - b) / 0.7) ** 2)
        losses.append(-(q / q.sum() * np.log(p)).sum())
        plain.append(-np.log(p[b]))
        both = np.exp(chain[bins[row, event - 1]]) * np.exp(chain[:, bins[row, event + 1]])
        floor.append(-np.log(both[b] / both.sum()))
        near.append(abs(p.argmax() - b) <= 1)
    mean = [np.mean(x) for x in (losses, plain, floor, near)]
    gained = [5 - x / math.log(2) for x in mean[1:3]]
    return mean[0], {"cross_entropy": mean[1], "gained": gained[0], "floor": gained[1], "within_a_bin": mean[3]}


def test_loss_and_terms_equal_float64_numpy():
    rng = np.random.default_rng(0)
    logits, bins = rng.normal(0, 2, (3, 9, BINS)), rng.integers(0, BINS, (3, 9))
    hidden = np.zeros((3, 9), bool)
    hidden[0, [2, 5]] = hidden[2, 3] = True
    chain = np.log(rng.dirichlet(np.ones(BINS), BINS))
    loss, terms = masked_loss(
        torch.tensor(logits, dtype=torch.float32), torch.tensor(bins), torch.tensor(hidden), torch.tensor(chain)
    )
    expected, expected_terms = reference(logits, bins, hidden, chain)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected_terms, rel=1e-5)


def test_to_know_nothing_costs_ln_32():
    hidden = torch.ones(2, 5, dtype=torch.bool)
    chain = torch.full((BINS, BINS), -math.log(BINS))
    loss, terms = masked_loss(torch.zeros(2, 5, BINS), torch.randint(BINS, (2, 5)), hidden, chain)
    assert loss.item() == pytest.approx(math.log(32)) and terms["cross_entropy"].item() == pytest.approx(math.log(32))
    assert terms["gained"].item() == pytest.approx(0, abs=1e-5) and terms["floor"].item() == pytest.approx(0, abs=1e-5)
