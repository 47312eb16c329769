"""Subspaces and sensitivities as tensors and as what JSON can hold beside them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace


_TENSORS = ("basis", "energies")
_SENSITIVITY_TENSORS = ("output_basis", "sensitivities")
_FIELDS = {"linears": list, "total_energy": float, "num_inputs": int}


def tensor_names(keys: Iterable[str], linears: Iterable[str]) -> set[str]:
    """Names of the tensors of subspaces with these keys, and of sensitivities of these linear layers."""
    return {_name(key, part) for key in keys for part in _TENSORS} | {
        _sensitivity_name(name, part) for name in linears for part in _SENSITIVITY_TENSORS
    }


def check_fields(groups: Mapping[str, Any]) -> list[str]:
    """
    Checks what [`pack_subspaces`] gives for JSON.

    Returns:
        `list[str]`: the linear layers that the subspaces are for.

    Raises:
        ValueError: if fields are missing, unknown or of the wrong type; the subspace's key is named.
    """
    for key, fields in groups.items():
        found = {name: type(value) for name, value in fields.items()} if isinstance(fields, Mapping) else fields
        if found != _FIELDS or not all(isinstance(name, str) for name in fields["linears"]):
            raise ValueError(
                f"subspace {key!r} is {fields!r}, expected linears (a list of names), total_energy (a float) and "
                "num_inputs (an integer)"
            )
    return [name for fields in groups.values() for name in fields["linears"]]


def pack_subspaces(subspaces: Mapping[str, InputSubspace]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """
    Takes subspaces apart.

    Returns:
        `tuple`: tensors called `subspaces.<key>.basis` and `subspaces.<key>.energies`, and by key the other fields.
    """
    tensors = {_name(key, part): getattr(space, part) for key, space in subspaces.items() for part in _TENSORS}
    groups = {
        key: {name: kind(getattr(space, name)) for name, kind in _FIELDS.items()} for key, space in subspaces.items()
    }
    return tensors, groups


def unpack_subspaces(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, Any]]
) -> dict[str, InputSubspace]:
    """
    The inverse of [`pack_subspaces`]; other tensors do not matter.

    Raises:
        ValueError: if fields or tensors do not make a subspace; its key is named.
    """
    check_fields(groups)
    subspaces = {}
    for key, fields in groups.items():
        parts: dict[str, Any] = {part: tensors[_name(key, part)] for part in _TENSORS}
        subspaces[key] = InputSubspace(**{**fields, **parts, "linears": tuple(fields["linears"])})
    return subspaces


def pack_sensitivities(sensitivities: Mapping[str, PairSensitivity]) -> dict[str, Tensor]:
    """Takes sensitivities apart: `sensitivities.<linear>.output_basis` and `sensitivities.<linear>.sensitivities`."""
    return {
        _sensitivity_name(name, part): getattr(pairs, part)
        for name, pairs in sensitivities.items()
        for part in _SENSITIVITY_TENSORS
    }


def unpack_sensitivities(tensors: Mapping[str, Tensor], linears: Iterable[str]) -> dict[str, PairSensitivity]:
    """
    The inverse of [`pack_sensitivities`]; other tensors do not matter.

    Raises:
        ValueError: if tensors do not make a sensitivity; its linear layer is named.
    """
    return {
        name: PairSensitivity(name, *(tensors[_sensitivity_name(name, part)] for part in _SENSITIVITY_TENSORS))
        for name in linears
    }


def _name(key: str, part: str) -> str:
    return f"subspaces.{key}.{part}"


def _sensitivity_name(linear: str, part: str) -> str:
    return f"sensitivities.{linear}.{part}"
