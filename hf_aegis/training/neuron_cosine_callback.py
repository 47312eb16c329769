"""The histogram of cosines between each neuron's task and reference gradient over a training."""

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_aegis.atomic_files import write_text
from hf_aegis.gradients import GradientShield, NeuronCosines
from hf_aegis.training.resumable import ResumableCallback


NEURON_COSINES_FILE = "neuron_cosines.json"


class NeuronCosineCallback(ResumableCallback):
    """
    Observes the gradients of every so many steps and writes their cosines to `neuron_cosines.json`.

    Args:
        shield ([`GradientShield`]): Sees both gradients.
        output_dir (`str`): Where the file goes.
        steps (`int`): Steps between observations; the first step is observed.
    """

    initial: ClassVar = {"observed_steps": [], "histogram": None}
    observed_steps: list[int]
    histogram: dict[str, Any] | None

    def __init__(self, shield: GradientShield, output_dir: str, steps: int) -> None:
        super().__init__()
        self.shield = shield
        self.path = Path(output_dir) / NEURON_COSINES_FILE
        self.steps = steps
        self.cosines = NeuronCosines()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        try:
            self.cosines.load({"counts": {}} if self.histogram is None else self.histogram)
        except ValueError as error:
            where = f"{TRAINER_STATE_NAME} of the checkpoint of step {state.global_step}, {type(self).__name__}"
            raise ValueError(f"{where}: key 'histogram': {error}") from error

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.shield.observer = self.cosines.observe if state.global_step % self.steps == 0 else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.shield.observer is None:
            return
        self.shield.observer = None
        # New objects: a checkpoint under way may hold the old ones.
        self.observed_steps = [*self.observed_steps, state.global_step]
        self.histogram = self.cosines.to_dict()
        if state.is_world_process_zero:
            write_text(self.path, json.dumps({**self.histogram, "steps": self.observed_steps}))
