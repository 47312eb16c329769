"""What an anchor was collected from, and whether a model is that."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

import hf_aegis
from hf_aegis.anchors.decoder_layers import unwrap_model
from hf_aegis.anchors.linear_layers.subspaces import SubspaceOptions
from hf_aegis.anchors.token_kinds import MASK_POLICIES
from hf_aegis.anchors.weight_hash import hash_layer_weights
from hf_aegis.format_version import FORMAT_KEY, NEWEST_VERSIONS
from hf_aegis.machine_paths import portable_name, snapshot_commit


FORMAT_VERSION = NEWEST_VERSIONS["activation anchor"]
"""
Newest version of the anchor file format that this package reads and writes. Anchors with sensitivities have version 3,
those with subspaces alone version 2, and those without version 1, so that older packages read what they can.
"""

MOMENTS_POLICIES = ("batch", "pooled")

# What must agree before two partial collections are one: everything but the counts and the software's versions.
_MERGE_FIELDS = (
    "base_model",
    "revision",
    "weights_sha256",
    "num_layers",
    "width",
    "attention_implementation",
    "dtype",
    "mask_policy",
    "moments",
    "dataset_id",
    "subspace_options",
    "format_version",
)
_NEEDED_TEXTS = ("weights_sha256", "package_version", "torch_version", "transformers_version")
_TEXT_FIELDS = (*_NEEDED_TEXTS, "base_model", "revision", "attention_implementation", "dtype", "dataset_id")
_COUNT_FIELDS = ("num_samples", "num_tokens", "num_batches")
_SHAPE_FIELDS = ("num_layers", "width")
_WEIGHT_FIELDS = (*_SHAPE_FIELDS, "attention_implementation", "weights_sha256")


class AnchorMismatchError(ValueError):
    """The anchor was not collected from this model."""


@dataclass(frozen=True)
class AnchorFingerprint:
    """
    Identity of an anchor.

    Args:
        num_layers (`int`):
            Number of decoder layers L.
        width (`int`):
            Hidden size D.
        weights_sha256 (`str`):
            Hash of the layers' weights, see [`~anchors.weight_hash.hash_layer_weights`].
        moments (`str`):
            `"batch"`: averages over batches of each batch's mean and variance (the paper's definition, which depends
            on the batch size). `"pooled"`: mean and variance over all tokens, independent of the batching.
        num_samples (`int`):
            Number of samples (sequences) seen.
        num_tokens (`int`):
            Number of unmasked tokens seen.
        num_batches (`int`):
            Number of batches seen.
        base_model (`str`, *optional*):
            Hub id of the model, or the name of its folder.
        revision (`str`, *optional*):
            Commit of the model on the Hub.
        attention_implementation (`str`, *optional*):
            `"eager"`, `"sdpa"`, ... of the decoder.
        dtype (`str`, *optional*):
            Dtype of the layers' weights while collecting.
        dataset_id (`str`, *optional*):
            What the anchor was collected on.
        mask_policy (`str`, *optional*, defaults to `"attention_mask"`):
            Which tokens count: `"attention_mask"` for all that are attended, `"image_tokens"` or `"text_tokens"` for
            one kind of them. See `tokens`.
        package_version, torch_version, transformers_version (`str`, *optional*):
            Software that collected the anchor.
        format_version (`int`, *optional*, defaults to 1):
            Version of the file format: 2 for an anchor with subspaces, 3 for one with sensitivities.
        subspace_options ([`SubspaceOptions`], *optional*):
            How the subspaces and sensitivities were collected, in an anchor that has them.
    """

    num_layers: int
    width: int
    weights_sha256: str
    moments: str
    num_samples: int
    num_tokens: int
    num_batches: int
    base_model: str | None = None
    revision: str | None = None
    attention_implementation: str | None = None
    dtype: str | None = None
    dataset_id: str | None = None
    mask_policy: str = MASK_POLICIES["all"]
    package_version: str = hf_aegis.__version__
    torch_version: str = torch.__version__
    transformers_version: str = dataclasses.field(default_factory=lambda: version("transformers"))
    format_version: int = 1
    subspace_options: SubspaceOptions | None = None

    def __post_init__(self) -> None:
        if self.moments not in MOMENTS_POLICIES:
            raise ValueError(f"moments must be one of {MOMENTS_POLICIES}, found {self.moments!r}")
        if self.mask_policy not in MASK_POLICIES.values():
            raise ValueError(f"mask_policy must be one of {tuple(MASK_POLICIES.values())}, found {self.mask_policy!r}")
        for name in (*_SHAPE_FIELDS, *_COUNT_FIELDS):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, found {value!r}")
        for name in _TEXT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in _NEEDED_TEXTS):
                raise ValueError(f"{name} must be a text, found {value!r}")
        options = self.subspace_options
        if (expected := 1 if options is None else options.format_version) != self.format_version:
            having = {1: "without subspaces", 2: "with subspaces", 3: "with sensitivities"}[expected]
            raise ValueError(f"an anchor {having} has format_version {expected}, found {self.format_version}")

    @property
    def tokens(self) -> str:
        """The kind of tokens that count: `"all"`, `"image"` or `"text"`."""
        return next(tokens for tokens, policy in MASK_POLICIES.items() if policy == self.mask_policy)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can hold; `subspace_options` only where there are subspaces."""
        fields = dataclasses.asdict(self)
        if self.subspace_options is None:
            del fields["subspace_options"]
        else:
            fields["subspace_options"] = self.subspace_options.to_dict()
        return fields

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AnchorFingerprint":
        """
        The inverse of [`~AnchorFingerprint.to_dict`].

        Raises:
            ValueError: if fields are missing, unknown or out of range; they are named.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(known - set(values) - {"subspace_options", FORMAT_KEY}), sorted(set(values) - known)
        if missing or unknown:
            raise ValueError(f"anchor fingerprint: missing keys {missing}, unknown keys {unknown}")
        if (options := values.get("subspace_options")) is not None:
            if not isinstance(options, Mapping):
                raise ValueError(f"subspace_options must be a mapping, found {options!r}")
            values = {**values, "subspace_options": SubspaceOptions.from_dict(options)}
        return cls(**values)

    def merged_with(self, other: "AnchorFingerprint") -> "AnchorFingerprint":
        """
        The fingerprint of two partial collections taken together: counts add up, versions are the first one's.

        Raises:
            AnchorMismatchError: if the collections differ in anything else; every such field is named.
        """
        differences = [
            _difference(name, "first", getattr(self, name), "second", getattr(other, name))
            for name in _MERGE_FIELDS
            if getattr(self, name) != getattr(other, name)
        ]
        if differences:
            raise AnchorMismatchError("anchors of different origin do not merge: " + "; ".join(differences))
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNT_FIELDS}
        return dataclasses.replace(self, **counts)

    def check_same_base(self, other: "AnchorFingerprint") -> None:
        """
        Refuses the fingerprint of an anchor of another model, whatever they were collected on.

        Raises:
            AnchorMismatchError: if shapes, attention or weights differ; every such field is named.
        """
        differences = [
            _difference(name, "first", getattr(self, name), "second", getattr(other, name))
            for name in _WEIGHT_FIELDS
            if getattr(self, name) != getattr(other, name)
        ]
        if differences:
            raise AnchorMismatchError("anchors of different models do not compare: " + "; ".join(differences))

    def check_model(self, description: Mapping[str, Any], dtype: str | None = None) -> None:
        """
        Compares the fields that `description` holds; see [`describe_model`].

        Args:
            description (`Mapping[str, Any]`):
                What the model has to share with the anchor.
            dtype (`str`, *optional*):
                Of the model's layers. It is not compared, but may explain why the weights' hash differs.

        Raises:
            AnchorMismatchError: naming every field that differs, with both sides.
        """
        differences = [
            _difference(name, "anchor", getattr(self, name), "model", value)
            for name, value in description.items()
            if getattr(self, name) != value
        ]
        same_weights = description.get("weights_sha256", self.weights_sha256) == self.weights_sha256
        if not same_weights and None not in (dtype, self.dtype) and dtype != self.dtype:
            differences.append(
                f"the anchor was collected in {self.dtype} and the model is in {dtype}: rounding alone changes "
                f"float32 weights, so load the model in {self.dtype} or collect the anchor in {dtype}"
            )
        if differences:
            raise AnchorMismatchError(
                f"this anchor (of {self.base_model or 'an unnamed model'}) does not fit the model: "
                + "; ".join(differences)
            )


def describe_model(model: nn.Module, layers: nn.ModuleList, *, check: str = "weights") -> dict[str, Any]:
    """
    The fields of a fingerprint that a model must share with its anchor.

    Args:
        model (`nn.Module`):
            The model, possibly wrapped.
        layers (`nn.ModuleList`):
            Its decoder layers.
        check (`str`, *optional*, defaults to `"weights"`):
            `"weights"`: layer count, width, attention implementation and weight hash. `"shape"`: layer count and
            width only, for a model that has been trained since.

    Returns:
        `dict`: fields and values. A model without a configuration has no width to tell, and that field is left out;
        the weight hash covers shapes as well.

    Raises:
        ValueError: if `check` is unknown.
    """
    if check not in ("weights", "shape"):
        raise ValueError(f"check must be 'weights' or 'shape', found {check!r}")
    config = decoder_config(model, layers)
    description: dict[str, Any] = {"num_layers": len(layers)}
    if (width := getattr(config, "hidden_size", None)) is not None:
        description["width"] = width
    if check == "weights":
        description["attention_implementation"] = getattr(config, "_attn_implementation", None)
        description["weights_sha256"] = hash_layer_weights(layers)
    return {name: description[name] for name in _WEIGHT_FIELDS if name in description}


def describe_origin(model: nn.Module, layers: nn.ModuleList) -> dict[str, Any]:
    """The fields of a fingerprint that say where a model came from: `base_model`, `revision` and `dtype`."""
    config = getattr(unwrap_model(model), "config", None)
    source = getattr(config, "_name_or_path", None)
    # Transformers 5 keeps no commit, so that it is known only where somebody wrote it down, or of a cached snapshot.
    revision = getattr(config, "_commit_hash", None) or (snapshot_commit(source) if source else None)
    # A folder on the collecting machine means nothing elsewhere; its name is what a reader can recognise.
    base_model = portable_name(source) if source else None
    dtype = next((str(parameter.dtype).removeprefix("torch.") for parameter in layers.parameters()), None)
    return {"base_model": base_model, "revision": revision, "dtype": dtype}


def decoder_config(model: nn.Module, layers: nn.ModuleList) -> Any:
    """The configuration of the module that owns the layers, or `None` for a model without one."""
    for module in unwrap_model(model).modules():
        if hasattr(module, "config") and any(child is layers for child in module.children()):
            return module.config
    return None


def _difference(name: str, first: str, first_value: Any, second: str, second_value: Any) -> str:
    return f"{name}: {first} {first_value!r}, {second} {second_value!r}"
