"""Pictures of reads: current, cells, borders and hidden events at their samples."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex

from benchmark import draw_read as script
from common import InputError
from common.args import parse_args
from common.reads.formats import raw_reads
from common.reads.normalise import normalised
from common.reads.pictures import COLOURS, LINE, draw_events, draw_read
from masked import BINS, find_events
from tests.forks import script as script_in_a_process

RNG = np.random.default_rng(0)


def current_of(axis):
    """The samples drawn and the current there."""
    (line,) = (line for line in axis.lines if line.get_marker() == ".")
    return line.get_xdata(), line.get_ydata()


def cells(axis, name):
    """(first sample, end, letter of the colour) of the cells in the row `name`."""
    ticks = dict(zip([text.get_text() for text in axis.get_yticklabels()], axis.get_yticks(), strict=True))
    letters = {colour.lower(): letter for letter, colour in COLOURS.items()}
    found = []
    for cell in axis.patches:
        (left, bottom), height = cell.get_xy(), cell.get_height()
        if bottom < ticks[name] < bottom + height:
            found.append((left, left + cell.get_width(), letters[to_hex(cell.get_facecolor())]))
    return found


def letters(axis):
    return [(text.get_position()[0], text.get_text()) for text in axis.texts if text.get_text() in "ACGT"]


def borders(figure):
    return [line.get_xdata()[0] for axis in figure.axes for line in axis.lines if line.get_linestyle() == "--"]


def test_cells_stand_at_their_samples_with_their_letters():
    bases, starts = np.array([4, 1, 2, 3, 1], np.uint8), np.array([100, 110, 130, 131, 131, 160])
    figure = draw_read(RNG.normal(size=60), 100, {"reference": (bases, starts)})
    (axis,) = figure.axes
    assert cells(axis, "reference") == [(100, 110, "T"), (110, 130, "A"), (130, 131, "C"), (131, 160, "A")]
    assert letters(axis) == [(105, "T"), (120, "A"), (130.5, "C"), (145.5, "A")]
    begins, stroke = axis.collections  # of the cells, and for the base of no samples
    assert [line[0, 0] for line in begins.get_segments()] == list(starts[:-1])
    assert [line[0, 0] for line in stroke.get_segments()] == [131] and to_hex(stroke.get_color()[0]) == "#f7c453"
    assert axis.get_xlabel() == "sample of the read" and "med-mad units" in figure.get_supylabel()


def test_rows_do_not_touch_and_stand_above_the_current():
    current, starts = RNG.normal(size=300).astype(np.float16), np.arange(0, 301, 10)
    rows = {name: (RNG.integers(1, 5, 30), starts) for name in ("reference", "called")}
    (axis,) = draw_read(current, 0, rows).axes
    bands = sorted({(cell.get_y(), cell.get_y() + cell.get_height()) for cell in axis.patches}, reverse=True)
    assert [len(cells(axis, name)) for name in rows] == [30, 30]
    assert axis.get_ylim()[1] > bands[0][1] > bands[0][0] > bands[1][1] > bands[1][0] > current.max()
    ticks = {text.get_text(): place for text, place in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)}
    assert ticks["reference"] > ticks["called"]
    assert all(float(name) == place for name, place in ticks.items() if name not in rows)


def test_letters_fit_their_cells():
    starts = np.cumsum([0, *RNG.integers(1, 15, 150)])
    figure = draw_read(RNG.normal(size=starts[-1]), 0, {"a name of some length": (RNG.integers(1, 5, 150), starts)})
    FigureCanvasAgg(figure).draw()  # lays out
    drawn = 0
    for axis in figure.axes:
        boxes = [cell.get_window_extent() for cell in axis.patches]
        for text in axis.texts:
            box = text.get_window_extent()
            drawn += 1
            # a pixel more, since widths of text are whole ones
            assert any(cell.x0 - 1 < box.x0 and box.x1 < cell.x1 + 1 and cell.y0 < box.y0 < cell.y1 for cell in boxes)
    assert drawn > 100


@pytest.mark.parametrize("samples", [1, LINE, LINE + 1, 1234, 3001])
def test_wrapping_loses_nothing(samples):
    current = RNG.normal(size=samples).astype(np.float32)
    starts = np.unique([0, *RNG.integers(0, samples + 1, samples // 9), samples])
    bases = RNG.integers(1, 5, len(starts) - 1)
    figure = draw_read(current, 7000, {"reference": (bases, starts + 7000)})
    where, values = (np.concatenate(part) for part in zip(*map(current_of, figure.axes), strict=True))
    assert len(figure.axes) == -(-samples // LINE)
    np.testing.assert_array_equal(where, np.arange(7000, 7000 + samples))
    np.testing.assert_array_equal(values, current)
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    shown = [cell for axis in figure.axes for cell in cells(axis, "reference")]
    spelled = "".join("ACGT"[base - 1] * n for base, n in zip(bases, np.diff(starts), strict=True))
    assert "".join(letter * int(end - start) for start, end, letter in shown) == spelled
    for axis in figure.axes:
        left, right = axis.get_xlim()
        assert all(left <= start < end <= right for start, end, _ in cells(axis, "reference"))


def test_a_base_on_two_lines_has_its_letter_once():
    figure = draw_read(np.zeros(2 * LINE), 0, {"reference": ([1, 2, 3], [0, LINE - 20, LINE + 40, 2 * LINE])})
    above, below = figure.axes
    assert cells(above, "reference")[1] == (LINE - 20, LINE, "C")
    assert cells(below, "reference")[0] == (LINE, LINE + 40, "C")
    assert [letter for _, letter in letters(above)] == ["A"] and letters(below)[0] == (LINE + 20, "C")


def test_borders_are_drawn_once_where_they_are():
    figure = draw_read(np.zeros(1200), 1000, {}, borders=(900, 1000, 1400, 1990, 2199, 2200))
    assert borders(figure) == [1000, 1400, 1990, 2199]
    assert [len(axis.texts) for axis in figure.axes] == [1, 1, 2]
    assert {text.get_text() for axis in figure.axes for text in axis.texts} == {"chunk border"}


def test_hidden_events_have_their_prediction_as_shades_and_their_level_as_a_line():
    level = np.resize([-1.0, 0.5, 1.5, 0.0], 120)
    signal = torch.tensor(np.repeat(level, 10)[None] + 0.05 * RNG.normal(size=(1, 1200)), dtype=torch.float32)
    events, edges = find_events(signal), torch.linspace(-2, 2, BINS - 1)
    hidden = torch.zeros_like(events.level, dtype=torch.bool)
    hidden[0, [3, 60, 110]] = True  # the last is not shown
    logits = torch.full((*hidden.shape, BINS), -9.0)
    logits[0, 3, 20] = 9  # sure of a level of 0.53 to 0.67
    figure = draw_events(signal, events, hidden, logits, edges)
    assert [axis.get_xlim() for axis in figure.axes] == [(-0.5, 499.5), (499.5, 999.5)]
    for axis, event in zip(figure.axes, (3, 60), strict=True):
        (column,) = (c for c in axis.collections if isinstance(c, QuadMesh))
        x, y = column.get_coordinates()[..., 0], column.get_coordinates()[..., 1]
        first, samples = int(events.start[0, event]), int(events.length[0, event])
        assert (x.min(), x.max()) == (first - 0.5, first + samples - 0.5)
        np.testing.assert_allclose(y[1:-1, 0], edges, rtol=1e-6)
        (line,) = (c for c in axis.collections if isinstance(c, LineCollection) and c.get_linewidth() == [2])
        np.testing.assert_allclose(line.get_segments()[0][:, 1], events.level[0, event], rtol=1e-6)
        seen = axis.lines[1].get_ydata()  # the current that the model had
        assert set(range(first, first + samples)) <= set(np.flatnonzero(np.isnan(seen)))
        assert np.isnan(seen).sum() == (events.length * hidden)[0, :100].sum()
    (sure, _) = (c.get_array() for axis in figure.axes for c in axis.collections if isinstance(c, QuadMesh))
    assert sure.argmax() == 20 and sure.max() == 1 and np.delete(sure, 20).max() < 1e-3


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs the script in this process and gives the figure it saved."""
    figures = []

    def saved(*arguments):
        figures.append(draw_read(*arguments))
        return figures[-1]

    def run(*words, picture=tmp_path / "read.png"):
        monkeypatch.setattr(script, "draw_read", saved)
        monkeypatch.setattr(sys, "argv", ["draw_read", str(picture), *map(str, words)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        script.main(parse_args(script.Args))
        assert picture.read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return run


def test_script_draws_the_first_read_around_a_chunk_border(draw, simulated):
    raw = next(raw_reads(simulated))
    figure = draw(simulated, "--chunk-len", 2000)
    where, values = (np.concatenate(part) for part in zip(*map(current_of, figure.axes), strict=True))
    assert len(where) == 1500 and raw.id in figure.get_suptitle()
    np.testing.assert_array_equal(values, normalised(raw)[0][where])
    (border,) = borders(figure)
    assert (border - raw.base_starts[0]) % 2000 == 0
    start, end, letter = cells(figure.axes[0], "reference")[3]
    base = list(raw.base_starts).index(start)
    assert raw.base_starts[base + 1] == end and "ACGT"[raw.bases[base] - 1] == letter


def test_script_counts_borders_from_the_first_mapped_sample(draw, shared_data):
    path = shared_data / "ecoli_r94_mapped.hdf5"
    raw = next(raw_reads(path))
    assert raw.base_starts[0] == 765
    figure = draw(path, "--read", raw.id, "--start", 700, "--samples", 900, "--chunk-len", 300)
    assert borders(figure) == [765, 1065, 1365]
    assert cells(figure.axes[0], "reference")[0][0] == 765


def test_script_draws_called_bases_at_their_moves(draw, shared_data):
    bam = shared_data / "na12878_r941_moves.bam"
    figure = draw(shared_data / "na12878_r941.pod5", "--bam", f"fast={bam}", bam, "--start", 20001, "--samples", 400)
    (axis,) = figure.axes
    assert cells(axis, "fast") == cells(axis, "na12878_r941_moves") and len(cells(axis, "fast")) > 20
    assert all((end - start) % 5 == 0 for start, end, _ in cells(axis, "fast")[1:-1])
    assert "100 ms" in figure.get_suptitle()
    assert borders(figure) == [20275]  # the first move is at 2275


def test_errors(draw, simulated):
    with pytest.raises(InputError, match="--read none: no such read in"):
        draw(simulated, "--read", "none")
    with pytest.raises(InputError, match="--start 9999999: the read"):
        draw(simulated, "--start", 9999999)
    with pytest.raises(InputError, match="--samples 20001: should be less than or equal to 20000"):
        draw(simulated, "--samples", 20001)
    with pytest.raises(InputError, match="the picture comes first"):
        draw(simulated, picture=simulated)


def test_a_read_that_is_not_in_the_bam(draw, simulated, shared_data):
    bam = f"called={shared_data}/na12878_r941_moves.bam"
    with pytest.raises(InputError, match="no read that can be drawn"):
        draw(simulated, "--bam", bam)
    with pytest.raises(InputError, match="called: not in the BAM"):
        draw(simulated, "--bam", bam, "--read", next(raw_reads(simulated)).id)


def test_an_error_is_one_line(child, simulated):
    code, (line,) = child(partial(script_in_a_process, "benchmark.draw_read", "p.png", simulated, "--read", "none"))
    assert code == 1 and "--read none" in line
