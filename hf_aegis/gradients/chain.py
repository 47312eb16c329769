"""Whether decoder layers are a chain of hidden outputs, as the dual backward needs it."""

from collections.abc import Collection, Iterable

from hf_aegis.gradients.forward_pass import ForwardPass
from hf_aegis.gradients.graph import LayerLeakError
from hf_aegis.gradients.groups import LAYER_PREFIX, ParameterGroups


def check_sources(forward: ForwardPass, index: int, sources: Iterable[tuple[ForwardPass, int]]) -> None:
    """
    Refuses a layer that reads the output of an earlier run of the layers.

    Args:
        forward ([`ForwardPass`]): The forward pass under way.
        index (`int`): The layer.
        sources (`Iterable[tuple[ForwardPass, int]]`): Forward pass and layer of each output that it reads.

    Raises:
        LayerLeakError: If one of them belongs to another forward pass.
    """
    if any(source is not forward for source, _ in sources):
        raise LayerLeakError(
            f"decoder layer {index} reads what an earlier run of the decoder layers returned; a layer that runs "
            "twice in one forward pass has no single anchor"
        )


def check_chain(forward: ForwardPass, index: int, sources: Iterable[int]) -> None:
    """
    Refuses a layer that reads other layers' outputs than that of the layer below.

    Raises:
        LayerLeakError: If one of `sources`, the layers whose outputs it reads, is another.
    """
    lower = forward.below(index)
    foreign = sorted(other for other in sources if other != lower)
    if foreign:
        raise LayerLeakError(
            f'decoder layer {index} reads the output of layers {foreign} directly; use dual_backward="two_pass"'
        )


def check_parameters(forward: ForwardPass, index: int, names: Collection[str], groups: ParameterGroups) -> None:
    """
    Refuses a layer that depends on other parameters than its own by another way than the output of the layer below.

    Raises:
        LayerLeakError: If one of `names`, the parameters between the two outputs, is not the layer's own.
    """
    lower = forward.below(index)
    if lower is None:
        return  # the lowest layer's segment runs on into embeddings and projector
    own = f"{LAYER_PREFIX}{index}"
    leaks = [name for name in names if groups.group_of(name) != own]
    if leaks:
        raise LayerLeakError(
            f"decoder layer {index} depends on {leaks[0]} by another way than the output of layer {lower} "
            f'({len(leaks)} such parameters); use dual_backward="two_pass"'
        )
