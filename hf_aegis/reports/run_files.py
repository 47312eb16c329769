"""Checks of what a run has logged, before figures and tables are made of it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_aegis.json_files import is_kind, require_keys


if TYPE_CHECKING:
    import numpy as np

Records = Sequence[Mapping[str, Any]]
"""What a file of JSON lines holds."""

_NUMBER, _NUMBER_OR_NONE = (float,), (float, type(None))


def check_metrics(records: Records, path: Path) -> None:
    """
    Raises:
        ValueError: If a value is neither a number nor `None`; file, step and key are named.
    """
    for record in records:
        require_keys(dict(record), dict.fromkeys(record, _NUMBER_OR_NONE), _place(path, record))


def check_projection(records: Records, path: Path) -> None:
    """
    Raises:
        ValueError: If a record is not that of a backward pass: of a step from one, with as many cosines as groups.
    """
    for record in records:
        place = _place(path, record)
        require_keys(dict(record), {"groups": list, "cosine": list, "summary": (dict, type(None))}, place)
        _check_list(record["groups"], (str,), f"{place}, groups")
        _check_list(record["cosine"], _NUMBER_OR_NONE, f"{place}, cosine")
        if len(record["groups"]) != len(record["cosine"]) or record["step"] < 1:
            counts = f"{len(record['groups'])} groups and {len(record['cosine'])} cosines"
            raise ValueError(f"{place}: found {counts}, expected as many of both, of a step from 1")
        summary = record.get("summary") or {}
        require_keys(summary, dict.fromkeys(summary, _NUMBER_OR_NONE), f"{place}, summary")


def check_experts(records: Records, path: Path) -> None:
    """
    Raises:
        ValueError: If a layer of a record has no load of experts and no entropy.
    """
    for record in records:
        place = _place(path, record)
        for name, figures in require_keys(dict(record), {"layers": dict}, place)["layers"].items():
            require_keys(figures, {"load": list, "entropy": float}, f"{place}, {name}")
            _check_list(figures["load"], _NUMBER, f"{place}, {name}, load")
            if not figures["load"]:
                raise ValueError(f"{place}, {name}: key 'load' is empty, expected that of an expert or more")


def check_neuron_cosines(found: dict[str, Any], path: Path) -> None:
    """
    Raises:
        ValueError: If edges do not rise, or a group has not a count for each bin between them.
    """
    require_keys(found, {"edges": list, "counts": dict}, path)
    _check_list(found["edges"], _NUMBER, f"{path}, edges")
    edges = found["edges"]
    if len(edges) < 2 or any(low >= high for low, high in itertools.pairwise(edges)):
        raise ValueError(f"{path}: key 'edges' must hold two numbers or more, rising")
    for group, counts in found["counts"].items():
        if not isinstance(counts, list) or len(counts) != len(edges) - 1:
            raise ValueError(f"{path}, counts.{group}: expected {len(edges) - 1} counts, one for each bin")
        _check_list(counts, _NUMBER, f"{path}, counts.{group}")
        if min(counts) < 0:
            raise ValueError(f"{path}, counts.{group}: found {min(counts)}, expected counts")


def check_expert_spectra(found: dict[str, Any], path: Path) -> None:
    """
    Raises:
        ValueError: If a layer has not its experts' singular values before, after, and of the difference.
    """
    for place, layer in _layers(found, path):
        for key in ("before", "after", "update"):
            _check_spectrum(layer, key, place)


def check_gradient_spectra(found: dict[str, Any], path: Path) -> None:
    """
    Raises:
        ValueError: If a layer's matrices have not the singular values of both losses' gradients.
    """
    require_keys(found, {"samples": int}, path)
    for place, layer in _layers(found, path):
        for name, matrix in require_keys(layer, {"matrices": dict}, place)["matrices"].items():
            for loss in ("cross_entropy", "flow"):
                _check_spectrum(matrix, loss, f"{place}, {name}")


def check_hidden_states(states: "Mapping[str, np.ndarray]", path: Path) -> None:
    """
    Raises:
        ValueError: If the states before and after are missing, or are not matrices of one shape with finite numbers.
    """
    import numpy as np

    if missing := {"before", "after"} - states.keys():
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; found {', '.join(sorted(states))}")
    shapes = [states[name].shape for name in ("before", "after")]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"{path}: before and after have the shapes {shapes}, expected (N, D) of both")
    if wrong := [name for name in ("before", "after") if not np.isfinite(states[name]).all()]:
        raise ValueError(f"{path}: {wrong[0]} holds values that are not finite")


def check_episodes(episodes: Sequence[dict[str, Any]], path: Path) -> None:
    """
    Raises:
        ValueError: If an episode's line lacks what it is of and how it ended, or a name would lead to another folder.
    """
    kinds: dict[str, type | tuple[type, ...]] = {"suite": str, "task": str, "start": int, "steps": int}
    for number, episode in enumerate(episodes, start=2):
        place = f"{path}, line {number}"
        require_keys(episode, {**kinds, "success": (bool, type(None))}, place)
        for key in ("suite", "task"):
            if not is_plain_name(episode[key]):
                found = f"{place}: key {key!r} is {episode[key]!r}"
                raise ValueError(f"{found}, expected a name that leads to no other folder")


def is_plain_name(text: str) -> bool:
    """Whether a text names a folder or file below another, and none elsewhere."""
    return text not in ("", ".", "..") and not {"/", "\\", "\0"} & set(text) and len(text) < 200


def _place(path: Path, record: Mapping[str, Any]) -> str:
    return f"{path}, step {record['step']}"


def _layers(found: dict[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    layers = require_keys(found, {"layers": list}, path)["layers"]
    if not layers:
        raise ValueError(f"{path}: key 'layers' is empty")
    named = [require_keys(layer, {"name": str}, f"{path}, layers") for layer in layers]
    return [(f"{path}, {layer['name']}", layer) for layer in named]


def _check_spectrum(holder: Any, key: str, place: str) -> None:
    values = require_keys(holder, {key: list}, place)[key]
    _check_list(values, _NUMBER_OR_NONE, f"{place}, {key}")
    if not values or any(value is not None and not (value >= 0 or math.isnan(value)) for value in values):
        raise ValueError(f"{place}: key {key!r} must hold a singular value or more, none negative")


def _check_list(values: list[Any], kinds: tuple[type, ...], place: str) -> None:
    if wrong := [value for value in values if not is_kind(value, kinds)]:
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{place}: holds {str(wrong[0])[:80]!r}, expected {names}")
