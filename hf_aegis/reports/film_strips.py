"""Strips of films: what the policies of several conditions did from the same start, row below row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from hf_aegis.evaluation.rollouts.film import OUTCOME_COLOURS, evenly_spaced, read_film
from hf_aegis.reports.run_logs import RunLogs


_MOMENTS = 8
_SIDE = 128
_HEADER = 20
_GAP = 2


@dataclass(frozen=True)
class FilmedEpisode:
    """
    An episode of a condition, and where its film is.

    Args:
        label (`str`): The condition's.
        episode (`Mapping`): Its line: `task`, `start`, `success`, `steps`.
        film (`Path`): The film.
    """

    label: str
    episode: Mapping[str, Any]
    film: Path

    @property
    def outcome(self) -> str:
        """`"success"` or `"failure"`; an episode that crashed leaves no film."""
        return "success" if self.episode["success"] else "failure"


def filmed_episodes(logs: Mapping[str, Sequence[RunLogs]], labels: Mapping[str, str]) -> list[FilmedEpisode]:
    """
    Of each condition one filmed episode, of one and the same task and start, with the first seed that has it: that
    which most conditions have on film, and among those the first.
    """
    found: dict[tuple[str, str, int], dict[str, FilmedEpisode]] = {}
    for name, runs in logs.items():
        for run in runs:
            for episode in run.rollouts() or ():
                key = (episode["suite"], episode["task"], episode["start"])
                if (film := run.film(*key)) is not None and episode["success"] is not None:
                    found.setdefault(key, {}).setdefault(name, FilmedEpisode(labels[name], episode, film))
    if not found:
        return []
    # `max` takes the first of equals, so the order has to be one that does not depend on which finished first.
    return list(max((found[key] for key in sorted(found)), key=len).values())


def plot_film_strips(episodes: Sequence[FilmedEpisode], path: Path) -> None:
    """
    Draws episodes as rows of pictures, evenly spaced over each one's own time, as a PNG.

    Args:
        episodes (`Sequence[FilmedEpisode]`): At least one.
        path (`Path`): Where to.
    """
    width = _MOMENTS * (_SIDE + _GAP) - _GAP
    sheet = Image.new("RGB", (width, len(episodes) * (_HEADER + _SIDE + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, filmed in enumerate(episodes):
        top = row * (_HEADER + _SIDE + _GAP)
        text = f"{filmed.label}: {filmed.outcome} after {filmed.episode['steps']} steps"
        draw.text((2, top + 2), text, fill=OUTCOME_COLOURS[filmed.outcome], font=font)
        for column, picture in enumerate(evenly_spaced(read_film(filmed.film), _MOMENTS)):
            # Captions, which are below the square picture, would be too small to read.
            scene = picture.crop((0, 0, picture.width, picture.width)).resize((_SIDE, _SIDE))
            sheet.paste(scene, (column * (_SIDE + _GAP), top + _HEADER))
    sheet.save(path, format="PNG")
