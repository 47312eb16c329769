"""What visitors send, checked before a model sees it. Refusals are texts for visitors."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from settings import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_TEXT_LENGTH

from hf_aegis.data import pictures
from hf_aegis.functional.prompt_text import find_control_token, prompt_fault


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
        return pictures.read_picture(file, MAX_IMAGE_PIXELS)
    except pictures.TooManyPixelsError as error:
        raise refusal(
            f"The image has more than {MAX_IMAGE_PIXELS / 1e6:.0f} million pixels. Please scale it down.",
        ) from error
    except pictures.PictureError as error:
        raise refusal("The file cannot be read as an image. PNG, JPEG, WebP, GIF and BMP are understood.") from error


# Beside letters they join, they are part of a script, or of an emoji.
_JOINERS = "\u200c\u200d"


def read_text(text: str | None, name: str) -> str:
    """
    A question or an instruction, in one line, without what nobody sees: control characters, and those that turn the
    direction of writing.

    Raises:
        gr.Error: it is empty, too long, no text, or holds a token of the model's own.
    """
    shown = "".join(each for each in text or "" if each.isspace() or each in _JOINERS or not _is_control(each))
    line = " ".join(shown.split())
    if len(line) > MAX_TEXT_LENGTH:
        raise refusal(f"This is too long for {name}: it has {len(line)} characters; {MAX_TEXT_LENGTH} are the most.")
    if prompt_fault(line) is not None:
        raise refusal(f"Please write {name} first.")
    if token := find_control_token(line):
        raise refusal(f"“{token}” is a word of the model’s own and cannot be part of the text.")
    return line


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")
