"""Everything that an anchor is made of, collected from a model."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import hf_aegis
from hf_aegis.anchors.collection import collect_moments
from hf_aegis.anchors.decoder_layers import find_decoder_layers
from hf_aegis.anchors.fingerprint import AnchorFingerprint, describe_model, describe_origin
from hf_aegis.anchors.linear_layers.inputs import LinearInputs
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace, SubspaceOptions
from hf_aegis.anchors.partial_collection import PartialCollection
from hf_aegis.anchors.passes import Passes
from hf_aegis.anchors.sensitivity_collection import check_passes, collect_sensitivities
from hf_aegis.anchors.shares import Share
from hf_aegis.anchors.token_kinds import MASK_POLICIES, check_tokens


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AnchorStatistics(NamedTuple):
    """
    The arguments of [`ActivationAnchor`], in their order.

    Attributes:
        mean, variance (`Tensor` of shape `(L, D)`): Moments of the layers' outputs, float64 on the CPU.
        fingerprint ([`AnchorFingerprint`]): What they were collected from.
        subspaces (`Mapping[str, InputSubspace]`, *optional*): Where they were asked for.
        sensitivities (`Mapping[str, PairSensitivity]`, *optional*): Where they were asked for.
    """

    mean: Tensor
    variance: Tensor
    fingerprint: AnchorFingerprint
    subspaces: Mapping[str, InputSubspace] | None
    sensitivities: Mapping[str, PairSensitivity] | None


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: str | nn.ModuleList | None,
    moments: str,
    tokens: str,
    subspaces: SubspaceOptions | None,
    revision: str | None,
    dataset_id: str | None,
    num_batches: int | None,
    progress: bool,
    process_group: "ProcessGroup | None",
    partial_folder: str | os.PathLike[str] | None,
    save_batches: int,
    settings: Mapping[str, Any] | None,
) -> AnchorStatistics:
    """
    Moments, subspaces and sensitivities of a model over batches; arguments and errors are those of
    [`ActivationAnchor.collect`].
    """
    check_tokens(tokens)
    if subspaces is not None and subspaces.sensitivity:
        check_passes(batches)
    stack = find_decoder_layers(model, layers)
    # Before the long part, so that weights that cannot be hashed do not cost a whole collection.
    identity = {
        **describe_model(model, stack),
        **describe_origin(model, stack),
        **({"revision": revision} if revision is not None else {}),
        "moments": moments,
        "mask_policy": MASK_POLICIES[tokens],
        "dataset_id": dataset_id,
    }
    share = Share.of(process_group)
    partial = None
    if partial_folder is not None:
        fixed = {
            **identity,
            "subspaces": None if subspaces is None else dataclasses.asdict(subspaces),
            "num_batches": num_batches,
            "versions": [hf_aegis.__version__, torch.__version__, version("transformers")],
        }
        partial = PartialCollection(partial_folder, {**(settings or {}), **fixed}, every=save_batches, share=share)
    elif settings is not None:
        raise ValueError("settings are kept in a partial_folder, and none is given")
    passes = Passes(num_batches, progress=progress and share.rank == 0, share=share, partial=partial)
    linear_inputs = None if subspaces is None else LinearInputs(model, stack, subspaces)
    collected = collect_moments(
        model, batches, stack, moments=moments, tokens=tokens, linear_inputs=linear_inputs, passes=passes
    )
    fingerprint = AnchorFingerprint(
        **{
            **identity,
            "width": collected.mean.shape[-1],
            "num_samples": collected.num_samples,
            "num_tokens": collected.num_tokens,
            "num_batches": collected.num_batches,
            "subspace_options": subspaces,
            "format_version": 1 if subspaces is None else subspaces.format_version,
        }
    )
    found = None if linear_inputs is None else linear_inputs.subspaces(passes.progress, share)
    sensitivities = None
    if subspaces is not None and subspaces.sensitivity:
        assert found is not None
        sensitivities = collect_sensitivities(model, batches, stack, found, subspaces, tokens=tokens, passes=passes)
    return AnchorStatistics(collected.mean, collected.variance, fingerprint, found, sensitivities)
