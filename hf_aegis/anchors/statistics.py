"""Everything that an anchor is made of, collected from a model."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_aegis.anchors.collection import collect_moments
from hf_aegis.anchors.decoder_layers import find_decoder_layers
from hf_aegis.anchors.fingerprint import AnchorFingerprint, describe_model, describe_origin
from hf_aegis.anchors.linear_layers.inputs import LinearInputs
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace, SubspaceOptions
from hf_aegis.anchors.sensitivity_collection import check_passes, collect_sensitivities
from hf_aegis.anchors.token_kinds import MASK_POLICIES


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
) -> AnchorStatistics:
    """
    Moments, subspaces and sensitivities of a model over batches; arguments and errors are those of
    [`ActivationAnchor.collect`].
    """
    if subspaces is not None and subspaces.sensitivity:
        check_passes(batches)
    stack = find_decoder_layers(model, layers)
    # Before the long part, so that weights that cannot be hashed do not cost a whole collection.
    description = describe_model(model, stack)
    linear_inputs = None if subspaces is None else LinearInputs(model, stack, subspaces)
    collected = collect_moments(
        model,
        batches,
        stack,
        moments=moments,
        tokens=tokens,
        linear_inputs=linear_inputs,
        num_batches=num_batches,
        progress=progress,
    )
    fingerprint = AnchorFingerprint(
        **{
            **description,
            **describe_origin(model, stack),
            **({"revision": revision} if revision is not None else {}),
            "width": collected.mean.shape[-1],
            "moments": moments,
            "mask_policy": MASK_POLICIES[tokens],
            "num_samples": collected.num_samples,
            "num_tokens": collected.num_tokens,
            "num_batches": collected.num_batches,
            "dataset_id": dataset_id,
            "subspace_options": subspaces,
            "format_version": 1 if subspaces is None else subspaces.format_version,
        }
    )
    found = None if linear_inputs is None else linear_inputs.subspaces(progress)
    sensitivities = None
    if subspaces is not None and subspaces.sensitivity:
        assert found is not None
        sensitivities = collect_sensitivities(
            model,
            batches,
            stack,
            found,
            subspaces,
            tokens=tokens,
            num_batches=num_batches,
            progress=progress,
        )
    return AnchorStatistics(collected.mean, collected.variance, fingerprint, found, sensitivities)
