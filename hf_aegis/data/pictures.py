"""Pictures from files that anybody may have made, decoded only after their size was found small enough."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded. Pillow knows many more, one of which has another program run what is in the file."""
MAX_PIXELS = 64_000_000
"""Decoded, a picture of so many takes 192 MB. Cameras make such ones, sets of questions do not hold them."""
MAX_BYTES = 4 * MAX_PIXELS + 1024 * 1024
"""Of a file: what so many pixels take unpacked, with transparency and 8 bits a channel, and room for EXIF."""

# What Pillow raises of files that are no pictures, or damaged ones.
_FAILURES = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error)


class PictureError(ValueError):
    """A file is no picture that can be shown; the text says why, and does not name the file."""


class TooManyPixelsError(PictureError):
    """A picture is larger than it may be."""


def read_picture(file: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    A picture in RGB, put upright; of one that moves the first frame.

    Args:
        file (`str`, `os.PathLike` or binary file): One of [`FORMATS`].
        max_pixels (`int`, *optional*, defaults to `64_000_000`): Width times height.

    Raises:
        TooManyPixelsError: If it is larger.
        PictureError: If it is of another format, damaged, cut off or empty, or its file larger than [`MAX_BYTES`].
        FileNotFoundError: If there is no such file.
    """
    with opened_picture(file, FORMATS, max_pixels) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def opened_picture(
    file: str | os.PathLike[str] | BinaryIO, formats: Sequence[str], max_pixels: int
) -> Iterator[Image.Image]:
    """
    A picture that is yet to be decoded. Its width and height stand in the file's header: a small file that would
    become a large picture is refused before it does. What Pillow raises within the block, becomes an error of ours.

    Args:
        file (`str`, `os.PathLike` or binary file): A picture.
        formats (`Sequence[str]`): What it may be.
        max_pixels (`int`): Width times height.

    Raises:
        TooManyPixelsError, PictureError: As of [`read_picture`].
        FileNotFoundError: If there is no such file.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that are refused here, and of damage that it can do without.
            warnings.simplefilter("ignore")
            with _bounded(file, max_pixels) as bounded, Image.open(bounded, formats=list(formats)) as image:
                _check_pixels(image.width, image.height, max_pixels)
                if 0 in image.size:
                    raise PictureError(f"the picture is empty: {image.width} x {image.height} pixels")
                yield image
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(_too_many("far more", max_pixels)) from error
    except (PictureError, FileNotFoundError):
        raise
    except _FAILURES as error:
        text = " ".join(str(error).split())
        raise PictureError(f"no picture of the formats {', '.join(formats)} that can be decoded: {text}") from error


@contextmanager
def _bounded(file: str | os.PathLike[str] | BinaryIO, max_pixels: int) -> Iterator[BinaryIO]:
    with Path(file).open("rb") if isinstance(file, str | os.PathLike) else nullcontext(file) as opened:
        if (size := opened.seek(0, os.SEEK_END)) > MAX_BYTES:
            raise PictureError(f"the picture's file has {size} bytes, expected at most {MAX_BYTES}")
        opened.seek(0)
        # Whose decoder asks for the memory of two whole pictures before it tells how large they are.
        if webp := _webp_size(opened.read(30)):
            _check_pixels(*webp, max_pixels)
        opened.seek(0)
        yield opened


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height in the first 30 bytes of a WebP file; nothing of another file."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if head[12:16] == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return None


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixelsError(_too_many(f"{width} x {height}", max_pixels))


def _too_many(found: str, most: int) -> str:
    return f"the picture has {found} pixels, expected at most {most / 1e6:.0f} million"
