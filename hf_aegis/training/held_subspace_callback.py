"""Restores the held subspaces beside a training loop."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_aegis.gradients import HeldSubspace, reshard
from hf_aegis.training.aegis_config import AEGISConfig


class HeldSubspaceCallback(TrainerCallback):
    """
    Restores a [`HeldSubspace`] after every so many optimiser steps, whichever optimiser it is, and besides before the
    weights are saved or measured and when training ends. Steps are counted over the whole training, so that a resumed
    one goes on as it would have.

    Args:
        held ([`HeldSubspace`]): What is restored.
        steps (`int`): Optimiser steps between restorations.
    """

    def __init__(self, held: HeldSubspace, steps: int) -> None:
        self.held = held
        self.steps = steps

    def _restore(self, model: nn.Module) -> None:
        reshard(model)  # an evaluation may have come before
        self.held.restore()

    def on_optimizer_step(  # type: ignore[override]
        self, args: AEGISConfig, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # The step under way is counted when it has ended.
        if (state.global_step + 1) % self.steps == 0:
            self._restore(model)

    def on_step_end(  # type: ignore[override]
        self, args: AEGISConfig, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        measured = any(steps and state.global_step % steps == 0 for steps in (args.vqa_steps, args.certificate_steps))
        if self.steps > 1 and (measured or control.should_save or control.should_evaluate):
            self._restore(model)

    def on_train_end(  # type: ignore[override]
        self, args: AEGISConfig, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.steps > 1:
            self._restore(model)
