"""What the dual backward has to know of the decoder layers, read while they run forward."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from hf_aegis.gradients.chain import check_chain, check_parameters, check_sources
from hf_aegis.gradients.data_parallel import LayerMoments
from hf_aegis.gradients.forward_pass import ForwardPass, LayerRecord, ReferenceProduct, hidden_output
from hf_aegis.gradients.graph import GraphPiece, LayerLeakError, split_at_bottlenecks, walk_segment
from hf_aegis.gradients.groups import ParameterGroups
from hf_aegis.gradients.layer_entry import LayerEntry, in_backward
from hf_aegis.gradients.reference import refuse_float16
from hf_aegis.gradients.row_split import RowSplit
from hf_aegis.gradients.token_mask import TokenMask


if TYPE_CHECKING:
    from hf_aegis.gradients.shield import GradientShield


class PassRecorder:
    """
    Notes each layer's output, its statistics, and which nodes and parameters are between it and the layer below.

    Args:
        layers (`Iterable[torch.nn.Module]`): The decoder layers, lowest first.
        token_mask ([`TokenMask`]): Says which tokens count.
        streaming (`bool`):
            Whether the reference is to go through the layers one by one, which therefore have to be a chain. If not,
            outputs are kept with their graph.
        split ([`RowSplit`]): Has the part of each layer's output that the reference is to be of, where it is a part.

    Attributes:
        passes (`list[ForwardPass]`): The forward passes whose backward pass has not been.
    """

    def __init__(self, layers: Iterable[nn.Module], token_mask: TokenMask, streaming: bool, split: RowSplit) -> None:
        self.layers = layers
        self.token_mask = token_mask
        self.streaming = streaming
        self.split = split
        self.passes: list[ForwardPass] = []
        self._outputs: dict[Node, tuple[ForwardPass, int]] = {}

    def follow(
        self, shield: "GradientShield", groups: ParameterGroups, before_pass: Callable[[], None]
    ) -> list[RemovableHandle]:
        """
        Hooks the layers; the caller removes the hooks.

        Args:
            shield ([`GradientShield`]): What the graph calls when a backward pass comes to a layer.
            groups ([`ParameterGroups`]): Of the parameters that train.
            before_pass (`Callable[[], None]`): Called before a forward pass is recorded.
        """
        handles = self.token_mask.follow()
        for index, layer in enumerate(self.layers):
            note = partial(self._on_layer_output, shield, groups, before_pass, index)
            handles.append(layer.register_forward_hook(note))
        return handles

    def forget(self, passes: Sequence[ForwardPass]) -> None:
        """Lets go of these passes, and of those without a layer."""
        self.passes = [forward for forward in self.passes if forward.layers and forward not in passes]
        self._outputs = {node: source for node, source in self._outputs.items() if source[0] not in passes}

    def clear(self) -> None:
        """Lets go of all passes."""
        self.passes.clear()
        self._outputs.clear()

    def _on_layer_output(
        self,
        shield: "GradientShield",
        groups: ParameterGroups,
        before_pass: Callable[[], None],
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> None:
        if not torch.is_grad_enabled():
            return
        hidden = hidden_output(output)
        part = self.split.first.pop(index, None)
        if in_backward():
            if self.passes:
                return  # the model's own checkpointing recomputes what was recorded
            raise LayerLeakError(
                "decoder layers ran without gradients and are recomputed within the backward pass, where their graph "
                'cannot be read: pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if index == 0 or not self.passes:
            before_pass()
            self.passes.append(ForwardPass())
        if not hidden.requires_grad:
            return  # nothing below this output trains
        refuse_float16(index, hidden)
        forward = self.passes[-1]
        if index in forward.layers:
            raise LayerLeakError(f"decoder layer {index} ran twice in one forward pass, which has no single anchor")
        outlet = get_gradient_edge(hidden)
        pieces = self._read_graph(forward, index, hidden if part is None else part, groups)
        forward.layers[index] = self._record(outlet, hidden, part, pieces)
        self._outputs[outlet.node] = (forward, index)
        for number, piece in enumerate(pieces):
            entry = LayerEntry(shield, forward, index, number)
            for node in piece.nodes:
                node.register_prehook(entry)

    def _read_graph(
        self, forward: ForwardPass, index: int, hidden: Tensor, groups: ParameterGroups
    ) -> list[GraphPiece]:
        edge = get_gradient_edge(hidden)
        segment = walk_segment(edge, self._outputs, groups.names)
        sources = [self._outputs[node] for node in segment.boundaries]
        check_sources(forward, index, sources)
        if self.streaming:
            check_chain(forward, index, [source for _, source in sources])
            check_parameters(forward, index, segment.parameters, groups)
        groups.note_reached(segment.parameters)
        if self.streaming:
            return split_at_bottlenecks(edge, segment, groups.names)
        return [GraphPiece(edge, segment.nodes, segment.parameters)]

    def _record(
        self, outlet: GradientEdge, hidden: Tensor, part: Tensor | None, pieces: Sequence[GraphPiece]
    ) -> LayerRecord:
        mask = self.token_mask.current()
        rows = None if part is None else len(part)
        detached = hidden.detach() if rows is None else hidden.detach()[:rows]
        mask = None if mask is None else mask[:rows]
        with torch.no_grad():
            moments = LayerMoments.of(detached, mask)
        return LayerRecord(
            outlet=outlet,
            products=[ReferenceProduct(piece.output, piece.parameters) for piece in pieces],
            hidden=detached if self.streaming else hidden,
            version=detached._version,
            moments=moments,
            mask=mask,
            rows=rows,
        )
