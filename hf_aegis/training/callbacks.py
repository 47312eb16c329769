"""What runs beside a training loop: diagnostics, metrics on disk, VQA evaluation, the expert's average."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_aegis.gradients import ProjectionReport
from hf_aegis.training.expert_ema import ExpertEMA
from hf_aegis.training.json_lines import METRICS_FILE, PROJECTION_FILE, JSONLines
from hf_aegis.training.non_finite_guard import NonFiniteGuard


if TYPE_CHECKING:
    from hf_aegis.evaluation.vqa import VQAHoldout

logger = logging.getLogger(__name__)


def mean_summary(summaries: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Means over [`ProjectionReport.summary`] of several reports; passes over those that are not finite or empty."""
    whole = [s for s in summaries if s and all(v is not None and math.isfinite(v) for v in s.values())]
    return {name: math.fsum(s[name] or 0.0 for s in whole) / len(whole) for name in whole[0]} if whole else {}


class MetricsCallback(TrainerCallback):
    """Writes everything that is logged to `metrics.jsonl` in the output folder."""

    def __init__(self, output_dir: str) -> None:
        self.lines = JSONLines(Path(output_dir) / METRICS_FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.lines.rewind(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            self.lines.append([{"step": state.global_step, **logs}])


class ProjectionCallback(TrainerCallback):
    """
    Collects the report of every projected backward pass: means since the last logging step go into the logs, every
    single one as a JSON line into `projection.jsonl`, its totals under `summary`. Reports are read from the device
    when they are logged. One that is not finite is written as it is, and left out of the means. Of several processes
    the main one writes.
    """

    def __init__(self, output_dir: str) -> None:
        self.lines = JSONLines(Path(output_dir) / PROJECTION_FILE)
        self._unread: list[tuple[int, ProjectionReport]] = []
        self._summaries: list[dict[str, float]] = []
        self._unprotected: set[int] = set()
        self._writes = True

    @property
    def unprotected_steps(self) -> int:
        """
        Steps with a backward pass in which a group had a finite task gradient but no finite reference gradient, so
        that nothing was kept there. Counted over all of `projection.jsonl`, in a resumed run too.
        """
        return len(self._unprotected)

    def add(self, step: int, report: ProjectionReport) -> None:
        """Notes the report of a backward pass that belongs to optimiser step `step`, counted from one."""
        self._unread.append((step, report))

    def flush(self) -> None:
        """Reads the new reports off the device and writes them."""
        records = [{"step": step, **report.per_group(), "summary": report.summary()} for step, report in self._unread]
        self._summaries += [record["summary"] for record in records]
        if self._writes:
            self.lines.append(records)
        self._unread.clear()
        known = self.unprotected_steps
        self._unprotected.update(record["step"] for record in records if _is_unprotected(record))
        if not known and self._unprotected:
            logger.warning(
                "the reference gradient of step %d is not finite, so the task gradient of such groups stays as it is; "
                "further ones are counted as unprotected_steps",
                min(self._unprotected),
            )

    def means(self) -> dict[str, float]:
        """Means of the figures of all finite reports since the last call; empty where there is none."""
        self.flush()
        summaries, self._summaries = self._summaries, []
        return mean_summary(summaries)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # What a training that failed left behind.
        self._unread.clear()
        self._summaries.clear()
        self._unprotected.clear()
        self._writes = state.is_world_process_zero
        if self._writes:
            self.lines.rewind(state.global_step)
            self._unprotected.update(record["step"] for record in self.lines.read() if _is_unprotected(record))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.flush()


def _is_unprotected(record: Mapping[str, Any]) -> bool:
    """Whether a line of `projection.jsonl`, read or yet to be written, tells of a reference that was not finite."""
    norms = zip(record["task_norm"], record["reference_norm"], strict=True)
    return any(_is_finite(task) and not _is_finite(reference) for task, reference in norms)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


class VQACallback(TrainerCallback):
    """
    Evaluates on a fixed hold-out before training, every `steps` steps and after the last one.

    Args:
        holdout ([`~evaluation.vqa.VQAHoldout`]): Questions, preprocessed once. Each process asks all of them.
        steps (`int`): Steps between evaluations.
        accuracy (`bool`): Whether answers are generated too.
        log (`Callable`): Takes the figures: `vqa_cross_entropy`, `vqa_accuracy`.
        answering (`torch.nn.Module`, *optional*): What is asked, where that is not the trained model itself.
        evaluating (`Callable`, *optional*): Gives a context for each evaluation.
    """

    def __init__(
        self,
        holdout: "VQAHoldout",
        steps: int,
        accuracy: bool,
        log: Callable[[dict[str, float]], None],
        answering: torch.nn.Module | None = None,
        evaluating: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.holdout = holdout
        self.steps = steps
        self.accuracy = accuracy
        self.log = log
        self.answering = answering
        self.evaluating = evaluating

    def _evaluate(self, model: torch.nn.Module) -> None:
        model = model if self.answering is None else self.answering
        with self.evaluating():
            result = self.holdout.evaluate(model) if self.accuracy else self.holdout.evaluate_cross_entropy(model)
        figures = {"vqa_cross_entropy": result.cross_entropy, "vqa_accuracy": result.accuracy}
        self.log({name: value for name, value in figures.items() if value is not None})

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step == 0:
            self._evaluate(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.steps == 0 or control.should_training_stop:
            # Logging marks the step as logged, and its loss would never be.
            should_log = control.should_log
            self._evaluate(model)
            control.should_log = should_log


class ExpertEMACallback(TrainerCallback):
    """Updates the expert's average after each optimiser step that was not dropped."""

    def __init__(self, ema: ExpertEMA, guard: NonFiniteGuard) -> None:
        self.ema = ema
        self.guard = guard

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard.skipped_in_a_row == 0:
            self.ema.update()


class LogAtSaves(TrainerCallback):
    """
    Logs whenever a checkpoint is saved. What was not logged yet, the sum of losses and the projection's figures since
    the last logging step, is in no checkpoint; so none is saved while there is any.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Whether an evaluation was the best so far is known only after the logging.
        may_save = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        control.should_log = control.should_log or control.should_save or may_save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)


class ProcessSeeds(TrainerCallback):
    """
    Gives each process random numbers of its own: the Trainer seeds all alike, so that samples in different processes
    would get the same noise and times. The main process's are those of a training in one process.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed training reads the states of its checkpoint's processes later.
        if args.process_index > 0:
            torch.manual_seed(args.seed + args.process_index)
