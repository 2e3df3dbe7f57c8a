"""masked.py: events, what is hidden, what reaches a prediction, the loss; that it learns k-mers and nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch

import masked
from benchmark.plot_runs import read_metrics
from common.chunks import Batch
from common.reads import simulate
from common.reads.normalise import med_mad
from masked import BINS, THRESHOLD, find_events, hide, masked_loss


def simulated_chunks(chunks, samples, seed=0):
    """Normalised current (N, L) of the full simulator, and the samples of each chunk at which a base begins."""
    rng, signals, borders = np.random.default_rng(seed), [], []
    for _ in range(chunks):
        signal, starts = simulate.simulate_read(rng, rng.integers(0, 4, samples))
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
        means = [x[first:end].mean() for first, end in itertools.pairwise(starts)]
        assert level[:there].tolist() == pytest.approx(means, abs=1e-5)
        assert events.of_sample[row].tolist() == np.repeat(range(there), np.diff(starts)).tolist()


def test_borders_are_found_and_few_are_false():
    """A found border is right if a base begins within one sample of it, one of three samples or more or of fewer.

    To be found are those where two bases of three samples or more meet whose mean currents differ by 0.3: others are
    hard to see for anybody. Borders found are three samples apart, so none counts twice. Recall measured: 0.97, and
    0.79 of all borders, those of bases of a single sample and of equal levels included. Precision: 0.96; of places
    drawn at random 0.32 are right.
    """
    signal, borders = simulated_chunks(16, 2000, seed=1)
    events, seen, right = find_events(signal), [], []
    for row, there in enumerate(borders):
        found, x = events.start[row][events.length[row] > 0].numpy()[1:], signal[row].numpy()
        right += [np.abs(there - border).min() <= 1 for border in found]
        for left, border, end in zip([0, *there[:-1]], there, [*there[1:], len(x)], strict=True):
            if min(border - left, end - border) >= 3 and abs(x[left:border].mean() - x[border:end].mean()) > 0.3:
                seen.append(np.abs(found - border).min() <= 1)
    assert len(seen) > 2000 and np.mean(seen) > 0.95 and np.mean(right) > 0.95


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
    monkeypatch.setattr(masked, "find_events", lambda signal: events)  # the same events, whatever is in them
    monkeypatch.setattr(masked, "gain_offset", lambda signal, *_: (signal, None))

    def logits_of(signal):
        batch = Batch(signal, torch.full((len(signal),), signal.shape[1]))
        torch.manual_seed(1)
        *_, (_, _, chosen, logits) = masked.forward(models, batch, args)
        return chosen, logits

    chosen, logits = logits_of(signal)
    covered = chosen.gather(1, events.of_sample)
    other = torch.where(covered, 10 * torch.randn_like(signal), signal)
    assert not torch.equal(other, signal)
    assert torch.equal(logits_of(other)[1], logits)
    given = signal.clone().requires_grad_()
    _, logits = logits_of(given)
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


def test_the_floor_is_what_the_neighbours_tell():
    """Of eight levels in a fixed order either neighbour tells all three bits; of random ones, that it is another."""
    rng, floors = np.random.default_rng(0), []
    for ordered in (True, False):

        class Chunks:
            @staticmethod
            def batch(seed, step, size, ordered=ordered):
                level = rng.integers(0, 8, (size, 60))
                level = (level[:, :1] + 3 * np.arange(60)) % 8 if ordered else level
                signal = np.repeat(level - 3.5, 10, 1) + rng.normal(0, 0.05, (size, 600))
                return Batch(torch.tensor(signal, dtype=torch.float32), None)

        edges, chain = masked.count_levels(Chunks, masked.Args())
        torch.testing.assert_close(chain.exp().sum(1), torch.ones(BINS))
        signal = Chunks.batch(0, 0, 64).signal  # others than those counted
        events = find_events(signal)
        bins = torch.bucketize(events.level, edges)
        shares = bins[events.length > 0].bincount(minlength=BINS) / (events.length > 0).sum()
        assert (shares - 1 / BINS).abs().max() < 0.01
        _, hidden = hide(signal, events, 2)
        _, terms = masked_loss(torch.zeros(*bins.shape, BINS), bins, hidden, chain)
        floors.append(float(terms["floor"]))
    assert floors == [pytest.approx(3, abs=0.1), pytest.approx(math.log2(8 / 6.125), abs=0.1)]


@pytest.mark.parametrize("levels", ["of k-mers", "random"])
def test_it_learns_kmers_and_nothing_else(levels, tmp_path, monkeypatch):
    """The same pore, dwell times and noise; only where bases set the level is there more to learn than the floor.

    The k-mers are those of two bases, 64 of them, since few steps teach those: 2.20 bits gained, floor 1.60. Random
    levels: -0.02 and 0.17. With four bases 400 such steps gained 0.94, floor 0.82; random levels 0.00, floor 0.20.
    """
    kmer_levels, rng = simulate.kmer_levels, np.random.default_rng(0)
    changed = {"of k-mers": lambda bases: kmer_levels(bases % 2), "random": lambda bases: rng.normal(size=len(bases))}
    monkeypatch.setattr(simulate, "kmer_levels", changed[levels])
    simulate.write_simulated(tmp_path / "reads.hdf5", 20, mean_bases=3000, seed=3, easy=True)
    small = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 32, "lr": 4e-3, "warmup_steps": 20}
    masked.main(masked.Args(data=(tmp_path / "reads.hdf5",), run_dir=tmp_path / "run", max_steps=110, **small))
    gained, floor = (read_metrics(tmp_path / "run")[-1][f"validation/{name}"] for name in ("gained", "floor"))
    assert gained > floor + 0.2 if levels == "of k-mers" else gained < floor + 0.05
