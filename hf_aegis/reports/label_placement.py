"""Labels beside the points of a scatter plot that overlap neither each other nor what is drawn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


# Boxes are left, bottom, right and top, `(4,)` or `(N, 4)`, in pixels.
# Distances of a label from its point, nearest first, and directions, to the right first.
_DISTANCES = (10, 16, 24, 34, 46, 60, 76, 94, 116, 140)
_DIRECTIONS = tuple(math.radians(angle) for angle in (0, 180, 90, 270, *range(15, 360, 15)))
_ROUNDS = 3
# From this distance on a line leads to the point.
_LEADER = 20
_PIECES = 12
_MARKER = 8
# What a covered pixel of other labels, of markers, and of bars and lines weighs, and a pixel of distance.
_ON_LABEL, _ON_MARKER, _ON_DRAWING, _DISTANCE = 50.0, 10.0, 1.0, 6.0


class Place(NamedTuple):
    """Where a label goes: its box, and whether it is so far away that a line has to lead to its point."""

    box: np.ndarray
    leads: bool


class _Choices(NamedTuple):
    """Places for a label: boxes `(C, 4)`, their distances `(C,)`, and pieces of the lines to the point `(C, P, 4)`."""

    boxes: np.ndarray
    distances: np.ndarray
    lines: np.ndarray


def overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that each of `boxes` `(N, 4)` shares with each of `others` `(M, 4)`: `(N, M)`."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=-1)


def place_labels(
    points: Mapping[str, tuple[float, float]],
    sizes: Mapping[str, tuple[float, float]],
    drawn: Sequence[Sequence[float]],
    frame: Sequence[float],
) -> dict[str, Place]:
    """
    A place for each label: near to its point, inside the frame, off other labels, the lines that lead to them, and
    markers, and, as far as that does not send it away, off what else is drawn. Points in crowds choose first.

    Args:
        points (`Mapping[str, tuple]`): Where each label's point is, in pixels.
        sizes (`Mapping[str, tuple]`): Width and height of each label.
        drawn (`Sequence`): Boxes of what should stay visible besides the points, such as error bars.
        frame (`Sequence[float]`): The box in which labels may be.
    """
    obstacles = np.asarray(drawn, dtype=float).reshape(-1, 4)
    markers = {
        name: np.asarray([x, y, x, y]) + _MARKER * np.asarray([-1, -1, 1, 1]) for name, (x, y) in points.items()
    }
    choices = {name: _choices(points[name], sizes[name], np.asarray(frame, dtype=float)) for name in points}
    chosen: dict[str, int] = {}

    def costs(name: str) -> np.ndarray:
        own = choices[name]
        others = {key: choices[key] for key in chosen if key != name}
        labels = np.asarray([c.boxes[chosen[key]] for key, c in others.items()]).reshape(-1, 4)
        lines = np.asarray([c.lines[chosen[key]] for key, c in others.items()]).reshape(-1, 4)
        crossed = np.asarray([*labels, *(marker for key, marker in markers.items() if key != name)]).reshape(-1, 4)
        pieces = overlap(own.lines.reshape(-1, 4), crossed).sum(axis=1).reshape(own.lines.shape[:2])
        return (
            _DISTANCE * own.distances
            + _ON_LABEL * overlap(own.boxes, np.concatenate([labels, lines])).sum(axis=1)
            + _ON_LABEL * pieces.sum(axis=1)
            + _ON_MARKER * overlap(own.boxes, np.stack(list(markers.values()))).sum(axis=1)
            + _ON_DRAWING * overlap(own.boxes, obstacles).sum(axis=1)
        )

    def crowding(name: str) -> float:
        return sum(1 / (1 + math.dist(points[name], other) ** 2 / 900) for other in points.values())

    # After the first round each label looks again, now that it knows where all the others are.
    for _ in range(_ROUNDS):
        for name in sorted(points, key=crowding, reverse=True):
            chosen[name] = int(costs(name).argmin())
    return {
        name: Place(choices[name].boxes[index], bool(choices[name].distances[index] >= _LEADER))
        for name, index in chosen.items()
    }


def annotate(
    axis: Any,
    positions: Mapping[str, tuple[float, float]],
    labels: Mapping[str, str],
    drawn: Sequence[tuple[float, float, float, float]],
) -> None:
    """
    Writes `labels` beside `positions` (in data coordinates) of a finished plot.

    Args:
        axis (`matplotlib.axes.Axes`): Its limits are final.
        positions (`Mapping[str, tuple]`): Points by name.
        labels (`Mapping[str, str]`): Text by name.
        drawn (`Sequence[tuple]`): Left, bottom, right and top of bars and lines, in data coordinates.
    """
    from matplotlib.patheffects import withStroke

    figure = axis.figure
    # The layout is settled when it is drawn.
    figure.canvas.draw()
    transform = axis.transData.transform
    points = {name: tuple(transform(position)) for name, position in positions.items()}
    sizes = {}
    for name in points:
        text = axis.text(0, 0, labels[name], fontsize=10)
        extent = text.get_window_extent()
        sizes[name] = (extent.width + 2, extent.height + 2)
        text.remove()
    boxes = [(*(transform(box[:2]) - 2), *(transform(box[2:]) + 2)) for box in drawn]
    for name, (box, leads) in place_labels(points, sizes, boxes, axis.get_window_extent().extents).items():
        point = np.asarray(points[name])
        side = (np.clip(point, box[:2], box[2:]) - box[:2]) / (box[2:] - box[:2])
        line = {"arrowstyle": "-", "color": "0.45", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4, "relpos": side}
        axis.annotate(
            labels[name],
            xy=positions[name],
            xytext=((box[:2] + box[2:]) / 2 - point) * 72 / figure.dpi,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=10,
            arrowprops=line if leads else None,
            # Of bars that pass below a label in a crowd, it stays legible.
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=6,
        ).set_in_layout(False)


def _choices(point: tuple[float, float], size: tuple[float, float], frame: np.ndarray) -> _Choices:
    """Boxes of that size all around the point; inside the frame, where any of them is."""
    distances = np.repeat(np.asarray(_DISTANCES, dtype=float), len(_DIRECTIONS))
    angles = np.tile(_DIRECTIONS, len(_DISTANCES))
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    half = np.asarray(size) / 2
    # Straight above or below a label is centred, straight beside it too; between, its corner is next to the point.
    centres = np.asarray(point) + distances[:, None] * unit + half * np.clip(2 * unit, -1, 1)
    boxes = np.concatenate([centres - half, centres + half], axis=1)
    inside = (boxes[:, :2] >= frame[:2]).all(axis=1) & (boxes[:, 2:] <= frame[2:]).all(axis=1)
    kept = inside if inside.any() else np.ones_like(inside)
    boxes, distances = boxes[kept], distances[kept]
    ends = np.clip(np.asarray(point), boxes[:, :2], boxes[:, 2:])
    along = (np.arange(_PIECES) / _PIECES)[:, None]
    spots = np.asarray(point) + along * (ends - np.asarray(point))[:, None, :]
    # A label right beside its point needs no line: its pieces have no area.
    thickness = np.where(distances >= _LEADER, 2.0, 0.0)[:, None, None]
    return _Choices(boxes, distances, np.concatenate([spots - thickness, spots + thickness], axis=2))
