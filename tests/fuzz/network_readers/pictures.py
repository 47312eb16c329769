"""Pictures in the five formats that are read."""

import io
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
from fuzz_engine import mutate_bytes
from PIL import Image

from hf_aegis.data.pictures import PictureError, read_picture
from network_readers.case import Case


def pictures() -> Case:
    def read(data: bytes) -> None:
        image = read_picture(io.BytesIO(data))
        assert image.mode == "RGB" and 0 < image.width * image.height <= 64_000_000

    return Case(read, _sound_pictures(), (PictureError,), (_mutate_size, _mutate_png, _mutate_png))


def _sound_pictures() -> list[bytes]:
    image = Image.fromarray(np.arange(9 * 8 * 3, dtype=np.uint8).reshape(8, 9, 3))
    others = [image.rotate(90, expand=False), image.convert("L").convert("RGB")]
    exif = Image.Exif()
    exif[274], exif[271] = 6, "a camera"
    moving = {"save_all": True, "append_images": others, "duration": 50}
    variants: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("PNG", image, {}),
        ("PNG", image.convert("P"), {"transparency": 3}),
        ("PNG", image.convert("RGBA"), moving),
        ("JPEG", image, {"exif": exif}),
        ("JPEG", image.convert("CMYK"), {"progressive": True}),
        ("WEBP", image, {"exif": exif}),
        ("WEBP", image, moving),
        ("GIF", image, moving),
        ("BMP", image, {}),
    ]
    found = []
    for name, picture, options in variants:
        buffer = io.BytesIO()
        picture.save(buffer, format=name, **options)
        found.append(buffer.getvalue())
    return found


def _mutate_size(data: bytes, random: Random) -> bytes:
    """Another number where formats keep their numbers, in either byte order."""
    changed, place = bytearray(data), random.randrange(min(len(data), 64) + 1)
    number = random.choice((0, 1, 255, 4000, 20_000, 65_535, 2**31 - 1, 2**32 - 1))
    order = random.choice("<>")
    written = struct.pack(order + "I", number) if number > 65_535 else struct.pack(order + "H", number)
    changed[place : place + len(written)] = written
    return bytes(changed)


_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"PLTE", b"tRNS", b"fcTL", b"fdAT", b"acTL")


def _mutate_png(data: bytes, random: Random) -> bytes:
    """One chunk changed, doubled or left out, with the checksum that it should have."""
    if not data.startswith(b"\x89PNG"):
        return mutate_bytes(data, random)
    chunks, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += length + 12
    index = random.randrange(len(chunks))
    name, content = chunks[index]
    kind = random.randrange(5)
    if kind == 0:
        del chunks[index]
    elif kind == 1:
        chunks.insert(random.randrange(len(chunks)), chunks[index])
    elif kind == 2:
        name = random.choice(_CHUNKS)
        chunks.insert(random.randrange(len(chunks)), (name, random.randbytes(random.choice((0, 1, 4, 8, 26, 300)))))
    else:
        chunks[index] = (name, mutate_bytes(content, random))
    whole = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return data[:8] + whole
