"""What visitors send, checked before a model sees it. Refusals are texts for visitors."""

import os
import warnings
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps, UnidentifiedImageError
from settings import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_TEXT_LENGTH


# A picture's width and height stand in its header; its pixels are decoded only after they were found small enough.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def picture_input(**options: Any) -> gr.Image:
    """
    An image input that hands over the path of the uploaded file as it came. Gradio's own would decode it first, and
    meet a file that is no image with an error that tells visitors nothing; [`read_picture`] says what is wrong.

    Args:
        options: Of [`gradio.Image`].
    """
    image = gr.Image(type="filepath", **options)
    # Not a subclass: beside the module of one, gradio writes a file of its own.
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def refusal(text: str) -> gr.Error:
    """The error that shows visitors a message, and fills no log with what they did."""
    return gr.Error(text, print_exception=False)


def read_picture(file: str | os.PathLike[str] | None) -> Image.Image:
    """
    An uploaded picture, upright and RGB.

    Raises:
        gr.Error: it is missing, too large in bytes or pixels, or not a picture.
    """
    if file is None:
        raise refusal("Please choose an image first.")
    size = Path(file).stat().st_size
    if size > MAX_IMAGE_BYTES:
        raise refusal(f"The image is too large: {size / 2**20:.1f} MB; {MAX_IMAGE_BYTES / 2**20:.0f} MB are the most.")
    try:
        return _decode(file)
    except (_TooManyPixelsError, Image.DecompressionBombError) as error:
        raise refusal(
            f"The image has more than {MAX_IMAGE_PIXELS / 1e6:.0f} million pixels. Please scale it down.",
        ) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise refusal("The file cannot be read as an image. PNG, JPEG, WebP, GIF and BMP are understood.") from error


class _TooManyPixelsError(Exception):
    pass


def _decode(file: str | os.PathLike[str]) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of what is refused here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise _TooManyPixelsError
            return ImageOps.exif_transpose(image).convert("RGB")


def read_text(text: str | None, name: str) -> str:
    """
    A question or an instruction, in one line.

    Raises:
        gr.Error: it is empty, too long, or holds a token of the model's own.
    """
    line = " ".join((text or "").split())
    if not line:
        raise refusal(f"Please write {name} first.")
    if len(line) > MAX_TEXT_LENGTH:
        raise refusal(f"This is too long for {name}: it has {len(line)} characters; {MAX_TEXT_LENGTH} are the most.")
    if "<image>" in line:
        raise refusal("“<image>” stands for the picture and cannot be part of the text.")
    return line
