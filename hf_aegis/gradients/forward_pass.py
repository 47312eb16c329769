"""What a shield remembers of a forward pass until its backward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from hf_aegis.gradients.data_parallel import LayerMoments
from hf_aegis.gradients.graph import LayerLeakError
from hf_aegis.gradients.reference import LayerPenalty


def hidden_output(output: Any) -> Tensor:
    """The hidden states of what a decoder layer returned."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(eq=False)
class ReferenceProduct:
    """
    A stretch of a layer's graph that the reference goes through at once, before the task does.

    Attributes:
        output (`GradientEdge`): Where it begins.
        parameters (`dict[str, Parameter]`): Trainable parameters that it uses.
        done (`bool`): Whether its reference gradients were computed.
    """

    output: GradientEdge
    parameters: dict[str, Parameter]
    done: bool = False


@dataclass(eq=False)
class LayerRecord:
    """
    One layer's output in one forward pass.

    Attributes:
        outlet (`GradientEdge`): The layer's output in the graph, from where the layer above reads it.
        products (`Sequence[ReferenceProduct]`): Between it and the output of the layer below, uppermost first.
        hidden (`Tensor` of shape `(B, T, D)`, *optional*): The output, for the two-pass form with its graph; dropped
            once it was used.
        version (`int`): The output's version, which changes where it is changed in place.
        moments ([`LayerMoments`]): Those of the output, in this process.
        mask (`Tensor` of shape `(B, T)`, *optional*): Which tokens count.
        rows (`int`, *optional*): The batch's first rows that `products`, `hidden`, `moments` and `mask` are of, where
            the reference does not go through all.
        penalty ([`LayerPenalty`], *optional*): The layer's share of the penalty, from when the backward pass comes.
        others ([`LayerMoments`], *optional*): The moments in all other processes, where there are any.
        cotangent (`Tensor`, *optional*): The reference on its way down, where the next product begins.
    """

    outlet: GradientEdge
    products: Sequence[ReferenceProduct]
    hidden: Tensor | None
    version: int
    moments: LayerMoments
    mask: Tensor | None
    rows: int | None = None
    penalty: LayerPenalty | None = None
    others: LayerMoments | None = None
    cotangent: Tensor | None = None

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Trainable parameters between it and the output of the layer below."""
        return {name: p for product in self.products for name, p in product.parameters.items()}

    @property
    def entered(self) -> bool:
        """Whether a backward pass has come to the layer."""
        return self.products[0].done

    def take_hidden(self, index: int) -> Tensor:
        """
        The output that the penalty of this layer, number `index`, is differentiated at; the record lets go of it.

        Raises:
            LayerLeakError: If the output was changed in place since.
        """
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        if hidden._version != self.version:
            raise LayerLeakError(
                f"the output of decoder layer {index} was changed in place after the layer; "
                "its statistics no longer describe it"
            )
        return hidden


@dataclass(eq=False)
class ForwardPass:
    """The layer outputs of one forward pass."""

    layers: dict[int, LayerRecord] = field(default_factory=dict)

    def below(self, index: int) -> int | None:
        """The next recorded layer below layer `index`, if there is one."""
        return max((other for other in self.layers if other < index), default=None)

    def skip(self) -> None:
        """Has it that no reference is to go through the layers."""
        for record in self.layers.values():
            record.hidden = None
            for product in record.products:
                product.done = True

    def products_from_above(self) -> Iterator[tuple[int, int]]:
        """Layer and number of each product, in the order in which the reference goes through them."""
        for index in sorted(self.layers, reverse=True):
            for number in range(len(self.layers[index].products)):
                yield index, number

    @property
    def entered(self) -> bool:
        """Whether a backward pass has come to any of its layers."""
        return any(record.entered for record in self.layers.values())
