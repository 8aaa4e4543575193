import sys

import numpy as np
import pytest

from localctl.evaluation.plots import COLORS, STYLE, bars, curves
from localctl.metrics.bootstrap import Interval

pytest.importorskip("matplotlib")


@pytest.fixture
def in_style():
    """For the figures themselves, without their images."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def at(value, half=0.05):
    return Interval(value, value - half, value + half, 9)


def colored(image, color):
    """Return the (row, column) of all pixels of one colour, (n, 2)."""
    rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return np.argwhere((np.asarray(image) == rgb).all(-1))


def test_bars_are_as_long_as_their_values():
    image = bars({"f1": {"a": at(0.2), "b": at(0.4), "c": None}})
    widths = [np.ptp(colored(image, COLORS[i])[:, 1]) for i in range(2)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=4) and len(colored(image, COLORS[2])) == 0
    down = bars({"leak": {"a": at(-0.2), "b": at(0.2)}})
    assert colored(down, COLORS[0])[:, 1].max() <= colored(down, COLORS[1])[:, 1].min() + 1


def test_curves_rise_with_their_values():
    image = curves({"a": {0.1: at(0.2), 1.0: at(0.6)}}, "x", "y", {"level": 0.4})
    found = colored(image, COLORS[0])
    found = found[found[:, 1] < 550]  # without the name beside it
    left, right = (found[found[:, 1] == x][:, 0].mean() for x in (found[:, 1].min() + 3, found[:, 1].max() - 3))
    assert right < left - 50


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.37), (-4, 900), (28, 33)])
def test_ticks_are_round_and_every_interval_is_seen(low, high):
    panel = bars.__wrapped__({"f1": {"a": Interval((low + high) / 2, low, high, 9)}}).axes[0]
    begin, end = panel.get_xlim()
    ticks = [tick for tick in panel.get_xticks() if begin <= tick <= end]
    assert begin <= min(low, 0) and high <= end
    assert 3 <= len(ticks) <= 8 and all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in ticks)


def test_nothing_to_plot_is_refused():
    with pytest.raises(ValueError, match="nothing to plot"):
        bars({"f1": {"a": None}})
    with pytest.raises(ValueError, match="above 0"):
        curves({"a": {0.0: at(1)}}, "x", "y")


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match=r'need matplotlib; run `pip install "localctl\[report\]"`'):
        bars({"f1": {"a": at(0.2)}})


@pytest.mark.parametrize("name", ["two\nlines", "half \ud83d", "x" * 5000, "a\tb\u2028c", "$x^", "漢字", "\u2800"])
def test_no_name_stops_a_figure(name):
    plain = bars({"f1": {"a": at(0.2)}})
    assert bars({name: {name: at(0.2)}}).height <= 2 * plain.height and plain.size == (558, 80)
    curves({name: {0.1: at(0.2), 1.0: at(0.6)}}, "x", "y", {name: 0.4})


@pytest.mark.parametrize("name", ["cover + edges in the second half, on the prompt's rows", "W" * 60, "a word"])
def test_labels_of_any_length_are_whole_and_overlap_nothing(name, in_style):
    """``W`` is the widest letter, and has no place to break."""
    figure = bars.__wrapped__({"f1": {name: at(0.2), f"{name}, 2": at(0.4)}, "leak": {name: at(0.2)}})
    figure.draw_without_rendering()
    plots = [axes.get_window_extent() for axes in figure.axes]
    labels = [label for axes in figure.axes for label in axes.get_yticklabels()]
    assert ["".join(label.get_text().split()) for label in labels] == [
        "".join(text.split()) for text in (name, f"{name}, 2", name)
    ]
    boxes = [label.get_window_extent() for label in labels]
    assert all(box.x0 >= 0 for box in boxes) and not boxes[0].overlaps(boxes[1])
    assert boxes[2].x0 > plots[0].x1


def test_the_names_of_curves_lie_within_the_figure(in_style):
    figure = curves.__wrapped__({f"local term {'sobel ' * 9}": {0.1: at(0.2)}}, "x", "y", {"no local term " * 3: 0.4})
    figure.draw_without_rendering()
    [legend] = [axes.get_legend().get_window_extent() for axes in figure.axes]
    assert legend.x1 <= figure.bbox.width
