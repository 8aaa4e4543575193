"""Plot bars and curves with intervals as images, with matplotlib."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from localctl.labels import one_line, shorten
from localctl.metrics.bootstrap import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
DPI = 100
ROW, LINE, LEFT, WIDTH, HEAD, FOOT, PAD = 18, 13, 230, 300, 24, 24, 14  # pixels of a panel of bars
LONGEST, LINES = 38, 3  # characters of a line of a label, and its lines
_IN_LEGEND = 26  # characters of a line in a legend
STYLE = {"font.size": 7.5, "text.parse_math": False, "axes.spines.right": False, "axes.spines.top": False}


class NoMatplotlibError(ValueError):
    """matplotlib, which is optional, is not installed."""


def _rendered(plot: Callable[..., Figure]) -> Callable[..., Image.Image]:
    """Make ``plot`` return its figure as an image, independent of the user's matplotlib style."""

    @wraps(plot)
    def image(*arguments: Any, **options: Any) -> Image.Image:
        try:
            from matplotlib import style
            from matplotlib.backends.backend_agg import FigureCanvasAgg
        except ImportError:
            raise NoMatplotlibError('Plots need matplotlib; run `pip install "localctl[report]"`.') from None
        with style.context(["default", STYLE]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a label may hold any character
            canvas = FigureCanvasAgg(plot(*arguments, **options))
            canvas.draw()
            return Image.fromarray(np.array(canvas.buffer_rgba())[..., :3])

    return image


@_rendered
def bars(panels: Mapping[str, Mapping[str, Interval | None]], columns: int = 2) -> Figure:
    """Plot one panel of bars per metric: one bar with its interval per row, none for an undefined row.

    ValueError when no row of any panel is defined, or matplotlib is not installed.
    """
    defined = {title: rows for title, rows in panels.items() if any(i is not None for i in rows.values())}
    if not defined:
        raise ValueError("No metric is defined, so there is nothing to plot.")
    columns = min(columns, len(defined))
    labels = [_lines(name) for panel in defined.values() for name in panel]
    row = ROW + (max(label.count("\n") for label in labels)) * LINE
    margin = max(LEFT, max(_width(line) for label in labels for line in label.split("\n")) + PAD)
    width = margin + WIDTH + 2 * PAD
    height = HEAD + max(map(len, defined.values())) * row + FOOT + PAD
    figure = _figure(columns * width, -(-len(defined) // columns) * height)
    for number, (title, panel) in enumerate(defined.items()):
        left, top = number % columns * width + PAD + margin, number // columns * height + HEAD
        _panel(_axes(figure, left, top, WIDTH, len(panel) * row), title, panel)
    return figure


def _panel(axes: Axes, title: str, panel: Mapping[str, Interval | None]) -> None:
    axes.set_title(shorten(title, 60), loc="left", fontsize="medium")
    for row, value in enumerate(panel.values()):
        if value is None:
            axes.text(0.01, row, "undefined", transform=axes.get_yaxis_transform(), color="#888888", va="center")
            continue
        axes.barh(row, value.value, height=0.6, color=COLORS[row % len(COLORS)])
        axes.plot((value.low, value.high), (row, row), color="black", marker="|", markersize=5, linewidth=1)
    axes.set_yticks(range(len(panel)), [_lines(name) for name in panel])
    axes.set_ylim(len(panel) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=7)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.axvline(0, color="black", linewidth=1)


@_rendered
def curves(
    series: Mapping[str, Mapping[float, Interval]],
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    size: tuple[int, int] = (560, 320),
    logarithmic: bool = True,
) -> Figure:
    """Plot one curve with intervals per name over x.

    Args:
        series: interval by x, by the name of the curve.
        levels: heights of horizontal lines, by their names.
        size: (width, height) of the axes and their labels, in pixels.
        logarithmic: whether the x axis is logarithmic.

    Raises:
        ValueError: there is no point, an x is not positive on a logarithmic axis, or matplotlib is not installed.
    """
    from matplotlib.transforms import ScaledTranslation

    xs = sorted({x for curve in series.values() for x in curve})
    if not xs or (logarithmic and xs[0] <= 0):
        raise ValueError("Curves need at least one point, and x above 0 for their logarithmic axis.")
    figure = _figure(size[0] + 200, size[1])
    axes = _axes(figure, 60, HEAD, size[0] - 60, size[1] - HEAD - 40)
    if logarithmic:
        axes.set_xscale("log")
    for name, y in (levels or {}).items():
        axes.axhline(y, color="#999999", linewidth=1, label=_lines(name, _IN_LEGEND))
    for number, (name, curve) in enumerate(series.items()):
        color, offset = COLORS[number % len(COLORS)], 3 * (number - len(series) // 2)  # keeps intervals apart
        moved = axes.transData + ScaledTranslation(offset / DPI, 0, figure.dpi_scale_trans)
        axes.update_datalim([(x, y) for x, i in curve.items() for y in (i.low, i.value, i.high)])
        along = sorted(curve)
        label = _lines(name, _IN_LEGEND)
        axes.plot(along, [curve[x].value for x in along], "o-", color=color, ms=5, label=label, transform=moved)
        for x in along:
            ends = (curve[x].low, curve[x].high)
            axes.plot((x, x), ends, color=color, marker="_", markersize=5, linewidth=1, transform=moved)
    axes.margins(x=0.1)
    axes.autoscale_view()
    if logarithmic:
        axes.minorticks_off()
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.set_xlabel(x_label, loc="right")
    axes.set_title(y_label, loc="left", fontsize="medium")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _figure(width: int, height: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width / DPI, height / DPI), dpi=DPI)


def _axes(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Add axes at this place, in pixels."""
    across, down = figure.get_size_inches() * DPI
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _lines(name: str, letters: int = LONGEST) -> str:
    """Return a label on lines of so many letters; one that is too long for these ends with dots."""
    return "\n".join(textwrap.wrap(one_line(name), letters, max_lines=LINES, placeholder=" ..."))


def _width(line: str) -> int:
    """Return the width of a line of a label in pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=float(STYLE["font.size"]))
    width, _, _ = text_to_path.get_text_width_height_descent(line, font, ismath=False)
    return math.ceil(width * DPI / 72)
