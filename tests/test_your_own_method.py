"""docs/your_own_method.md: VICReg and multi-crop, made by the page's own diffs, are right, learn and resume."""

import importlib.util
import re
import sys
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import torch

import dino
from benchmark.plot_runs import read_metrics
from common.chunks import Batch
from common.pore_model import PoreModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "your_own_method.md"
MADE = {"vicreg": "barlow", "multicrop": "dino"}  # by the page's diffs, in order
FACTORS = (25.0, 25.0, 1.0)  # lambda, mu, nu


def source_of(name):
    return (ROOT / f"{name}.py").read_text()


def changed(name, source, page):
    """`source` after the diff of `page` that makes `name`: each hunk's old lines, found by what they say, replaced."""
    blocks = re.findall(r"^```diff\n(.*?)^```", page, re.M | re.S)
    diff, source = dict(zip(MADE, blocks, strict=True))[name], "\n" + source
    for hunk in re.split(r"^(?=@@)", diff, flags=re.M)[1:]:
        title, *lines = hunk.splitlines()
        old, new = ("".join(f"\n{line[1:]}" for line in lines if line[0] in kept) + "\n" for kept in (" -", " +"))
        times, script = source.count(old), f"{MADE[name]}.py"
        assert times == 1, f"{PAGE.name} no longer fits {script}, which has these lines {times} times: {title}{old}"
        source = source.replace(old, new)
    return source[1:]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The folder of vicreg.py and multicrop.py."""
    folder = tmp_path_factory.mktemp("copies")
    for name, original in MADE.items():
        (folder / f"{name}.py").write_text(changed(name, source_of(original), PAGE.read_text()))
    return folder


@pytest.fixture
def made(copies, monkeypatch):
    """The module of this name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, copies / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def vicreg(made):
    return made("vicreg")


@pytest.fixture
def multicrop(made):
    return made("multicrop")


def test_vicreg_takes_at_most_30_changed_lines_and_the_page_counts_them(copies):
    old, new = source_of("barlow").splitlines(), (copies / "vicreg.py").read_text().splitlines()
    changes = [
        (i2 - i1, j2 - j1)
        for kind, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if kind != "equal"
    ]
    lines, removed, added = sum(map(max, changes)), *(sum(counts) for counts in zip(*changes, strict=True))
    assert lines <= 30
    counted = re.findall(r"(\d+)\s+changed lines: (\d+) removed, (\d+) added", PAGE.read_text())
    assert counted == [(str(lines), str(removed), str(added))]


@pytest.mark.parametrize(("name", "of_before"), [("vicreg", "(?i)barlow|args.lambd"), ("multicrop", r"dino\.py")])
def test_a_copy_says_nothing_of_the_script_it_was_and_its_lines_are_no_longer_than_120(name, of_before, copies):
    source = (copies / f"{name}.py").read_text()
    assert not re.findall(of_before, source)
    assert max(map(len, source.splitlines())) <= 120


def test_a_page_that_no_longer_fits_is_told_with_the_lines_it_misses():
    source, page = source_of("barlow"), PAGE.read_text()
    assert changed("vicreg", "# another line\n" + source.replace("import math", "import math  # changed"), page)
    with pytest.raises(AssertionError, match=r"no longer fits barlow.py.* 0 times: @@ Args @@\n +lr: PositiveFloat = "):
        changed("vicreg", source.replace("lr: PositiveFloat = 1e-5", "lr: PositiveFloat = 2e-5"), page)
    with pytest.raises(AssertionError, match=r"no longer fits barlow.py.* 2 times: @@ forward @@"):
        changed("vicreg", source + "    loss, terms = barlow_loss(z1, z2, args.lambd)\n", page)


def reference_terms(z1, z2):
    """Equations 1 to 5 of the paper, element by element, in float64; the 5th divided by d, as in the authors' code."""
    n, d = z1.shape
    variance = covariance = 0.0
    for z in (z1, z2):
        centred = [[z[i, j] - sum(z[:, j]) / n for j in range(d)] for i in range(n)]
        for j in range(d):
            for k in range(d):
                c = sum(centred[i][j] * centred[i][k] for i in range(n)) / (n - 1)  # eq. 3
                if j == k:
                    variance += max(0.0, 1.0 - np.sqrt(c + 1e-4)) / d  # eqs. 1 and 2
                else:
                    covariance += c**2 / d  # eq. 4
    invariance = sum((z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(d)) / n / d  # eq. 5
    return {"invariance": invariance, "variance": variance, "covariance": covariance}


def reference_loss(z1, z2, factors):
    """Equation 6."""
    return sum(factor * term for factor, term in zip(factors, reference_terms(z1, z2).values(), strict=True))


@pytest.mark.parametrize("factors", [FACTORS, (2.0, 3.0, 5.0)])
def test_loss_terms_and_gradient_equal_float64_numpy(vicreg, factors):
    rng = np.random.default_rng(0)
    z1 = rng.normal(2.0, np.linspace(0.1, 2.0, 7), (10, 7))  # deviations on both sides of the hinge
    z2 = z1 + rng.normal(0.0, 0.3, z1.shape)
    x1, x2 = (torch.tensor(r, dtype=torch.float32, requires_grad=True) for r in (z1, z2))
    loss, terms = vicreg.vicreg_loss(x1, x2, *factors)
    assert loss.item() == pytest.approx(reference_loss(z1, z2, factors), rel=1e-5)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(reference_terms(z1, z2), rel=1e-5)
    loss.backward()
    for row, column in ((0, 0), (3, 1), (9, 6)):
        up, down = z1.copy(), z1.copy()
        up[row, column] += 1e-5
        down[row, column] -= 1e-5
        slope = (reference_loss(up, z2, factors) - reference_loss(down, z2, factors)) / 2e-5
        assert x1.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_known_values_of_the_page(vicreg):
    torch.manual_seed(0)
    assert vicreg.vicreg_loss(*torch.ones(2, 64, 2048), *FACTORS)[0].item() == pytest.approx(49.5, abs=0.01)
    loss, terms = vicreg.vicreg_loss(*torch.randn(2, 64, 2048), *FACTORS)
    assert loss.item() == pytest.approx(117, rel=0.02)
    known = {"invariance": 2.0, "variance": 0.08, "covariance": 65.0}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(known, rel=0.1)


def smallest_loss(n, dimensions):
    """What the page says of a covariance of rank n - 1: sigma, and the loss there."""
    rank = 2 * (dimensions / (n - 1) - 1)
    sigma = min(1.0, (50 / 4 / rank) ** (1 / 3))
    return sigma, rank * sigma**4 + 50 * (1 - sigma)


def test_the_smallest_loss_is_the_pages_and_gradient_descent_reaches_it(vicreg):
    assert smallest_loss(64, 2048) == pytest.approx((0.58, 28.1), rel=0.01)
    assert smallest_loss(32, 64)[1] == pytest.approx(2.1, abs=0.05)
    torch.manual_seed(0)
    r = torch.randn(2, 4, 48, requires_grad=True)
    optimizer = torch.optim.Adam([r], 0.05)
    for _ in range(600):
        loss, _ = vicreg.vicreg_loss(r[0], r[1], *FACTORS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sigma, bound = smallest_loss(4, 48)
    assert sigma < 0.9
    assert 0.99 * bound < loss.item() < 1.03 * bound


def run(script, monkeypatch, *words):
    """The script, from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which parse_args changes
    assert not script.main(script.parse_args(script.Args))


SMALL = ("--size", "tiny", "--device", "cpu", "--chunk-len", 400, "--batch-size", 32, "--embedding-dim", 64)
LOCAL = ("--local-views", 2, "--local-share", 0.5)


def log_of(folder):
    return [{**line, "chunks_per_second": 0} for line in read_metrics(folder)]


def test_a_short_run_learns_without_collapse_and_its_pore_model_loads(vicreg, simulated, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(vicreg, monkeypatch, "--data", simulated, *SMALL, "--lr", 1e-3, "--max-steps", 40, "--run-dir", folder)
    metrics = [line for line in read_metrics(folder) if "loss" in line]
    logged = {"invariance", "variance", "covariance", "feature_spread", "effective_rank", "lr", "chunks_per_second"}
    assert metrics[0].keys() == {"step", "loss"} | logged
    for line in metrics:
        terms = (line["invariance"], line["variance"], line["covariance"])
        assert line["loss"] == pytest.approx(np.dot(FACTORS, terms), rel=1e-4)
    assert metrics[-1]["loss"] < 0.85 * metrics[0]["loss"]  # 0.75 measured
    assert metrics[-1]["feature_spread"] > 0.7 and metrics[-1]["effective_rank"] > 10  # 0.89 and 16.5 measured
    PoreModel.from_state_dict(torch.load(folder / "pore_model.pt", weights_only=True))


@pytest.mark.parametrize(("name", "options"), [("vicreg", ("--factors", 20, 20, 2)), ("multicrop", LOCAL)])
def test_a_resumed_run_is_the_run_never_stopped(name, options, made, simulated, tmp_path, monkeypatch):
    script, whole, stopped = made(name), tmp_path / "whole", tmp_path / "stopped"
    for folder, steps in ((whole, 10), (stopped, 6)):
        run(script, monkeypatch, "--data", simulated, *SMALL, *options, "--max-steps", steps, "--run-dir", folder)
    run(script, monkeypatch, "--resume", stopped, "--max-steps", 10)
    weights = [torch.load(folder / "pore_model.pt", weights_only=True) for folder in (whole, stopped)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert log_of(whole) == log_of(stopped) and "loss" in log_of(whole)[-2]


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_the_loss_is_that_of_all_pairs_of_a_teachers_view_and_another_in_float64(
    multicrop, simulated, tmp_path, monkeypatch
):
    """Equation 3 of the paper, of what both networks made of each view in each step."""
    seen, steps, embed, forward = [], [], multicrop.embed, multicrop.forward

    def watched(network, view):
        seen.append((network, view, embed(network, view)))
        return seen[-1][2]

    def checked(models, batch, args):
        centre = models.centre.double().numpy().copy()
        loss, terms, *rest = forward(models, batch, args)
        of = {"student": [], "teacher": []}
        for network, view, outputs in seen:
            name = next(name for name in of if network is models[name])
            of[name].append((view, outputs.detach().double().numpy()))
        seen.clear()
        assert sorted(view[0].shape[1] for view, _ in of["student"]) == [192, 192, 352, 352]
        assert [view[0].shape[1] for view, _ in of["teacher"]] == [352, 352]
        cross, entropy = [], []
        for view, teacher in of["teacher"]:
            log_p = log_softmax((teacher - centre) / args.teacher_temperature)
            entropy.append(-(np.exp(log_p) * log_p).sum(1).mean())
            others = [student for other, student in of["student"] if other is not view]
            cross += [-(np.exp(log_p) * log_softmax(s / args.student_temperature)).sum(1).mean() for s in others]
        assert len(cross) == 2 * 3
        assert loss.item() == pytest.approx(np.mean(cross), rel=1e-5)
        assert terms["teacher_entropy"].item() == pytest.approx(np.mean(entropy), rel=1e-5)
        assert terms["kl"].item() == pytest.approx(np.mean(cross) - np.mean(entropy), rel=1e-4)
        steps.append(np.abs(centre).max())
        return loss, terms, *rest

    monkeypatch.setattr(multicrop, "embed", watched)
    monkeypatch.setattr(multicrop, "forward", checked)
    run(multicrop, monkeypatch, "--data", simulated, *SMALL, *LOCAL, "--max-steps", 3, "--run-dir", tmp_path / "run")
    assert len(steps) > 3 and steps[2] > 0  # validation, too; the centre has moved


def test_a_local_view_is_of_a_part_of_its_own_chunk_anywhere(multicrop):
    torch.manual_seed(0)
    signal = torch.arange(64 * 40.0).view(64, 40)
    part = multicrop.crop(Batch(signal, torch.full((64,), 40)), 0.5)
    assert part.signal.shape == (64, 20) and part.lengths.tolist() == [20] * 64
    starts = part.signal[:, :1] - signal[:, :1]
    assert torch.equal(part.signal, signal[:, :1] + starts + torch.arange(20))
    assert starts.min() == 0 and starts.max() == 20 and len(starts.unique()) > 10
    assert torch.equal(multicrop.crop(Batch(signal, torch.full((64,), 40)), 1.0).signal, signal)


def test_without_local_views_the_run_is_that_of_dino(multicrop, simulated, tmp_path, monkeypatch):
    for script, options in ((dino, ()), (multicrop, ("--local-views", 0))):
        folder = tmp_path / script.__name__
        run(script, monkeypatch, "--data", simulated, *SMALL, *options, "--max-steps", 10, "--run-dir", folder)
    assert log_of(tmp_path / "multicrop") == log_of(tmp_path / "dino")
    weights = [torch.load(tmp_path / name / "pore_model.pt", weights_only=True) for name in ("multicrop", "dino")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
