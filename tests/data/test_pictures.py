"""Pictures that anybody may have made."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hf_aegis.data import load_vqa
from hf_aegis.data.pictures import MAX_BYTES, MAX_PIXELS, PictureError, TooManyPixelsError, read_picture


def encoded(image, name, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return buffer.getvalue()


def png(width, height, pixels=b""):
    """A PNG that says of itself how large it is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 58, 0, 0, 54, 40, width, height, 1, 24, 0, 4, 0, 0, 0, 0) + bytes(4)


def gif(width, height):
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame + b"\x3b"


def webp(kind, data):
    chunk = kind + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def sides(width, height):
    """As WebP has them: less one, in three bytes each."""
    return struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]


SMALL = Image.fromarray(np.arange(7 * 5 * 3, dtype=np.uint8).reshape(5, 7, 3))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_sound_pictures_are_read(name):
    found = read_picture(io.BytesIO(encoded(SMALL, name)))
    assert (found.mode, found.size) == ("RGB", (7, 5))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_pictures_of_every_mode_become_rgb(mode):
    data = encoded(Image.new(mode, (7, 5)), "JPEG" if mode == "CMYK" else "PNG")
    assert read_picture(io.BytesIO(data)).mode == "RGB"


def test_of_a_picture_that_moves_the_first_frame_is_taken():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    for name in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:], duration=40)
        red, green, _ = read_picture(io.BytesIO(data)).getpixel((2, 2))
        assert red > 200 > 50 > green


def test_a_picture_that_lies_on_its_side_is_put_upright():
    exif = Image.Exif()
    exif[274] = 6
    assert read_picture(io.BytesIO(encoded(SMALL, "JPEG", exif=exif))).size == (5, 7)


@pytest.mark.parametrize("exif", [b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"])
def test_damaged_exif_does_not_matter(exif):
    assert read_picture(io.BytesIO(encoded(SMALL, "JPEG", exif=b"Exif\0\0" + exif))).mode == "RGB"


@pytest.mark.parametrize(
    "data",
    [
        png(60_000, 60_000),
        png(2**31 - 1, 2**31 - 1),
        bmp(60_000, 60_000),
        gif(65_535, 65_535),
        webp(b"VP8X", b"\x12\0\0\0" + sides(65_536, 65_535)),
        webp(b"VP8L", b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14)),
        webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383)),
        png(8001, 8000),
    ],
    ids=["png", "largest png", "bmp", "gif", "webp", "lossless webp", "lossy webp", "just too large"],
)
def test_a_small_file_that_would_become_a_huge_picture_is_refused_undecoded(data, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    # It takes memory for the whole picture when it is set up.
    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", lambda *_: pytest.fail("a decoder was set up"))
    assert len(data) < 100
    with pytest.raises(TooManyPixelsError, match=r"the picture has .* pixels, expected at most 64 million"):
        read_picture(io.BytesIO(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        # What Pillow has Ghostscript run.
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n",
        encoded(SMALL, "TIFF"),
        b"\0\0\0\x1cftypavif" + bytes(16),
        encoded(SMALL, "PNG")[:-30],
        encoded(SMALL, "JPEG")[:200],
        encoded(SMALL, "WEBP")[:-9],
        encoded(SMALL, "GIF")[:30],
        png(7, 5, b"\0" * 9),
        png(0, 5),
        bmp(0, 5),
        gif(0, 0),
    ],
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(PictureError, match=r"no picture of the formats PNG, .* that can be decoded|is empty"):
        read_picture(io.BytesIO(data))


def test_a_compressed_comment_that_grows_is_refused():
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(8_000_000), 1)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    whole = png(7, 5, (b"\0" + bytes(21)) * 5)
    with pytest.raises(PictureError, match="Decompressed data too large"):
        read_picture(io.BytesIO(whole[:33] + chunk + whole[33:]))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_may_have_as_many_pixels_as_are_allowed_and_no_more(name):
    for options in [{}, {"lossless": True}, {"exif": b"Exif\0\0"}] if name == "WEBP" else [{}]:
        data = encoded(SMALL, name, **options)
        assert read_picture(io.BytesIO(data), max_pixels=35).size == (7, 5)
        with pytest.raises(TooManyPixelsError, match="has 7 x 5 pixels"):
            read_picture(io.BytesIO(data), max_pixels=34)


def test_a_file_without_end_is_refused_unread(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.write(png(7, 5))
        file.truncate(MAX_BYTES + 1)
        with pytest.raises(PictureError, match=rf"file has {MAX_BYTES + 1} bytes, expected at most {MAX_BYTES}"):
            read_picture(tmp_path / "large.png")


def test_pictures_of_a_folder_are_bounded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "test.jsonl").write_text('{"image": "bomb.png", "question": "is it?", "answer": "yes"}\n')
    samples = load_vqa(str(tmp_path))
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: the image cannot be read: the picture has"):
        samples[0]


def test_the_most_pixels_are_more_than_a_camera_s():
    assert MAX_PIXELS > 9000 * 6000
