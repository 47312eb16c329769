"""Steps whose gradients are not finite: dropped, counted, and the end of a training after too many in a row."""

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_aegis.gradients import as_whole, local_part
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.checkpoints import how_to_go_on
from hf_aegis.training.resumable import ResumableCallback
from hf_aegis.training.training_ended import TrainingEndedError


class NonFiniteTrainingError(TrainingEndedError, ArithmeticError):
    """A training was ended after many steps in a row without finite gradients; the message says what may be wrong."""


class NonFiniteGuard(ResumableCallback):
    """
    Drops all gradients of a step in which any is not finite, so that no NaN reaches a parameter or an optimiser's
    moments. In `fp16` it leaves that to the gradient scaler, which skips the step and has to see why.

    After `max_skipped_steps` of them in a row it ends the training with a [`NonFiniteTrainingError`].

    Attributes:
        skipped_steps (`int`):
            Steps that changed nothing: those dropped here or by the scaler, and those that had no gradient at all.
        skipped_in_a_row (`int`): The last of them, since a step that changed something or since the training began.
    """

    initial: ClassVar = {"skipped_steps": 0}
    skipped_steps: int

    def __init__(self) -> None:
        super().__init__()
        self.skipped_in_a_row = 0
        self._had_gradients = True

    def on_train_begin(  # type: ignore[override]
        self, args: AEGISConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.skipped_in_a_row = 0

    def on_pre_optimizer_step(  # type: ignore[override]
        self, args: AEGISConfig, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if args.fp16:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # Of gradients that are spread over processes the whole norm: all of them drop a step, or none does.
        skipped = not gradients or not math.isfinite(float(as_whole(torch.nn.utils.get_total_norm(gradients))))
        self._had_gradients = bool(gradients)
        if skipped:
            for parameter in model.parameters():
                parameter.grad = None
        self._count(skipped, args, state, model)

    def on_optimizer_step(  # type: ignore[override]
        self,
        args: AEGISConfig,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.fp16:
            self._count(optimizer.step_was_skipped, args, state, model)

    def _count(self, skipped: bool, args: AEGISConfig, state: TrainerState, model: nn.Module) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_steps += skipped
        if args.max_skipped_steps and self.skipped_in_a_row == args.max_skipped_steps:
            raise NonFiniteTrainingError(self._explain(args, state, model))

    def _explain(self, args: AEGISConfig, state: TrainerState, model: nn.Module) -> str:
        broken = (name for name, p in model.named_parameters() if not torch.isfinite(local_part(p.detach())).all())
        if weight := next(broken, None):
            cause = f"The weights themselves are not finite any more, first {weight}: go back to an earlier checkpoint"
        elif not self._had_gradients:
            cause = "There were no gradients at all: is anything left to train, and does the loss depend on it?"
        else:
            cause = (
                "Their gradients were not finite; the weights are, and were not changed by them. Likely are a "
                f"learning rate that is too high (learning_rate={args.learning_rate:g}, expert_learning_rate="
                f"{args.expert_learning_rate}), a sample that is not finite, or an overflow that float32 would avoid"
            )
        return (
            f"{self.skipped_in_a_row} steps in a row, up to step {state.global_step + 1}, changed nothing "
            f"(max_skipped_steps={args.max_skipped_steps}). {cause}. {how_to_go_on(str(args.output_dir))}"
        )
