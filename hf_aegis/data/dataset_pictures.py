"""Pictures in the rows of a data set, which hold a file's bytes or say where the file lies."""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from hf_aegis.data.pictures import read_picture


class DatasetPictures:
    """
    Opens the pictures of one data set. A row may say that its picture lies anywhere; it is looked for in the set
    alone.

    Args:
        source (`str`): The set's folder, or its id on the Hub.
    """

    def __init__(self, source: str):
        from datasets import config
        from huggingface_hub import constants

        self.source = source
        places = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
        own = [source] if Path(source).exists() else []
        self._folders = [Path(os.path.abspath(place)) for place in (*own, *places)]

    def open(self, value: Any) -> Image.Image:
        """
        One picture, in RGB.

        Args:
            value (`dict`): `bytes`, or else `path`: a file of the set, or of what was downloaded; of a stream, an
                address in the set's own repository.

        Raises:
            ValueError: If there is neither, the path leads elsewhere, or as of [`~data.pictures.read_picture`].
            OSError: If the file cannot be had.
        """
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
        if data is not None:
            return read_picture(io.BytesIO(data))
        if not path:
            raise ValueError("the row holds no image")
        if "://" in path:
            return read_picture(io.BytesIO(self._fetch(path)))
        file = Path(os.path.abspath(path))
        if not any(file.is_relative_to(folder) for folder in self._folders):
            raise ValueError(f"the row's image is said to lie at {path!r}, which is outside of the data set")
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {path!r}")
        return read_picture(file)

    def _fetch(self, address: str) -> bytes:
        from datasets.utils.file_utils import xopen

        # Behind the last "::" stands the archive that an address leads into.
        if not address.rpartition("::")[2].startswith(f"hf://datasets/{self.source}@"):
            raise ValueError(f"the row's image is said to lie at {address!r}, which is outside of the data set")
        with xopen(address, "rb") as file:
            return file.read()
