"""Camera frames of a demonstration: where they lie, what is checked before they are read, and reading one upright."""

import io
import math
import os

import h5py
import numpy as np
from PIL import Image

from hf_aegis.data.libero_format import JPEG_SUFFIX, LARGEST_SIDE, LiberoConvention, LiberoFormatError


# Nobody minds a megabyte.
_ALWAYS_READ = 2**20
# More than deflate, of which a byte makes 1032 at most, and more than other filters make of what is no mere constant.
_MOST_PACKED = 5000
_LARGEST_CHUNK = 2**28


def frames_key(camera: str, convention: LiberoConvention) -> str:
    """Name of the dataset under `obs` that holds a camera's frames."""
    return camera + JPEG_SUFFIX if convention.frames == "jpeg" else camera


def check_frames(frames: h5py.Dataset, convention: LiberoConvention) -> str | None:
    """What is wrong with a frames dataset's shape or dtype, as far as can be told without reading it."""
    size = convention.image_size
    shape: tuple[int, ...] = frames.shape or ()
    if convention.frames == "jpeg":
        if h5py.check_vlen_dtype(frames.dtype) != np.uint8 or len(shape) != 1:
            return f"expected variable-length uint8 of shape (T,), found {frames.dtype} of shape {shape}"
        return _bloated(frames)
    side = "s" if size is None else size
    square = len(shape) == 4 and shape[1] == shape[2] > 0 and shape[3] == 3
    if frames.dtype != np.uint8 or not square or (size is not None and shape[1] != size):
        return f"expected uint8 of shape (T, {side}, {side}, 3), found {frames.dtype} of shape {frames.shape}"
    if shape[1] > LARGEST_SIDE:
        return f"frames of {shape[1]} pixels, expected at most {LARGEST_SIDE}"
    return _bloated(frames)


def refuse_bloated(dataset: h5py.Dataset) -> None:
    """
    Raises:
        LiberoFormatError: to read the dataset would take far more memory than what the file holds of it.
    """
    if (text := _bloated(dataset)) is not None:
        raise LiberoFormatError.at(os.fspath(dataset.file.filename), dataset.name, text)


def read_frame(frames: h5py.Dataset, step: int, convention: LiberoConvention) -> np.ndarray:
    """
    One frame, upright.

    Args:
        frames (`h5py.Dataset`): raw `(T, s, s, 3)` or JPEG streams `(T,)`.
        step (`int`): row.
        convention (`LiberoConvention`): how the frames are stored.

    Returns:
        `np.ndarray` of shape `(s, s, 3)`, uint8, contiguous.

    Raises:
        LiberoFormatError: the row cannot be read, is no RGB JPEG, or has another size than the convention states.
    """
    row = read_rows(frames, step)
    if convention.frames == "jpeg":
        try:
            row = _decode_jpeg(row.tobytes(), convention.image_size)
        except ValueError as error:
            raise LiberoFormatError.at(frames.file.filename, f"{frames.name}[{step}]", str(error)) from error
    return np.ascontiguousarray(row[::-1] if convention.image_origin == "bottom_left" else row)


def read_rows(dataset: h5py.Dataset, rows: int | slice) -> np.ndarray:
    """
    Rows of a dataset, and nothing else of it.

    Raises:
        LiberoFormatError: there are none, or HDF5 cannot read them (a damaged chunk, a missing compression filter).
    """
    if not dataset.shape:
        found = "nothing" if dataset.shape is None else "a single value"
        raise LiberoFormatError.at(os.fspath(dataset.file.filename), dataset.name, f"holds {found}, expected rows")
    try:
        return dataset[rows]
    except OSError as error:
        raise LiberoFormatError.at(
            os.fspath(dataset.file.filename), dataset.name, f"cannot be read, the file may be damaged: {error}"
        ) from error


def _bloated(dataset: h5py.Dataset) -> str | None:
    """
    What is wrong with the size that a dataset says it has: HDF5 fills what was never written, and whole chunks are
    unpacked to read a row.
    """
    size, stored = int(dataset.size or 0) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if size > max(_ALWAYS_READ, stored * _MOST_PACKED):
        return f"says it has {size} bytes, of which the file holds {stored}"
    chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
    if chunk > _LARGEST_CHUNK:
        return f"is stored in chunks of {chunk} bytes, expected at most {_LARGEST_CHUNK}"
    return None


def _decode_jpeg(stream: bytes, size: int | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(stream), formats=["JPEG"]) as image:
            if image.mode != "RGB" or image.size != (size, size):
                raise ValueError(
                    f"expected an RGB JPEG of {size}x{size} pixels, found {image.mode} of "
                    f"{image.size[0]}x{image.size[1]}"
                )
            return np.array(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"undecodable JPEG of {len(stream)} bytes: {error}") from error
