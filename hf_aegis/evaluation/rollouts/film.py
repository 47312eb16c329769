"""Films of episodes: what a camera saw, with the instruction and the outcome written below."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_aegis.atomic_files import replacing
from hf_aegis.data.pictures import MAX_PIXELS, opened_picture


FILM_FORMATS = ("webp", "gif")
CAMERA = "agentview"
SIZE = 256
"""Side of the pictures, in pixels."""
STEPS_PER_FRAME = 4
STEPS_PER_SECOND = 20

MAX_FILM_PIXELS = 100_000_000
"""Of all pictures of a film that is read: four minutes of one that is written here."""

_LINE_HEIGHT = 15
OUTCOME_COLOURS = {"success": (0, 114, 78), "failure": (176, 42, 48)}


class Film:
    """
    The pictures of an episode, in real time.

    Args:
        instruction (`str`): What the policy was told.
    """

    def __init__(self, instruction: str):
        self.instruction = instruction
        self.frames: list[tuple[int, np.ndarray]] = []

    def due(self, steps: int) -> bool:
        """Whether it is time for a picture after so many actions."""
        return steps % STEPS_PER_FRAME == 0

    def add(self, environment: Any, steps: int) -> None:
        """Takes a picture of the simulation as it is after so many actions."""
        self.frames.append((steps, environment.render(CAMERA, size=SIZE)))

    def save(self, path: Path, outcome: str) -> None:
        """
        Writes the film, in the format that the name's suffix says; an animated WebP is several times smaller than a
        GIF. The folder is created.

        Raises:
            ValueError: If the suffix is of another format, or there is no picture.
        """
        if path.suffix.removeprefix(".") not in FILM_FORMATS:
            raise ValueError(f"a film is a file of one of the formats {list(FILM_FORMATS)}, found {path.name}")
        if not self.frames:
            raise ValueError("a film has at least one picture, found none")
        pictures = [
            captioned(frame, self.instruction, f"step {step} of {self.frames[-1][0]}", outcome)
            for step, frame in self.frames
        ]
        duration = 1000 * STEPS_PER_FRAME // STEPS_PER_SECOND
        durations = [*[duration] * (len(pictures) - 1), 2000]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as staged:
            pictures[0].save(
                staged,
                format=path.suffix.removeprefix(".").upper(),
                save_all=True,
                append_images=pictures[1:],
                duration=durations,
                loop=0,
            )


def captioned(frame: np.ndarray, instruction: str, moment: str, outcome: str) -> Image.Image:
    """A picture `(h, w, 3)` with the instruction, the moment and, in its colour, the outcome below."""
    height, width = frame.shape[:2]
    lines = textwrap.wrap(instruction, max(16, width // 7)) or [""]
    picture = Image.new("RGB", (width, height + _LINE_HEIGHT * (len(lines) + 1) + 6), "white")
    picture.paste(Image.fromarray(frame), (0, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for row, line in enumerate(lines):
        draw.text((4, height + 2 + row * _LINE_HEIGHT), line, fill=(20, 20, 20), font=font)
    below = height + 2 + len(lines) * _LINE_HEIGHT
    draw.text((4, below), f"{outcome}, {moment}", fill=OUTCOME_COLOURS[outcome], font=font)
    return picture


def read_film(path: Path) -> list[Image.Image]:
    """
    The pictures of a film, captions included.

    Raises:
        FileNotFoundError: If there is no such film.
        ValueError: If the file is no film that can be read, or all its pictures together have too many pixels.
    """
    try:
        with opened_picture(path, [name.upper() for name in FILM_FORMATS], MAX_PIXELS) as film:
            count = getattr(film, "n_frames", 1)
            if film.width * film.height * count > MAX_FILM_PIXELS:
                raise ValueError(
                    f"{count} pictures of {film.width} x {film.height}, expected at most {MAX_FILM_PIXELS / 1e6:g} "
                    "million pixels"
                )
            pictures = []
            for index in range(count):
                film.seek(index)
                pictures.append(film.convert("RGB"))
            return pictures
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a film: {error}") from error


def evenly_spaced(pictures: Sequence[Image.Image], count: int) -> list[Image.Image]:
    """So many of the pictures, the first and the last among them; fewer where there are fewer."""
    indices = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    return [pictures[index] for index in indices]
