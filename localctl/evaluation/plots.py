"""Bars and curves with intervals, as pictures; drawn with PIL, which is there anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from localctl.labels import one_line
from localctl.metrics.bootstrap import Interval

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
ROW, LEFT, WIDTH, HEAD, FOOT, PAD = 18, 230, 300, 22, 20, 14
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Scale:
    """Values from low to high onto pixels from begin to end, which may run backwards."""

    low: float
    high: float
    begin: int
    end: int

    def __call__(self, value: float) -> int:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin))

    @property
    def ticks(self) -> list[float]:
        """Round values, three to eight, in the range."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 7)
        return [k * step for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def scale_of(intervals: Sequence[Interval], begin: int, end: int, zero: bool) -> Scale:
    """A scale that shows all of ``intervals``, with some air; ``zero``: from 0 on, where none is below."""
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    air = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(0.0 if zero and low >= 0 else low - air, high + air, begin, end)


def bars(panels: Mapping[str, Mapping[str, Interval | None]], columns: int = 2) -> Image.Image:
    """One panel per figure, one bar with its interval per row; rows that are undefined stay empty.

    ValueError where there is nothing to draw.
    """
    shown = {title: rows for title, rows in panels.items() if any(i is not None for i in rows.values())}
    if not shown:
        raise ValueError("There is no figure to plot.")
    rows = max(len(panel) for panel in shown.values())
    width, height = LEFT + WIDTH + 2 * PAD, HEAD + rows * ROW + FOOT + PAD
    columns = min(columns, len(shown))
    canvas = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for number, (title, panel) in enumerate(shown.items()):
        x, y = number % columns * width, number // columns * height
        _panel(draw, font, (x + PAD, y + PAD // 2, x + width - PAD, y + height), title, panel)
    return canvas


def _panel(
    draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, box: Box, title: str, panel: Mapping
) -> None:
    left, top, right, _ = box
    scale = scale_of([i for i in panel.values() if i is not None], left + LEFT, right, zero=True)
    bottom = top + HEAD + len(panel) * ROW
    draw.text((left + LEFT, top), one_line(title), fill="black", font=font)
    for tick in scale.ticks:
        draw.line((scale(tick), top + HEAD, scale(tick), bottom), fill="#dddddd")
        draw.text((scale(tick), bottom + 3), f"{tick:g}", fill="black", font=font, anchor="ma")
    for number, (name, value) in enumerate(panel.items()):
        middle = top + HEAD + number * ROW + ROW // 2
        draw.text((left + LEFT - 6, middle), one_line(name)[:38], fill="black", font=font, anchor="rm")
        if value is None:
            draw.text((left + LEFT + 4, middle), "undefined", fill="#888888", font=font, anchor="lm")
            continue
        begin, end = sorted((scale(max(0.0, scale.low)), scale(value.value)))
        draw.rectangle((begin, middle - 5, end, middle + 5), fill=COLORS[number % len(COLORS)])
        _whisker(draw, (scale(value.low), middle), (scale(value.high), middle))
    draw.line((scale(max(0.0, scale.low)), top + HEAD, scale(max(0.0, scale.low)), bottom), fill="black")


def curves(
    series: Mapping[str, Mapping[float, Interval]],
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    size: tuple[int, int] = (560, 320),
    logarithmic: bool = True,
) -> Image.Image:
    """One curve with intervals per name over x, on a ``logarithmic`` axis or a plain one; ``levels``: named horizontal
    lines.

    ValueError where there is no point, or an x that is not positive on a logarithmic axis.
    """
    points = [i for curve in series.values() for i in curve.values()]
    xs = sorted({x for curve in series.values() for x in curve})
    if not points or (logarithmic and xs[0] <= 0):
        raise ValueError("Curves need at least one point, and x above 0 for their logarithmic axis.")
    place = math.log10 if logarithmic else float
    air = 0.3 if logarithmic else 0.05 * (xs[-1] - xs[0]) or 1.0
    levels = levels or {}
    canvas = Image.new("RGB", (size[0] + 200, size[1]), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    flat = [Interval(y, y, y, 1) for y in levels.values()]
    across = Scale(place(xs[0]) - air, place(xs[-1]) + air, 60, size[0])
    up = scale_of([*points, *flat], size[1] - 40, 24, zero=False)
    draw.rectangle((60, 24, size[0], size[1] - 40), outline="black")
    draw.text((60, 6), y_label, fill="black", font=font)
    draw.text((size[0], size[1] - 8), x_label, fill="black", font=font, anchor="rs")
    for tick in up.ticks:
        draw.line((56, up(tick), 60, up(tick)), fill="black")
        draw.text((52, up(tick)), f"{tick:g}", fill="black", font=font, anchor="rm")
    for x in xs:
        draw.text((across(place(x)), size[1] - 36), f"{x:g}", fill="black", font=font, anchor="ma")
    labels = []
    for name, y in levels.items():
        draw.line((60, up(y), size[0], up(y)), fill="#999999")
        labels.append((up(y), name, "#666666"))
    for number, (name, curve) in enumerate(series.items()):
        color, shift = COLORS[number % len(COLORS)], 3 * number - 3 * (len(series) // 2)  # or whiskers would coincide
        dots = [(across(place(x)) + shift, up(curve[x].value)) for x in sorted(curve)]
        draw.line(dots, fill=color, width=2)
        for (px, py), x in zip(dots, sorted(curve), strict=True):
            _whisker(draw, (px, up(curve[x].low)), (px, up(curve[x].high)), color)
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=color)
        labels.append((dots[-1][1], name, color))
    at = 0
    for y, name, color in sorted(labels):  # beside the end of each, moved apart where they would overlap
        at = max(at + 13, y)
        draw.text((size[0] + 8, at), one_line(name), fill=color, font=font, anchor="lm")
    return canvas


def _whisker(draw: ImageDraw.ImageDraw, begin: tuple[int, int], end: tuple[int, int], color: str = "black") -> None:
    draw.line((*begin, *end), fill=color)
    dx, dy = (0, 3) if begin[1] == end[1] and begin[0] != end[0] else (3, 0)
    for x, y in (begin, end):
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=color)
