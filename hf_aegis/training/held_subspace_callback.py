"""Restores the held subspaces beside a training loop."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_aegis.gradients import HeldSubspace


class HeldSubspaceCallback(TrainerCallback):
    """
    Calls a [`HeldSubspace`] after each optimiser step, whichever optimiser it is, and restores the subspaces when
    training ends, even if the last step was not one of those after which they are.
    """

    def __init__(self, held: HeldSubspace) -> None:
        self.held = held

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.held()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.held.every > 1:
            self.held.restore()
