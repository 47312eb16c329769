"""Pictures in the rows of a data set, which hold a file's bytes or say where the file lies."""

import io
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from PIL import Image

from hf_aegis.data.pictures import MAX_BYTES, read_picture
from hf_aegis.hub.names import is_file_name


# What zipfile raises of archives that are damaged, encrypted, or packed in ways that it does not know.
_ARCHIVE_FAILURES = (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error, lzma.LZMAError)


class DatasetPictures:
    """
    Opens the pictures of one data set. A row may say that its picture lies anywhere; it is looked for in the set
    alone: in its folder, or else in its repository on the Hub and that repository's folder of the cache.

    Args:
        source (`str`): The set's folder, or its id on the Hub.
    """

    def __init__(self, source: str):
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder, self._repository = Path(source), None
        if not folder.exists():
            # A snapshot's files are links to others of the same folder.
            folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="dataset"))
            self._repository = f"hf://datasets/{source}@"
        self._folder = folder.resolve()

    def open(self, value: Any) -> Image.Image:
        """
        One picture, in RGB.

        Args:
            value (`dict`): `bytes`, or else `path`: a file of the set; of a stream, an address in the set's own
                repository; of either, `zip://<member>::` and a ZIP archive that lies there.

        Raises:
            ValueError: If there is neither, the path leads elsewhere, an archive cannot be read, or as of
                [`~data.pictures.read_picture`].
            OSError: If the file cannot be had.
        """
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
        if data is not None:
            return read_picture(io.BytesIO(data))
        if not path:
            raise ValueError("the row holds no image")
        archived, separator, place = path.rpartition("::")
        # One archive at most: datasets opens the first part of an address whatever the last one is.
        if separator and ("::" in archived or not archived.startswith("zip://")):
            raise _outside(path)
        with self._opened(place, path) as file:
            # One byte more tells a picture that is too large from one that is as large as it may be.
            data = _read_member(file, archived.removeprefix("zip://"), path) if separator else file.read(MAX_BYTES + 1)
        return read_picture(io.BytesIO(data))

    def _opened(self, place: str, path: str) -> BinaryIO:
        if "://" not in place:
            return self._file(place, path).open("rb")
        own = self._repository is not None and place.startswith(self._repository)
        if not own or not is_file_name(unquote(place.removeprefix(str(self._repository)))):
            raise _outside(path)
        from datasets.utils.file_utils import xopen

        return xopen(place, "rb")

    def _file(self, place: str, path: str) -> Path:
        try:
            file = Path(place).resolve()
            found = file.is_file()
        # Names that no file has: with a zero byte, too long, or of links in a circle.
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"the row's image is said to lie at {path[:200]!r}, which is no path: {error}") from error
        if not file.is_relative_to(self._folder):
            raise _outside(path)
        if not found:
            raise FileNotFoundError(f"there is no file {place!r}")
        return file


def _read_member(file: BinaryIO, member: str, path: str) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member.lstrip("/")) as packed:
            return packed.read(MAX_BYTES + 1)
    except KeyError as error:
        raise FileNotFoundError(f"there is no file {path!r}") from error
    except _ARCHIVE_FAILURES as error:
        raise ValueError(f"the archive of the row's image, {path!r}, cannot be read: {error}") from error


def _outside(path: str) -> ValueError:
    return ValueError(
        f"the row's image is said to lie at {path!r}, which is outside of the data set (of archives ZIP alone is read)"
    )
