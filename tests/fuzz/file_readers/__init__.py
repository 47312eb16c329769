"""
The readers of files that hf_aegis has, each with sound files to make damaged ones from. By name, what makes one in a
folder of its own.
"""

from collections.abc import Callable
from pathlib import Path

from file_readers.anchors import ANCHOR_READERS
from file_readers.checkpoints import CHECKPOINT_READERS
from file_readers.comparisons import COMPARISON_READERS
from file_readers.demonstrations import DEMONSTRATION_READERS
from file_readers.file_reader import FileReader
from file_readers.recipes import RECIPE_READERS
from file_readers.single_files import SINGLE_FILE_READERS


READERS: dict[str, Callable[[Path], FileReader]] = {
    **SINGLE_FILE_READERS,
    **ANCHOR_READERS,
    **CHECKPOINT_READERS,
    **RECIPE_READERS,
    **COMPARISON_READERS,
    **DEMONSTRATION_READERS,
}

__all__ = ["READERS", "FileReader"]
