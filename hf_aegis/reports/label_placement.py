"""Labels beside the points of a scatter plot that overlap neither each other nor what is drawn."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Box(NamedTuple):
    """A rectangle in display coordinates."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def inside(self, frame: "Box") -> bool:
        """Whether no part of this box is outside `frame`."""
        return (
            self.left >= frame.left
            and self.bottom >= frame.bottom
            and self.right <= frame.right
            and self.top <= frame.top
        )


# Distances of a label from its point, in pixels, and directions, to the right first.
_DISTANCES = (10, 16, 24, 34, 46, 60, 76, 94, 116, 140)
_DIRECTIONS = tuple(math.radians(angle) for angle in (0, 180, 90, 270, *range(15, 360, 15)))
# From this distance on a line leads to the point.
_LEADER = 20
_MARKER = 8
# What a pixel of distance weighs against a covered pixel of other labels, of markers, and of bars and lines.
_ON_LABEL, _ON_MARKER, _ON_DRAWING, _DISTANCE = 50.0, 10.0, 1.0, 6.0


def place_labels(
    points: Mapping[str, tuple[float, float]],
    sizes: Mapping[str, tuple[float, float]],
    drawn: Sequence[Box],
    frame: Box,
) -> dict[str, tuple[Box, bool]]:
    """
    A place for each label: near to its point, inside the frame, off other labels, their leading lines, and markers,
    and, as far as that does not send it away, off what else is drawn. Points in crowds choose first.

    Args:
        points (`Mapping[str, tuple]`): Where each label's point is, in pixels.
        sizes (`Mapping[str, tuple]`): Width and height of each label.
        drawn (`Sequence[Box]`): What should stay visible besides the points, such as error bars.
        frame (`Box`): Where labels may be.

    Returns:
        `dict[str, tuple]`: each label's box, and whether it is so far away that a line has to lead to its point.
    """

    def crowding(name: str) -> float:
        return sum(1 / (1 + math.dist(points[name], other) ** 2 / 900) for other in points.values())

    markers = {name: Box(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for name, (x, y) in points.items()}
    placed: dict[str, tuple[Box, bool]] = {}
    leaders: list[Box] = []

    def cost(name: str, box: Box, distance: float) -> float:
        found = _DISTANCE * distance
        found += _ON_LABEL * sum(box.overlap(other) for other, _ in placed.values())
        found += _ON_LABEL * sum(box.overlap(piece) for piece in leaders)
        found += _ON_MARKER * sum(box.overlap(marker) for marker in markers.values())
        found += _ON_DRAWING * sum(box.overlap(piece) for piece in drawn)
        if distance >= _LEADER:
            others = [*(other for other, _ in placed.values()), *(m for key, m in markers.items() if key != name)]
            found += _ON_LABEL * sum(piece.overlap(other) for piece in _line(points[name], box) for other in others)
        return found

    for name in sorted(points, key=crowding, reverse=True):
        candidates = [
            (_beside(points[name], sizes[name], distance, direction), distance)
            for distance in _DISTANCES
            for direction in _DIRECTIONS
        ]
        candidates = [candidate for candidate in candidates if candidate[0].inside(frame)] or candidates
        box, distance = min(candidates, key=lambda candidate: cost(name, *candidate))
        placed[name] = (box, distance >= _LEADER)
        if distance >= _LEADER:
            leaders += _line(points[name], box)
    return placed


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
    corners = [(*transform(box[:2]), *transform(box[2:])) for box in drawn]
    boxes = [Box(left - 2, bottom - 2, right + 2, top + 2) for left, bottom, right, top in corners]
    frame = axis.get_window_extent()
    placed = place_labels(points, sizes, boxes, Box(frame.x0, frame.y0, frame.x1, frame.y1))
    for name, (box, leads) in placed.items():
        line = {"arrowstyle": "-", "color": "0.45", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axis.annotate(
            labels[name],
            xy=positions[name],
            xytext=[
                ((low + high) / 2 - at) * 72 / figure.dpi
                for low, high, at in zip(box[:2], box[2:], points[name], strict=True)
            ],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=10,
            arrowprops=line if leads else None,
            zorder=6,
        ).set_in_layout(False)


def _beside(point: tuple[float, float], size: tuple[float, float], distance: float, direction: float) -> Box:
    """The box of that size in that direction whose nearest point is `distance` away."""
    horizontal, vertical = math.cos(direction), math.sin(direction)
    width, height = size
    # Straight above or below a label is centred, straight beside it too; between, its corner is next to the point.
    x = point[0] + distance * horizontal + width / 2 * max(-1.0, min(1.0, 2 * horizontal))
    y = point[1] + distance * vertical + height / 2 * max(-1.0, min(1.0, 2 * vertical))
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _line(point: tuple[float, float], box: Box) -> list[Box]:
    """Small boxes along the straight line from a point to the edge of its label."""

    def pieces() -> Iterator[Box]:
        end = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
        count = max(2, int(math.dist(point, end) / 4))
        for index in range(count):
            x, y = (at + (to - at) * index / count for at, to in zip(point, end, strict=True))
            yield Box(x - 2, y - 2, x + 2, y + 2)

    return list(pieces())
