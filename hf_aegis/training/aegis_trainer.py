"""A Trainer whose task gradients pass through the shield."""

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.anchors.decoder_layers import unwrap_model
from hf_aegis.gradients import GradientShield
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.callbacks import (
    ExpertEMACallback,
    LogAtSaves,
    MetricsCallback,
    NonFiniteGuard,
    ProjectionCallback,
    VQACallback,
)
from hf_aegis.training.checkpoints import last_complete_checkpoint, load_weights
from hf_aegis.training.expert_ema import ExpertEMA
from hf_aegis.training.expert_parameters import expert_modules, expert_parameters
from hf_aegis.training.unsupported import refuse_cut_gradient, refuse_unsupported


if TYPE_CHECKING:
    from hf_aegis.evaluation.vqa import VQAHoldout

DEFAULT_FROZEN = "vision_tower"


class AEGISTrainer(Trainer):
    """
    Fine-tunes a model while its decoder layers keep the activation statistics of an anchor (arXiv 2604.16067).

    It works on [`PaliGemmaFlowForAction`], on transformers' π0, and on any causal language model with its own loss.
    π0's anchor is collected from π0 itself, `ActivationAnchor.collect(pi0, batches)`; it trains without activation
    checkpointing, which would cut its vision-language model off.
    Gradient accumulation projects each micro-batch by itself. Training with `args.preserve="none"` is that of a plain
    `Trainer`.

    Besides the Trainer's logs, the output folder gets `metrics.jsonl` with all that is logged, and `projection.jsonl`
    with each backward pass's figures group by group. Each checkpoint is preceded by a log, whatever `logging_steps`
    is, so that a run resumed from it logs what an uninterrupted one does.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to fine-tune, with the weights that the anchor describes.
        args ([`AEGISConfig`]):
            The arguments.
        anchor ([`ActivationAnchor`], *optional*):
            Statistics of the pre-trained model; needed unless `args.preserve="none"`.
        vqa_holdout ([`~evaluation.vqa.VQAHoldout`], *optional*):
            Questions to evaluate before, during and after training.
        data_collator (`Callable`, *optional*):
            As in the Trainer. By default, for a [`PaliGemmaFlowForAction`], made from the processor; the processor in
            turn, where none is given, from the model's own checkpoint and the statistics of `train_dataset`.
        kwargs: All other arguments of the Trainer.

    Raises:
        ValueError: If the anchor is missing, describes another model, or the arguments ask for a way of training in
            which the projection would not be right.
    """

    args: AEGISConfig
    model: nn.Module
    _tag_names = ("aegis", "vla", "robotics")

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: AEGISConfig,
        anchor: ActivationAnchor | None = None,
        vqa_holdout: "VQAHoldout | None" = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Dataset | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unsupported(model, args)
        refuse_cut_gradient(model, args)
        if args.preserve != "none" and anchor is None:
            raise ValueError(f'preserve={args.preserve!r} needs an anchor; pass one, or preserve="none"')
        expert_modules(model, args.expert_modules)
        if data_collator is None:
            processing_class, data_collator = _action_collator(model, processing_class, train_dataset)
        if anchor is not None and args.preserve != "none":
            anchor.check_compatible(model, layers=args.decoder_layers)
        # The first thing that changes the model, after all that may refuse it.
        _freeze(model, args.frozen_modules)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        assert args.output_dir is not None
        if args.label_names is None and hasattr(model, "sample_actions"):
            self.label_names = ["actions"]
        self.anchor = anchor
        self.shield: GradientShield | None = None
        self._projection: ProjectionCallback | None = None
        if args.preserve == "projection":
            assert anchor is not None
            self.shield = GradientShield(
                self.model,
                anchor,
                dual_backward=args.dual_backward,  # type: ignore[arg-type]
                granularity=args.granularity,  # type: ignore[arg-type]
                penalty_scale=args.penalty_scale,
                projection_eps=args.projection_eps,
                layers=args.decoder_layers,
                # The guard below drops the whole step, and has to see why.
                drop_non_finite=False,
            )
            self._projection = ProjectionCallback(args.output_dir)
            self.add_callback(self._projection)
        self.add_callback(NonFiniteGuard())
        self._expert = expert_parameters(self.model, args.expert_modules)
        self.ema: ExpertEMA | None = None
        if self._expert and args.expert_ema_decay > 0:
            if args.load_best_model_at_end and args.save_only_model:
                raise ValueError(
                    "load_best_model_at_end needs the expert average of the best checkpoint, which save_only_model "
                    "does not save: set one of them to False, or expert_ema_decay=0"
                )
            self.ema = ExpertEMA(self._expert, args.expert_ema_decay)
            self.add_callback(ExpertEMACallback(self.ema))
        self.add_callback(MetricsCallback(args.output_dir))
        self.add_callback(LogAtSaves())
        if vqa_holdout is not None:
            self.add_callback(VQACallback(vqa_holdout, args.vqa_steps, args.vqa_accuracy, self.log))

    @property
    def non_finite_guard(self) -> NonFiniteGuard:
        """What drops and counts steps. The Trainer may replace its callbacks when it resumes."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, NonFiniteGuard))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's own step, inside the shield."""
        if self.shield is None or self._projection is None:
            return super().training_step(model, inputs, num_items_in_batch)
        with self.shield:
            loss = super().training_step(model, inputs, num_items_in_batch)
        report = self.shield.report
        if report is None or report.mean_term.numel() == 0:
            raise RuntimeError(
                "the task's gradient reached no decoder layer, so there is nothing to project: do the layers train, "
                'and does the loss depend on them? Without a gradient into the decoder, use preserve="none"'
            )
        self._projection.add(self.state.global_step + 1, report)
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the action expert's parameters in groups of their own learning rate."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.expert_learning_rate
        if created and rate is not None and self._expert:
            expert = {id(p) for p in self._expert.values()}
            groups = []
            for group in optimizer.param_groups:
                others = [p for p in group["params"] if id(p) not in expert]
                mine = [p for p in group["params"] if id(p) in expert]
                groups += [{**group, "params": others}] if others else []
                groups += [{**group, "params": mine, "lr": rate}] if mine else []
            optimizer.param_groups[:] = groups
        return optimizer

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """
        Trains. `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end, or starts anew
        where there is none. Afterwards the expert holds its averaged weights; the checkpoints hold both.
        """
        if resume_from_checkpoint is True:
            checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if self.ema is not None:
            self.ema.copy_to_model()
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer looks whether it has arrived only after a step: resuming a finished run would train on.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation with the expert's averaged weights; draws the same noise and times every time."""
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's prediction with the expert's averaged weights."""
        with self._evaluating():
            return super().predict(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluating(self) -> Any:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        averaged = self.ema.swapped_in() if self.ema is not None else contextlib.nullcontext()
        with torch.random.fork_rng(devices), averaged:
            torch.manual_seed(self.args.seed)
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the projection's means, and the count of dropped steps, to what the training loop logs."""
        if "loss" in logs:
            if self._projection is not None:
                logs = {**logs, **self._projection.means()}
            if self.non_finite_guard.skipped_steps:
                logs = {**logs, "skipped_steps": float(self.non_finite_guard.skipped_steps)}
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._projection is not None:
            self._projection.flush()
        if self.ema is not None and self.args.should_save:
            self.ema.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PreTrainedModel) and model is None:
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        checkpoint = str(self.state.best_model_checkpoint)
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_weights(self.model, checkpoint)
        else:
            super()._load_best_model()
        if self.ema is not None:
            self.ema.load(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.ema is not None and os.path.isdir(checkpoint):
            self.ema.load(checkpoint)


def _freeze(model: nn.Module, names: list[str] | None) -> None:
    modules = []
    for name in [DEFAULT_FROZEN] if names is None else names:
        found = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        if not found and names is not None:
            raise ValueError(f"frozen_modules: {type(model).__name__} has no module whose path ends with {name!r}")
        modules += found
    for module in modules:
        module.requires_grad_(False)


def _action_collator(model: nn.Module, processor: Any, dataset: Any) -> tuple[Any, Callable[[list[Any]], Any] | None]:
    """Processor and collator for a `PaliGemmaFlowForAction` whose user gave no collator; else what was given."""
    from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor

    base = unwrap_model(model)
    if not isinstance(base, PaliGemmaFlowForAction):
        return processor, None
    if processor is None:
        processor = PaliGemmaFlowProcessor.from_vlm_processor(
            base.config.vlm_name_or_path or base.config._name_or_path,
            statistics=getattr(dataset, "statistics", None),
            cameras=getattr(dataset, "cameras", None),
        )
    return processor, PaliGemmaFlowCollator(processor)
