"""
Anchor files: `anchor.safetensors` (moments, bases and energies of subspaces, and sensitivities) and
`anchor_config.json` (what they were collected from, and which linear layers each subspace is for).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from hf_aegis.anchors.fingerprint import AnchorFingerprint
from hf_aegis.anchors.linear_layers.packing import (
    check_fields,
    pack_sensitivities,
    pack_subspaces,
    tensor_names,
    unpack_sensitivities,
    unpack_subspaces,
)
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace
from hf_aegis.atomic_files import write_bytes
from hf_aegis.format_version import check_format_version
from hf_aegis.hub import HubDownloadError, download_files
from hf_aegis.json_files import read_json_object


ANCHOR_TENSORS = "anchor.safetensors"
ANCHOR_CONFIG = "anchor_config.json"
ANCHOR_TYPE = "activation"
GROUPS = "subspaces"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def write_anchor(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    fingerprint: AnchorFingerprint,
    subspaces: Mapping[str, InputSubspace],
    sensitivities: Mapping[str, PairSensitivity],
) -> Path:
    """
    Writes both files, each atomically, and the hash of the tensors into the configuration, so that a pair of which
    only one half was replaced is noticed when it is read.

    Returns:
        `Path`: the folder, created where it was missing.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    apart, groups = pack_subspaces(subspaces)
    everything = {**tensors, **apart, **pack_sensitivities(sensitivities)}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in everything.items()}, {"format": "pt"})
    config = {
        "anchor_type": ANCHOR_TYPE,
        **fingerprint.to_dict(),
        **({GROUPS: groups} if groups else {}),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    write_bytes(target / ANCHOR_TENSORS, data)
    write_bytes(target / ANCHOR_CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return target


def read_anchor(
    tensors_file: Path, config_file: Path
) -> tuple[dict[str, Tensor], AnchorFingerprint, dict[str, InputSubspace], dict[str, PairSensitivity]]:
    """
    Reads both files.

    Returns:
        `tuple`: `mean` and `variance` by name, the fingerprint, and the subspaces and sensitivities, if any.

    Raises:
        ValueError: if a file is corrupt, is no anchor, or has a newer format; the file and the key are named.
    """
    config = read_json_object(config_file)
    found_type = config.get("anchor_type")
    if found_type != ANCHOR_TYPE:
        raise ValueError(f"{config_file}: key 'anchor_type' is {found_type!r}, expected {ANCHOR_TYPE!r}")
    check_format_version(config, "activation anchor", config_file)
    data = tensors_file.read_bytes()
    found_hash, expected_hash = hashlib.sha256(data).hexdigest(), config.get("tensors_sha256")
    if found_hash != expected_hash:
        raise ValueError(
            f"{tensors_file} is corrupt or belongs to another anchor: its SHA-256 is {found_hash}, key "
            f"'tensors_sha256' of {config_file} says {expected_hash}"
        )
    try:
        tensors = load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{tensors_file} is not a safetensors file: {error}") from error
    # Complex numbers and 8-bit floats are none that moments can be compared in.
    if wrong := sorted(name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES):
        raise ValueError(
            f"{tensors_file}: {wrong[0]} is {tensors[wrong[0]].dtype}, expected one of {list(map(str, _DTYPES))}"
        )
    groups = config.get(GROUPS, {})
    if not isinstance(groups, dict):
        raise ValueError(f"{config_file}: key {GROUPS!r} is {groups!r}, expected a mapping")
    apart = ("anchor_type", "tensors_sha256", GROUPS)
    try:
        fingerprint = AnchorFingerprint.from_dict({key: value for key, value in config.items() if key not in apart})
        names = check_fields(groups)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    options = fingerprint.subspace_options
    linears = names if options is not None and options.sensitivity else []
    expected = {"mean", "variance", *tensor_names(groups, linears)}
    if set(tensors) != expected:
        raise ValueError(f"{tensors_file} holds the keys {sorted(tensors)}, expected {sorted(expected)}")
    try:
        subspaces = unpack_subspaces(tensors, groups)
        sensitivities = unpack_sensitivities(tensors, linears)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    return {name: tensors[name] for name in ("mean", "variance")}, fingerprint, subspaces, sensitivities


def locate_anchor(
    folder_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Path, Path]:
    """
    Local paths of an anchor's tensors and configuration, from a folder or from a dataset repository on the Hub.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        OSError: if there is no such folder and the Hub did not deliver either.
    """
    folder = Path(folder_or_repo_id)
    if folder.is_dir():
        for name in (ANCHOR_CONFIG, ANCHOR_TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no anchor: {folder / name} is missing")
        return folder / ANCHOR_TENSORS, folder / ANCHOR_CONFIG
    try:
        files = download_files(
            os.fspath(folder_or_repo_id),
            (ANCHOR_TENSORS, ANCHOR_CONFIG),
            repo_type="dataset",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except HubDownloadError as error:
        raise OSError(f"no anchor at {folder_or_repo_id}: it is not a local folder, and {error}") from error.__cause__
    return files[0], files[1]
