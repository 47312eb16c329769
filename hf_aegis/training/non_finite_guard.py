"""Steps that are not finite: dropped, counted, and the end of a training after too many, or with broken weights."""

from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerControl, TrainerState

from hf_aegis.gradients import as_whole, local_part
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.checkpoints import how_to_go_on
from hf_aegis.training.expert_parameters import without_wrappers
from hf_aegis.training.resumable import ResumableCallback
from hf_aegis.training.training_ended import TrainingEndedError


class NonFiniteTrainingError(TrainingEndedError, ArithmeticError):
    """
    A training was ended because its weights are not finite any more, or after many steps in a row whose loss or
    gradients were not; the message says what may be wrong, and names the last checkpoint with finite weights.
    """


class NonFiniteGuard(ResumableCallback):
    """
    Drops all gradients of a step in which any is not finite, or whose loss is not, in whichever process: no NaN
    reaches a parameter or an optimiser's moments. In `fp16` it leaves that to the gradient scaler, which skips the
    step, has to see why, and looks at gradients alone. The schedule of learning rates goes on over a step that is
    dropped here, and waits where the scaler skips one.

    After `max_skipped_steps` of them in a row it ends the training with a [`NonFiniteTrainingError`]; at once, where
    the weights are not finite, as then no step can be any more.

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
        self._loss: Tensor | None = None

    def see_loss(self, loss: Tensor) -> None:
        """Notes a micro-batch's loss, on its device, for the step that it belongs to."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def check_weights(self, args: AEGISConfig, state: TrainerState, model: nn.Module) -> None:
        """
        Looks through a model's weights. All processes have to call it, and find the same.

        Raises:
            NonFiniteTrainingError: If any weight is not finite.
        """
        named = list(model.named_parameters())
        finite = [torch.isfinite(local_part(p.detach())).all().to(args.device) for _, p in named]
        broken = (~_in_all_processes(torch.stack(finite), args)).nonzero()
        if len(broken):
            left = how_to_go_on(str(args.output_dir), finite=True)
            raise NonFiniteTrainingError(
                f"The weights are not finite any more after step {state.global_step}, first "
                f"{without_wrappers(named[int(broken[0])][0])}: no step can change that, and they are not saved. "
                f"Likely are {_rates(args)}, or what else changes weights. {left}"
            )

    def on_train_begin(  # type: ignore[override]
        self, args: AEGISConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.skipped_in_a_row = 0
        self._loss = None

    def on_pre_optimizer_step(  # type: ignore[override]
        self, args: AEGISConfig, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        loss, self._loss = self._loss, None
        if args.fp16:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self._had_gradients = bool(gradients)
        finite = torch.tensor(bool(gradients), device=args.device)
        if gradients:
            finite = torch.isfinite(as_whole(torch.nn.utils.get_total_norm(gradients))).to(args.device)
        if loss is not None:
            finite = finite & torch.isfinite(loss)
        # The gradients are those of all processes, but each has a loss of its own.
        skipped = not _in_all_processes(finite, args)
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
        if skipped:
            self.check_weights(args, state, model)
        if args.max_skipped_steps and self.skipped_in_a_row == args.max_skipped_steps:
            raise NonFiniteTrainingError(self._explain(args, state))

    def _explain(self, args: AEGISConfig, state: TrainerState) -> str:
        if not self._had_gradients:
            cause = "There were no gradients at all: is anything left to train, and does the loss depend on it?"
        else:
            cause = (
                "Their loss or gradients were not finite; the weights are, and were not changed by them. Likely are "
                f"{_rates(args)}, a sample that is not finite, or an overflow that float32 would avoid"
            )
        return (
            f"{self.skipped_in_a_row} steps in a row, up to step {state.global_step + 1}, changed nothing "
            f"(max_skipped_steps={args.max_skipped_steps}). {cause}. {how_to_go_on(str(args.output_dir), finite=True)}"
        )


def _in_all_processes(finite: Tensor, args: AEGISConfig) -> Tensor:
    """Flags that hold in each process, so that all decide alike."""
    if args.world_size == 1:
        return finite
    flags = finite.to(torch.int32)
    distributed.all_reduce(flags, distributed.ReduceOp.MIN)
    return flags.bool()


def _rates(args: AEGISConfig) -> str:
    return (
        f"a learning rate that is too high (learning_rate={args.learning_rate:g}, "
        f"expert_learning_rate={args.expert_learning_rate})"
    )
