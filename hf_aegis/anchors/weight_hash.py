"""A hash of the anchored layers' weights that survives a change of dtype and the injection of adapters."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm


# Below this many bytes hashing takes less than a second, and a progress bar would only flicker.
_PROGRESS_FROM_BYTES = 2**29


def named_base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """
    Parameters under the names they have without PEFT: a tuner layer counts as its `base_layer`, a module that PEFT
    copied for training as its `original_module`, and adapter parameters are left out.

    Args:
        module (`nn.Module`):
            Any module.
        prefix (`str`, *optional*, defaults to `""`):
            Put before each name.

    Yields:
        `tuple[str, nn.Parameter]`: name and parameter.
    """
    for attribute in ("base_layer", "original_module"):
        base = getattr(module, attribute, None)
        if isinstance(base, nn.Module):
            yield from named_base_parameters(base, prefix)
            return
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in module.named_children():
        yield from named_base_parameters(child, f"{prefix}{name}.")


def hash_layer_weights(layers: nn.ModuleList, *, progress: bool = True) -> str:
    """
    SHA-256 over names, shapes and float32 values of the layers' parameters. A bfloat16 checkpoint hashes the same
    whether it was loaded in bfloat16 or in float32, on whichever device, with or without (unmerged) PEFT adapters. A
    float32 checkpoint does not: it is rounded when it is loaded in bfloat16. Rounding before hashing would hide that,
    and with it every difference below bfloat16's resolution.

    Args:
        layers (`nn.ModuleList`):
            The decoder layers, see [`find_decoder_layers`].
        progress (`bool`, *optional*, defaults to `True`):
            Shows a progress bar where there is enough to hash.

    Returns:
        `str`: hexadecimal digest.

    Raises:
        ValueError: if a parameter holds no data (it is on the `meta` device, e.g. offloaded to disk).
    """
    parameters = sorted(named_base_parameters(layers), key=lambda item: item[0])
    for name, parameter in parameters:
        if parameter.is_meta:
            raise ValueError(f"cannot hash layer parameter {name!r}: it is on the meta device and holds no data")
    total_bytes = 4 * sum(parameter.numel() for _, parameter in parameters)
    return hash_tensors(
        {name: partial(_detached, parameter) for name, parameter in parameters},
        description="Hashing layer weights",
        progress=progress and total_bytes >= _PROGRESS_FROM_BYTES,
    )


def hash_tensors(readers: Mapping[str, Callable[[], torch.Tensor]], *, description: str, progress: bool) -> str:
    """
    SHA-256 over names, shapes and float32 values of tensors, in the given order.

    Args:
        readers (`Mapping[str, Callable[[], torch.Tensor]]`):
            By name, what gives each tensor. A few are called at a time, in threads.
        description (`str`):
            Of the progress bar.
        progress (`bool`):
            Whether there is one.

    Returns:
        `str`: hexadecimal digest.
    """
    digest = hashlib.sha256()
    # hashlib releases the interpreter lock, so threads hash tensors side by side; few, as each holds a float32 copy.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        tensors = pool.map(_hash_tensor, readers.values())
        bar = tqdm(
            zip(readers, tensors, strict=True),
            desc=description,
            total=len(readers),
            unit="tensor",
            disable=not progress,
        )
        for name, (shape, tensor_digest) in bar:
            digest.update(f"{name} {shape} {tensor_digest}\n".encode())
    return digest.hexdigest()


def _detached(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach()


def _hash_tensor(read: Callable[[], torch.Tensor]) -> tuple[tuple[int, ...], str]:
    values = read().to(device="cpu", dtype=torch.float32).contiguous()
    return tuple(values.shape), hashlib.sha256(values.numpy().data).hexdigest()
