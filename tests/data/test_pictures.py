"""Pictures that anybody may have made."""

import io
import struct
import zlib

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from hf_aegis.data import load_vqa
from hf_aegis.data.dataset_pictures import DatasetPictures
from hf_aegis.data.pictures import MAX_PIXELS, PictureError, TooManyPixelsError, read_picture


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
    [png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), bmp(60_000, 60_000), gif(65_535, 65_535), png(8001, 8000)],
    ids=["png", "largest png", "bmp", "gif", "just too large"],
)
def test_a_small_file_that_would_become_a_huge_picture_is_refused_undecoded(data, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
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


def test_pictures_of_a_folder_are_bounded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "test.jsonl").write_text('{"image": "bomb.png", "question": "is it?", "answer": "yes"}\n')
    samples = load_vqa(str(tmp_path))
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: the image cannot be read: the picture has"):
        samples[0]


def test_rows_of_a_data_set_name_no_files_elsewhere(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    source, secret = tmp_path / "set", tmp_path / "secret.png"
    for path in (source / "own.png", secret):
        path.parent.mkdir(exist_ok=True)
        SMALL.save(path)
    paths = [
        str(source / "own.png"),
        str(secret),
        f"{source}/../secret.png",
        "/etc/passwd",
        "http://127.0.0.1:1/a.png",
    ]
    paths += ["hf://datasets/somebody/else@main/a.png", "zip://a.png::hf://datasets/somebody/else@main/a.zip"]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = [{"image": {"path": path, "bytes": None}, "question": "what?", "answer": "a"} for path in paths]
    rows += [{"image": None, "question": "what?", "answer": "a"}]
    rows += [{"image": {"path": None, "bytes": png(60_000, 60_000)}, "question": "what?", "answer": "a"}]
    # Written by datasets itself, the files would be put in.
    pyarrow.parquet.write_table(
        datasets.Dataset.from_list(rows, features=features).data.table, source / "train.parquet"
    )
    whole = load_vqa(str(source))
    streamed = load_vqa(str(source), streaming=True, max_samples=len(rows))
    for samples in (whole, streamed):
        assert samples[0].image.size == (7, 5)
        for index in range(1, len(paths)):
            with pytest.raises(ValueError, match=rf"/train/{index}.* which is outside of the data set"):
                samples[index]
        with pytest.raises(ValueError, match="the row holds no image"):
            samples[len(paths)]
        with pytest.raises(ValueError, match=r"the picture has .* expected at most 64 million"):
            samples[len(paths) + 1]


def test_addresses_of_a_stream_lead_into_its_own_repository(monkeypatch):
    fetched = []

    def xopen(address, mode):
        fetched.append(address)
        return io.BytesIO(encoded(SMALL, "PNG"))

    monkeypatch.setattr("datasets.utils.file_utils.xopen", xopen)
    pictures = DatasetPictures("org/name")
    own = ["hf://datasets/org/name@0123/a.png", "zip://a.png::hf://datasets/org/name@0123/a.zip"]
    for address in own:
        assert pictures.open({"path": address, "bytes": None}).size == (7, 5)
    for address in ("hf://datasets/org/name2@0123/a.png", "hf://datasets/org/name@1/a.png::https://example.com/a.zip"):
        with pytest.raises(ValueError, match="outside of the data set"):
            pictures.open({"path": address, "bytes": None})
    assert fetched == own


def test_the_most_pixels_are_more_than_a_camera_s():
    assert MAX_PIXELS > 9000 * 6000
