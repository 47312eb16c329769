"""The training that a trainer is in, as shapes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.training.planning.held_shapes import HeldDirections, directions_of
from hf_aegis.training.planning.workload import ChangeableWorkload, tensors_like


if TYPE_CHECKING:
    from hf_aegis.training.aegis_trainer import AEGISTrainer


class TrainerWorkload(ChangeableWorkload):
    """
    A [`Workload`] of what a trainer trains. Batches are like the given one, with as many samples as are asked for;
    what a boolean mask selects is assumed to be all.

    Args:
        trainer ([`AEGISTrainer`]): Nothing of it is changed.
        batch (`dict[str, Tensor]`): The inputs of a training step, of which the shapes are looked at.
    """

    def __init__(self, trainer: "AEGISTrainer", batch: dict[str, Any]) -> None:
        self.args = trainer.args
        self.goes_back = False
        labels = batch.get("labels")
        self.selected = labels.numel() if isinstance(labels, Tensor) else 0
        self._trainer = trainer
        self._shapes = _shapes(batch)
        self._size = next(iter(self._shapes.values()))[0][0]
        replay = trainer.preservation.replay
        self._replayed = {} if replay is None else _shapes(replay[0])

    def model(self) -> nn.Module:
        return self._trainer.model

    def anchor(self) -> ActivationAnchor | None:
        return self._trainer.anchor

    def anchor_tensors(self) -> list[Tensor]:
        anchor = self._trainer.anchor
        return [] if anchor is None else tensors_like(anchor)

    def directions(self, model: nn.Module) -> list[HeldDirections]:
        assert self._trainer.anchor is not None
        return directions_of(self._trainer.anchor, self._trainer.model, self.args)

    def batch(self, size: int) -> dict[str, Tensor]:
        return self._like(self._shapes, size, self._size)

    def replayed(self, size: int) -> dict[str, Tensor]:
        return self._like(self._replayed, size, next(iter(self._replayed.values()))[0][0])

    def ask(self, model: nn.Module) -> None:
        """Questions are not asked while a step is under way."""

    @staticmethod
    def _like(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], size: int, of: int) -> dict[str, Tensor]:
        # Pictures may lie one after the other along the first dimension, several for a sample.
        return {
            name: torch.empty((shape[0] * size // of, *shape[1:]), dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }


def _shapes(batch: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(v.shape), v.dtype) for name, v in batch.items() if isinstance(v, Tensor)}
