"""What a training says when it runs out of memory."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hf_aegis.training.training_ended import TrainingEndedError


if TYPE_CHECKING:
    from hf_aegis.training.aegis_trainer import AEGISTrainer

# What PyTorch's allocators of the host say.
_ON_HOST = ("can't allocate memory", "not enough memory")
# What helps in any case, where the planner cannot say by how much.
_IN_GENERAL = "A smaller per_device_train_batch_size with more gradient_accumulation_steps, activation_checkpointing{}"


class TrainingOutOfMemoryError(TrainingEndedError, torch.OutOfMemoryError):
    """Training ran out of memory; the message says which options would lower its peak, and by how much."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    # What Python and NumPy say is their `MemoryError`.
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ON_HOST)


@contextlib.contextmanager
def advising(trainer: "AEGISTrainer") -> Iterator[None]:
    """
    A block that trains, whose error says what would help if it runs out of memory.

    Raises:
        TrainingOutOfMemoryError: In the place of the error that was raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # The Trainer tries smaller batches by itself where it is asked to.
        if not is_out_of_memory(error) or trainer.args.auto_find_batch_size:
            raise
        # Python's own has no text.
        said = str(error) or type(error).__name__
        raise TrainingOutOfMemoryError(f"{said}\n{advice_for(trainer)}") from error


def advice_for(trainer: "AEGISTrainer") -> str:
    """What the planner has to say of a trainer's step, in lines."""
    from hf_aegis.training.planning.advice import advise
    from hf_aegis.training.planning.rehearsal import rehearse
    from hf_aegis.training.planning.report import advice_lines, size
    from hf_aegis.training.planning.trainer_workload import TrainerWorkload

    if trainer.is_fsdp_enabled:
        general = _IN_GENERAL.format(", or more processes lower it.")
        return f"The planner does not know what a process takes under FSDP. {general}"
    if trainer.last_inputs is None:
        return "It was before the first step: the model, what is kept beside it, and the first batch do not fit."
    device = "cuda" if trainer.args.device.type != "cpu" else "cpu"
    try:
        workload: Any = TrainerWorkload(trainer, trainer.last_inputs)
        plan = rehearse(workload, device, evaluates=False)
        lines = advice_lines(advise(workload, plan, device, evaluates=False))
    except Exception as error:
        # What went wrong is the missing memory, and the planner must not hide it.
        general = _IN_GENERAL.format(" or, on the host, a lower dataloader_num_workers take less.")
        return f"The planner cannot say by how much it would help: {type(error).__name__}: {error}\n{general}"
    most, phase = size(plan.peak.bytes), plan.peak.phase
    items = ", ".join(f"{name} {size(count)}" for name, count in plan.peak.items.items())
    return "\n".join([f"By the planner's estimate a step takes {most}, in the phase {phase!r}: {items}.", *lines])
