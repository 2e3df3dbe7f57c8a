"""docs/your_own_method.md: VICReg, made out of barlow.py by the page's own diff, is right, learns and resumes."""

import importlib.util
import re
import sys
from difflib import ndiff
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.plot_runs import read_metrics
from common.pore_model import PoreModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "your_own_method.md"
FACTORS = (25.0, 25.0, 1.0)  # lambda, mu, nu


def changed(source, page):
    """`source` after the one diff block of `page`: the old lines of each hunk, found by what they say, replaced."""
    blocks = re.findall(r"^```diff\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 1, f"{PAGE.name} should hold one diff block, not {len(blocks)}"
    source = "\n" + source
    for hunk in re.split(r"^(?=@@)", blocks[0], flags=re.M)[1:]:
        title, *lines = hunk.splitlines()
        old, new = ("".join(f"\n{line[1:]}" for line in lines if line[0] in kept) + "\n" for kept in (" -", " +"))
        times = source.count(old)
        assert times == 1, f"{PAGE.name} no longer fits barlow.py, which has these lines {times} times: {title}{old}"
        source = source.replace(old, new)
    return source[1:]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The path of vicreg.py."""
    path = tmp_path_factory.mktemp("copy") / "vicreg.py"
    path.write_text(changed((ROOT / "barlow.py").read_text(), PAGE.read_text()))
    return path


@pytest.fixture
def vicreg(copy, monkeypatch):
    spec = importlib.util.spec_from_file_location("vicreg", copy)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vicreg", module)
    spec.loader.exec_module(module)
    return module


def test_the_change_has_at_most_30_lines_and_the_page_counts_them(copy):
    old, new = ((folder / name).read_text() for folder, name in ((ROOT, "barlow.py"), (copy.parent, "vicreg.py")))
    lines = sum(line[0] in "+-" for line in ndiff(old.splitlines(), new.splitlines()))
    assert lines <= 30
    assert re.findall(r"(\d+)\s+changed lines", PAGE.read_text()) == [str(lines)]
    assert "barlow_loss" not in new and "args.lambd" not in new
    assert max(map(len, new.splitlines())) <= 120


def test_a_page_that_no_longer_fits_is_told_with_the_lines_it_misses():
    source, page = (ROOT / "barlow.py").read_text(), PAGE.read_text()
    assert changed("# another line\n" + source.replace("import math", "import math  # changed"), page)
    with pytest.raises(AssertionError, match=r"no longer fits barlow.py.* 0 times: @@ Args @@\n +lr: float = 1e-5"):
        changed(source.replace("lr: float = 1e-5", "lr: float = 2e-5"), page)
    with pytest.raises(AssertionError, match=r"no longer fits barlow.py.* 2 times: @@ validate @@"):
        changed(source + "        loss, _ = barlow_loss(r1, r2, args.lambd)\n", page)


def reference_terms(r1, r2):
    """Equations 1 to 5 of the paper, element by element, in float64; the 5th divided by d, as in the authors' code."""
    n, d = r1.shape
    variance = covariance = 0.0
    for z in (r1, r2):
        centred = [[z[i, j] - sum(z[:, j]) / n for j in range(d)] for i in range(n)]
        for j in range(d):
            for k in range(d):
                c = sum(centred[i][j] * centred[i][k] for i in range(n)) / (n - 1)  # eq. 3
                if j == k:
                    variance += max(0.0, 1.0 - np.sqrt(c + 1e-4)) / d  # eqs. 1 and 2
                else:
                    covariance += c**2 / d  # eq. 4
    invariance = sum((r1[i, j] - r2[i, j]) ** 2 for i in range(n) for j in range(d)) / n / d  # eq. 5
    return {"invariance": invariance, "variance": variance, "covariance": covariance}


def reference_loss(r1, r2, factors):
    """Equation 6."""
    return sum(factor * term for factor, term in zip(factors, reference_terms(r1, r2).values(), strict=True))


@pytest.mark.parametrize("factors", [FACTORS, (2.0, 3.0, 5.0)])
def test_loss_terms_and_gradient_equal_float64_numpy(vicreg, factors):
    rng = np.random.default_rng(0)
    r1 = rng.normal(2.0, np.linspace(0.1, 2.0, 7), (10, 7))  # deviations on both sides of the hinge
    r2 = r1 + rng.normal(0.0, 0.3, r1.shape)
    x1, x2 = (torch.tensor(r, dtype=torch.float32, requires_grad=True) for r in (r1, r2))
    loss, terms = vicreg.vicreg_loss(x1, x2, *factors)
    assert loss.item() == pytest.approx(reference_loss(r1, r2, factors), rel=1e-5)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(reference_terms(r1, r2), rel=1e-5)
    loss.backward()
    for row, column in ((0, 0), (3, 1), (9, 6)):
        up, down = r1.copy(), r1.copy()
        up[row, column] += 1e-5
        down[row, column] -= 1e-5
        slope = (reference_loss(up, r2, factors) - reference_loss(down, r2, factors)) / 2e-5
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


def run(vicreg, monkeypatch, *words):
    """The copy, from the command line."""
    monkeypatch.setattr(sys, "argv", ["vicreg.py", *map(str, words)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which parse_args changes
    vicreg.main(vicreg.parse_args(vicreg.Args))


SMALL = ("--size", "tiny", "--device", "cpu", "--chunk-len", 400, "--batch-size", 32, "--representation", 64)


def test_a_short_run_learns_without_collapse_and_its_pore_model_loads(vicreg, simulated, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(vicreg, monkeypatch, "--data", simulated, *SMALL, "--lr", 1e-3, "--max-steps", 40, "--run-dir", folder)
    metrics = [line for line in read_metrics(folder) if "loss" in line]
    logged = {"invariance", "variance", "covariance", "feature_spread", "effective_rank", "lr", "chunks_per_second"}
    assert metrics[0].keys() == {"step", "loss"} | logged
    for line in metrics:
        terms = (line["invariance"], line["variance"], line["covariance"])
        assert line["loss"] == pytest.approx(np.dot(FACTORS, terms), rel=1e-4)
    assert metrics[-1]["loss"] < 0.85 * metrics[0]["loss"]  # 0.76 measured
    assert metrics[-1]["feature_spread"] > 0.7 and metrics[-1]["effective_rank"] > 10  # 0.91 and 16.2 measured
    PoreModel.from_state_dict(torch.load(folder / "pore_model.pt", weights_only=True))


def test_a_resumed_run_is_the_run_never_stopped(vicreg, simulated, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    factors = ("--factors", 20, 20, 2)
    run(vicreg, monkeypatch, "--data", simulated, *SMALL, *factors, "--max-steps", 10, "--run-dir", whole)
    run(vicreg, monkeypatch, "--data", simulated, *SMALL, *factors, "--max-steps", 6, "--run-dir", stopped)
    run(vicreg, monkeypatch, "--resume", stopped, "--max-steps", 10)
    weights = [torch.load(folder / "pore_model.pt", weights_only=True) for folder in (whole, stopped)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    logs = [[{**line, "chunks_per_second": 0} for line in read_metrics(folder)] for folder in (whole, stopped)]
    assert logs[0] == logs[1] and "loss" in logs[0][-2]
