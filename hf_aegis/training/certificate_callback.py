"""Measures beside a training loop how far the model has gone from the pre-trained one on anchored inputs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_aegis.gradients import Certificate
from hf_aegis.training.json_lines import JSONLines


CERTIFICATE_FILE = "certificate.jsonl"


class CertificateCallback(TrainerCallback):
    """
    Writes reports of a [`Certificate`] to `certificate.jsonl`, and logs the largest deviation of a layer, that of the
    logits, and the divergence of the predicted distributions.

    Args:
        certificate ([`Certificate`]): Made before training.
        output_dir (`str`): Where the file goes.
        steps (`int`): Steps between measurements; 0 for the end alone. The end of training is always measured.
        log (`Callable`): Of the trainer.
    """

    def __init__(
        self, certificate: Certificate, output_dir: str, steps: int, log: Callable[[dict[str, float]], None]
    ) -> None:
        self.certificate = certificate
        self.lines = JSONLines(Path(output_dir) / CERTIFICATE_FILE)
        self.steps = steps
        self.log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.lines.rewind(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps and state.global_step % self.steps == 0:
            self._measure(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Also where this step has been measured: the weights may be those of the best checkpoint since.
        if state.is_world_process_zero:
            self.lines.rewind(max(0, state.global_step - 1))
        self._measure(state)

    def _measure(self, state: TrainerState) -> None:
        report = self.certificate.measure().to_dict()
        if state.is_world_process_zero:
            self.lines.append([{"step": state.global_step, **report}])
        self.log(certificate_figures(report))


def certificate_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The largest deviation of a layer, that of the logits, and the divergence, of a report as it is written."""
    figures = {"layers": max(report["layers"].values())} | {name: report[name] for name in ("logits", "divergence")}
    return {f"certificate_{name}": value for name, value in figures.items() if value is not None}
