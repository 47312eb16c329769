"""What collators ask of the items of a robot dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


KEYS = ("images", "instruction", "state", "actions", "action_is_pad")
"""Keys of an item, as [`~data.LiberoDataset`] yields them."""


def check_items(items: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        ValueError: An item lacks one of [`KEYS`]; it is named.
    """
    for index, item in enumerate(items):
        if missing := [key for key in KEYS if key not in item]:
            raise ValueError(f"item {index} lacks {', '.join(missing)}; found {', '.join(map(str, item))}")


def stack_feature(items: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """
    One feature of all items, `(B, ...)`.

    Raises:
        ValueError: Items differ in shape.
    """
    arrays = [np.asarray(item[key]) for item in items]
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(f"`{key}` of item {index} has shape {array.shape}, of item 0 {arrays[0].shape}")
    return np.stack(arrays)
