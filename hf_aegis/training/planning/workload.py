"""What is planned: a model, batches and an anchor, as shapes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.planning.held_shapes import HeldDirections, HeldShapes
from hf_aegis.training.preservation import Preservation


class Workload(Protocol):
    """
    A training whose steps can be gone through with shapes alone. Its methods are called where tensors have no values,
    but for `model`, `anchor` and `directions`.

    Attributes:
        args ([`AEGISConfig`]): Of the training.
        dtype (`torch.dtype`, *optional*): What the model's parameters are cast to, if not to stay as they are.
        goes_back (`bool`): Whether a copy of the pre-trained weights is kept, to go back to.
    """

    args: AEGISConfig
    goes_back: bool
    dtype: torch.dtype | None

    @property
    def selected(self) -> int:
        """How many labelled tokens a training batch has."""
        ...

    def model(self) -> nn.Module:
        """What is trained; it may be on the meta device."""
        ...

    def anchor(self) -> ActivationAnchor | None:
        """An anchor of the model's shape, with moments at least; made before, for its values are read then."""
        ...

    def anchor_tensors(self) -> list[Tensor]:
        """All that the anchor holds, on the host."""
        ...

    def directions(self, model: nn.Module) -> list[HeldDirections]:
        """What is held."""
        ...

    def batch(self, size: int) -> dict[str, Tensor]:
        """Forward arguments of so many samples."""
        ...

    def replayed(self, size: int) -> dict[str, Tensor]:
        """The same of so many replayed samples, with labels."""
        ...

    def ask(self, model: nn.Module) -> None:
        """Evaluates the model on a batch of questions, if the training has any."""
        ...


class ChangeableWorkload:
    """The part of a [`Workload`] that can be had with other arguments."""

    args: AEGISConfig
    dtype: torch.dtype | None = None

    def changed(self, args: dict[str, Any], cast: torch.dtype | None = None) -> Self:
        """The same with other fields of its arguments, or with its weights in another dtype."""
        changed = copy.copy(self)
        changed.args = copy.copy(self.args)
        for name, value in args.items():
            setattr(changed.args, name, value)
        changed.dtype = cast
        return changed


def tensors_like(anchor: ActivationAnchor) -> list[Tensor]:
    """Tensors of the shapes of all that an anchor holds, without its values."""
    held = [t for s in anchor.subspaces.values() for t in (s.basis, s.energies)]
    held += [t for s in anchor.sensitivities.values() for t in (s.output_basis, s.sensitivities)]
    return [torch.empty(t.shape, dtype=t.dtype) for t in (anchor.mean, anchor.variance, *held)]


class PlannedPreservation(Preservation):
    """[`Preservation`] of a [`Workload`]."""

    def __init__(
        self,
        model: nn.Module,
        args: AEGISConfig,
        workload: Workload,
        replay_loss: Callable[[Any], Tensor],
        kept: Callable[[], Mapping[str, nn.Parameter]],
    ) -> None:
        self._workload = workload
        anchor = workload.anchor() if args.needs_anchor else None
        replay: Any = _Replayed(workload) if args.needs_replay else None
        super().__init__(model, args, anchor, replay, replay_loss, kept)

    def _hold(self, model: nn.Module, args: AEGISConfig, anchor: ActivationAnchor | None) -> Any:
        return HeldShapes(model, args, self._workload.directions(model))


class _Replayed:
    """Stands for [`ReplayBatches`]."""

    def __init__(self, workload: Workload) -> None:
        args = workload.args
        self.size = args.replay_batch_size or args.per_device_train_batch_size
        self.dataset = range(2**20)
        self._replayed = workload.replayed

    def collator(self, samples: list[Any]) -> dict[str, Tensor]:
        return self._replayed(len(samples))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self._replayed(self.size)
