"""Line charts as SVG: sharp at any width, readable in light and dark, described in words for screen readers."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """A line of a chart; `key` is the CSS class of its colour and dashes."""

    key: str
    label: str
    x: Sequence[float]
    y: Sequence[float]


_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40


def chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    description: str,
    limits: tuple[float, float] | None = None,
    size: tuple[int, int] = (420, 250),
    markers: bool = True,
) -> str:
    """
    A chart of lines over shared axes.

    Args:
        lines (`Sequence[Line]`): What to draw, at least one with two points.
        title (`str`), x_label (`str`): Above the chart, and below its axis.
        description (`str`): What a screen reader says of it.
        limits (`tuple[float, float]`, *optional*): Of the vertical axis; those of the lines by default.
        size (`tuple[int, int]`, *optional*): Width and height in the chart's own units.
        markers (`bool`, *optional*, defaults to `True`): Whether the points of lines are dotted.
    """
    width, height = size
    heights = np.concatenate([np.asarray(line.y, dtype=float) for line in lines])
    low, high = limits or (float(heights.min()), float(heights.max()))
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first = min(min(line.x) for line in lines)
    last = max(max(line.x) for line in lines)

    def across(value: float) -> float:
        return _LEFT + (value - first) / ((last - first) or 1) * (width - _LEFT - _RIGHT)

    def down(value: float) -> float:
        return height - _BOTTOM - (value - low) / ((high - low) or 1) * (height - _TOP - _BOTTOM)

    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    )
    grid += "".join(
        f'<text class="tick" x="{across(tick):.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in nice_ticks(first, last)
        if first <= tick <= last
    )
    drawn = ""
    for line in lines:
        points = [(across(x), down(y)) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points) if markers else ""
        drawn += f'<g class="line {line.key}"><polyline points="{path}"/>{dots}</g>'
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">{grid}{drawn}'
        f'<text class="tick" x="{(width + _LEFT) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}'
        "</text></svg></figure>"
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Keys and labels of lines, beside a piece of each line."""
    items = "".join(
        f'<li><svg viewBox="0 0 34 10" width="34" height="10" aria-hidden="true"><g class="line {key}">'
        f'<polyline points="1,5 33,5"/></g></svg>{escape(label)}</li>'
        for key, label in entries
    )
    return f'<ul class="legend">{items}</ul>'


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, about as many as asked for, of which the first and the last enclose `low` and `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** np.floor(np.log10(span / about))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(span / (power * factor) - about))
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [float(round(tick * step, 10)) for tick in np.arange(first, last + 1)]
