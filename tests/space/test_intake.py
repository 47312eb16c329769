import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from settings import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_TEXT_LENGTH


def png(width, height):
    """A PNG of which only the header is true."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_pictures_of_any_kind_become_rgb(intake, tmp_path, mode):
    file = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new(mode, (7, 5)).save(file)
    picture = intake.read_picture(file)
    assert (picture.mode, picture.size) == ("RGB", (7, 5))


def test_a_telephone_s_picture_is_put_upright(intake, tmp_path):
    image = Image.fromarray(np.zeros((5, 7, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "picture.jpg", exif=exif)
    assert intake.read_picture(tmp_path / "picture.jpg").size == (5, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as an image"),
        (b"not an image at all", "cannot be read as an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as an image"),
        (png(64, 64), "cannot be read as an image"),
        (png(MAX_IMAGE_PIXELS // 1000 + 1, 1000), "more than 16 million pixels"),
        (png(60_000, 60_000), "more than 16 million pixels"),
        (bytes(MAX_IMAGE_BYTES + 1), "MB are the most"),
    ],
    ids=["empty", "text", "svg", "cut off", "too many pixels", "a bomb", "too many bytes"],
)
def test_what_is_refused_is_explained(intake, tmp_path, content, message):
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(intake.gr.Error) as caught:
        intake.read_picture(tmp_path / "picture.png")
    assert message in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_no_picture_is_asked_for(intake):
    with pytest.raises(intake.gr.Error, match="choose an image"):
        intake.read_picture(None)


def test_a_text_becomes_one_line(intake):
    assert intake.read_text("  what\n color \t is it? ", "a question") == "what color is it?"
    assert intake.read_text("what\u202e is\0 \ufeffit\u200b?\ud800", "a question") == "what is it?"
    assert intake.read_text("नमस्\u200dते 👩\u200d🔬?", "a question") == "नमस्\u200dते 👩\u200d🔬?"
    assert len(intake.read_text("x" * MAX_TEXT_LENGTH, "a question")) == MAX_TEXT_LENGTH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "write a question"),
        (" \n", "write a question"),
        ("x" * (MAX_TEXT_LENGTH + 1), f"{MAX_TEXT_LENGTH} are the most"),
        ("\0\x1b\u200b\u202e\ufeff", "write a question"),
        ("\ud800", "write a question"),
        ("\u200d", "write a question"),
        ("a <image> b", "“<image>” is a word of the model’s own"),
        ("a<eos>b", "“<eos>” is a word"),
        ("a <loc0001>", "“<loc0001>” is a word"),
        ("<seg0\u200b12>", "“<seg012>” is a word"),
    ],
)
def test_texts_that_cannot_be_asked_are_explained(intake, text, message):
    with pytest.raises(intake.gr.Error) as caught:
        intake.read_text(text, "a question")
    assert message in caught.value.message
