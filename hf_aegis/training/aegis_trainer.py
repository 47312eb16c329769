"""A Trainer that keeps what its model knows while it learns a task."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.training_args import ParallelMode

from hf_aegis.anchors import ActivationAnchor, find_decoder_layers
from hf_aegis.gradients import Certificate, GradientShield, ReplayShield, ShardedGradientShield, reshard
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.callbacks import (
    ExpertEMACallback,
    LogAtSaves,
    MetricsCallback,
    ProcessSeeds,
    ProjectionCallback,
    VQACallback,
)
from hf_aegis.training.certificate_callback import CertificateCallback
from hf_aegis.training.default_collators import action_collator, question_collator
from hf_aegis.training.expert_ema import ExpertEMA
from hf_aegis.training.expert_load_callback import ExpertLoadCallback
from hf_aegis.training.expert_parameters import expert_modules, expert_parameters, without_wrappers
from hf_aegis.training.frozen_modules import freeze_modules
from hf_aegis.training.held_subspace_callback import HeldSubspaceCallback
from hf_aegis.training.neuron_cosine_callback import NeuronCosineCallback
from hf_aegis.training.non_finite_guard import NonFiniteGuard
from hf_aegis.training.out_of_memory import advising
from hf_aegis.training.preservation import Preservation
from hf_aegis.training.replay_batches import ReplayBatches
from hf_aegis.training.resources import PhaseMemory, PhaseMemoryCallback
from hf_aegis.training.resumable_trainer import ResumableTrainer
from hf_aegis.training.running_means import RunningMeans
from hf_aegis.training.unsupported import (
    asks_for_fsdp,
    refuse_cut_gradient,
    refuse_other_layers,
    refuse_sharding,
    refuse_speechless,
    refuse_unsupported,
)
from hf_aegis.tuners.gse import GSEModel


if TYPE_CHECKING:
    from hf_aegis.evaluation.vqa import VQAHoldout


class AEGISTrainer(ResumableTrainer):
    """
    Fine-tunes a model while its decoder layers keep the activation statistics of an anchor (arXiv 2604.16067).

    It works on [`PaliGemmaFlowForAction`], on transformers' π0, and on any causal language model with its own loss.
    π0 answers questions through the vision-language model inside, which it needs as its `answering_model`; it trains
    without activation checkpointing, which would cut that off.
    Gradient accumulation projects each micro-batch by itself. Several processes (`torchrun`) train as one does with a
    batch as large as all of theirs, unless `args.projection_scope="rank"`. With `args.fsdp` they share parameters,
    gradients and optimiser states (FSDP2), and the dual backward is the two-pass form. Training with
    `args.preserve="none"` and no `args.penalties` is that of a plain `Trainer`.

    The related methods share it: `args.reference`, `args.combiner` and `args.penalties` make A-GEM, PCGrad, GradDrop,
    EWC, L2-SP, feature distillation and co-training of it. The weights that the model has when the trainer is made are
    the pre-trained ones.

    A model that has a loss of its own to add, such as the load-balancing loss of [`~tuners.gse.GSEModel`], gives it by
    a method `get_auxiliary_loss()`; it is logged as `auxiliary_loss`, and the routing itself in `experts.jsonl`.

    Besides the Trainer's logs, the output folder gets `metrics.jsonl` with all that is logged, and `projection.jsonl`
    with each backward pass's figures group by group. When training ends, the peak memory of each phase is logged;
    `trainer.memory` has it, too. For that, each phase resets CUDA's peak statistics, also those that a caller reads.
    Each checkpoint is preceded by a log, whatever `logging_steps` is, so that a run resumed from it logs what an
    uninterrupted one does. Out of memory, it raises [`TrainingOutOfMemoryError`], which says what options would lower
    the peak, and by how much. What else goes wrong, and what happens then: `tests/FAULTS.md`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to fine-tune, with the weights that the anchor describes.
        args ([`AEGISConfig`]):
            The arguments.
        anchor ([`ActivationAnchor`], *optional*):
            Statistics of the pre-trained model; for the transport reference and the transport penalty.
        vqa_holdout ([`~evaluation.vqa.VQAHoldout`], *optional*):
            Questions to evaluate before, during and after training.
        data_collator (`Callable`, *optional*):
            As in the Trainer. By default, for a [`PaliGemmaFlowForAction`], made from the processor; the processor in
            turn, where none is given, from the model's own checkpoint and the statistics of `train_dataset`.
        replay_dataset (`Sequence`, *optional*):
            Samples of what the model is to keep, such as [`~data.vqa.VQASample`]; for the replay reference, and the
            penalties `"replay"` and `"ewc"`.
        replay_collator (`Callable`, *optional*):
            From a list of them to a batch on which the model has a loss. By default [`~data.vqa.VQACollator`] for a
            [`PaliGemmaFlowForAction`], else the `data_collator`.
        certificate_batches (`Iterable[Mapping]`, *optional*):
            Forward arguments, few of them and none that the anchor has seen, on which it is measured how far layers
            and logits go from the pre-trained model's; see [`~gradients.Certificate`]. Needs an anchor with subspaces.
        answering_model (`torch.nn.Module`, *optional*):
            What is asked the questions of `vqa_holdout`, and run on replayed and on `certificate_batches`, where that
            is not `model` itself: one that shares its decoder layers, such as [`~models.pi0_vlm`] of a π0. An anchor
            with subspaces has to be collected from it.
        kwargs: All other arguments of the Trainer.

    Raises:
        ValueError: If the anchor is missing, describes another model, or the arguments ask for a way of training in
            which the projection would not be right.
    """

    args: AEGISConfig
    model: nn.Module

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
        replay_dataset: Any = None,
        replay_collator: Callable[[list[Any]], Any] | None = None,
        certificate_batches: Iterable[Mapping[str, Any]] | None = None,
        answering_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.memory = PhaseMemory()
        # The shapes of the micro-batch under way, for what is said if it does not fit.
        self.last_inputs: dict[str, Tensor] | None = None
        refuse_unsupported(model, args)
        refuse_cut_gradient(model, args)
        refuse_other_layers(model, answering_model, args.decoder_layers)
        if vqa_holdout is not None:
            refuse_speechless(model if answering_model is None else answering_model)
        if args.needs_anchor and anchor is None:
            raise ValueError(f"{_because(args, 'transport')} needs an anchor")
        if args.needs_replay and replay_dataset is None:
            raise ValueError(f"{_because(args, 'replay')} needs a replay_dataset")
        expert_modules(model, args.expert_modules)
        without_average = args.load_best_model_at_end and args.save_only_model
        if without_average and args.expert_ema_decay > 0 and expert_parameters(model, args.expert_modules):
            raise ValueError(
                "load_best_model_at_end needs the expert average of the best checkpoint, which save_only_model does "
                "not save: set one of them to False, or expert_ema_decay=0"
            )
        if data_collator is None:
            processing_class, data_collator = action_collator(model, processing_class, train_dataset)
        if replay_dataset is not None and replay_collator is None:
            replay_collator = question_collator(model, processing_class) or data_collator
        if certificate_batches is not None and anchor is None:
            raise ValueError("certificate_batches need an anchor with subspaces")
        if certificate_batches is not None and asks_for_fsdp(args):
            raise ValueError("certificate_batches are not supported with FSDP; measure a saved model with Certificate")
        if anchor is not None and (args.needs_anchor or certificate_batches is not None):
            anchor.check_compatible(model, layers=args.decoder_layers)
        # The first thing that changes the model, after what may refuse the arguments; what accelerate makes of them,
        # and what is kept beside the model, can only be looked at afterwards.
        freeze_modules(model, args.frozen_modules)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        refuse_sharding(self.accelerator.state, args)
        if self.is_fsdp_enabled:
            expert = expert_modules(model, args.expert_modules)
            _choose_shards(self.model, self.accelerator.state.fsdp_plugin, expert)
        assert args.output_dir is not None
        if args.label_names is None and hasattr(model, "sample_actions"):
            self.label_names = ["actions"]
        self.anchor = anchor
        if args.world_size > 1 and args.parallel_mode == ParallelMode.DISTRIBUTED:
            # What is kept is what the main process begins with, as what is trained is.
            _take_from_main_process(self.model.parameters(), args.device)
        self._expert = expert_parameters(self.model, args.expert_modules)
        replay = None
        if args.needs_replay:
            size = args.replay_batch_size or args.per_device_train_batch_size
            share = (args.process_index, args.world_size)
            replay = ReplayBatches(replay_dataset, replay_collator or self.data_collator, size, args.seed, *share)
        self._answering_model = answering_model
        self.preservation = Preservation(
            self.model,
            args,
            anchor,
            replay,
            self._replay_loss,
            self._trained,
            answering=answering_model,
            sharded=self.is_fsdp_enabled,
        )
        if self.preservation.held is not None:
            self.add_callback(HeldSubspaceCallback(self.preservation.held, args.subspace_steps))
        if certificate_batches is not None:
            certificate = self._certificate(certificate_batches)
            self.add_callback(CertificateCallback(certificate, args.output_dir, args.certificate_steps, self.log))
        self._micro_batch = (-1, 0)
        self._task_means, self._evaluation_means = RunningMeans(), RunningMeans()
        self._projection: ProjectionCallback | None = None
        if args.projects:
            self._projection = ProjectionCallback(args.output_dir)
            self.add_callback(self._projection)
        if isinstance(self.shield, GradientShield) and args.neuron_cosine_steps:
            self.add_callback(NeuronCosineCallback(self.shield, args.output_dir, args.neuron_cosine_steps))
        self._expert_load: ExpertLoadCallback | None = None
        if isinstance(model, PeftModel) and isinstance(model.base_model, GSEModel):
            self._expert_load = ExpertLoadCallback(model.base_model.routing_records, args.output_dir)
            self.add_callback(self._expert_load)
        self.add_callback(NonFiniteGuard())
        self.add_callback(ProcessSeeds())
        self.ema: ExpertEMA | None = None
        if self._expert and args.expert_ema_decay > 0:
            self.ema = ExpertEMA(self._expert, args.expert_ema_decay)
            self.add_callback(ExpertEMACallback(self.ema, self.non_finite_guard))
        self.add_callback(PhaseMemoryCallback(self.memory))
        self.add_callback(MetricsCallback(args.output_dir))
        self.add_callback(LogAtSaves())
        if vqa_holdout is not None:
            evaluating = partial(self.memory.during, "evaluation")
            watched = (vqa_holdout, args.vqa_steps, args.vqa_accuracy, self.log)
            self.add_callback(VQACallback(*watched, answering=answering_model, evaluating=evaluating))

    @property
    def shield(self) -> GradientShield | ShardedGradientShield | ReplayShield | None:
        """What combines task and reference gradients; under FSDP made when the weights have been sharded."""
        return self.preservation.shield

    @property
    def non_finite_guard(self) -> NonFiniteGuard:
        """What drops and counts steps."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, NonFiniteGuard))

    @property
    def unprotected_steps(self) -> int:
        """Steps in which a reference gradient was not finite, so that some groups were left unprotected."""
        return 0 if self._projection is None else self._projection.unprotected_steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's own step, with what keeps the model's knowledge around it."""
        # Before the Trainer does: the replayed batch comes first, and is a batch of training too.
        model.train()
        if callable(to_training := getattr(self.optimizer, "train", None)):
            to_training()
        accumulation = self.current_gradient_accumulation_steps
        step = self.state.global_step
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        number = step * self.args.gradient_accumulation_steps + self._micro_batch[1]
        self.last_inputs = {n: v.to("meta") for n, v in inputs.items() if isinstance(v, Tensor)}
        self.memory.enter("forward")
        with self.preservation.micro_batch(number, 1 / accumulation, model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.non_finite_guard.see_loss(loss)
        self.memory.enter("optimizer")
        if self.shield is not None and self._projection is not None:
            report = self.shield.report
            # The transport reference has a term for each layer that the task's gradient came through.
            transports = isinstance(self.shield, GradientShield | ShardedGradientShield)
            no_layer = transports and report is not None and not report.mean_term.numel()
            if report is None or not report.groups or no_layer:
                raise RuntimeError(
                    "the task's gradient reached no decoder layer, so there is nothing to project: do the layers "
                    'train, and does the loss depend on them? Without a gradient into the decoder, use preserve="none"'
                )
            self._projection.add(self.state.global_step + 1, report)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; in training, plus the penalties. Notes the flow-matching error of either."""
        if not model.training:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._note_flow(self._evaluation_means, outputs, inputs)
            return (loss, outputs) if return_outputs else loss
        with self.preservation.recording():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._note_flow(self._task_means, outputs, inputs)
        # The balance of the task's batch: what is replayed for an added loss comes after it.
        terms = [self._auxiliary_loss(), self.preservation.added_loss()]
        for added in (term for term in terms if term is not None):
            # A loss that is normalised over the whole accumulated batch is not divided by the micro-batches later.
            whole = self._is_whole_loss(num_items_in_batch)
            loss = loss + (added / self.current_gradient_accumulation_steps if whole else added)
        self.memory.enter("backward")
        return (loss, outputs) if return_outputs else loss

    def _auxiliary_loss(self) -> Tensor | None:
        """What the model asks to be added to its last loss in training, such as the balance of routed experts."""
        read = getattr(self.model, "get_auxiliary_loss", None)
        if read is None:
            return None
        if self._expert_load is not None:
            self._expert_load.observe()
        loss = read()
        self._task_means.add("auxiliary_loss", loss)
        return loss

    def _is_whole_loss(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer takes its loss to be normalised over all micro-batches: its `training_step`'s rule."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    @staticmethod
    def _note_flow(means: RunningMeans, outputs: Any, inputs: dict[str, Any]) -> None:
        flow = outputs.get("flow_mse") if isinstance(outputs, dict) else None
        if flow is not None:
            means.add("flow_mse", flow, weight=len(inputs["actions"]))

    def _trained(self) -> dict[str, nn.Parameter]:
        """All that trains but the action expert, by name."""
        named = ((without_wrappers(name), p) for name, p in self.model.named_parameters())
        return {n: p for n, p in named if p.requires_grad and n not in self._expert}

    def _certificate(self, batches: Iterable[Mapping[str, Any]]) -> Certificate:
        assert self.anchor is not None
        layers = find_decoder_layers(self.model, self.args.decoder_layers)
        return Certificate(self._answers(), batches, self.anchor, held=self.preservation.held, layers=layers)

    def _replay_loss(self, batch: Any) -> Tensor:
        inputs = self._prepare_inputs(batch)
        # Not left to the model: when EWC's Fisher information is estimated, accelerate has not wrapped it yet.
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return self._answers()(**inputs).loss

    def _answers(self) -> nn.Module:
        """What runs on questions."""
        return self.model if self._answering_model is None else self._answering_model

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's, with the flow-matching error among the metrics, whatever else the loss holds."""
        self._evaluation_means.read()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._evaluation_means.read(self._total)
        flow = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **flow})

    def _total(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

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
        if created and (overrides := getattr(optimizer, "mng", None)) is not None:
            # bitsandbytes keeps settings of single weights for the whole process, by their place in an optimiser:
            # those of an earlier training's embeddings would hold for whatever is in their place here.
            overrides.index2config.clear()
        self.preservation.attach(optimizer)
        return optimizer

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As [`ResumableTrainer`]. Afterwards the expert holds its averaged weights; the checkpoints hold both."""
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.ema is not None:
            reshard(self.model)
            self.ema.copy_to_model()
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # What a training that failed left behind, also one that begins again with smaller batches.
        self._micro_batch = (-1, 0)
        self._task_means.clear()
        self.preservation.means.clear()
        with advising(self):
            return super()._inner_training_loop(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._follow_shards()
        return prepared

    def _follow_shards(self) -> None:
        """Goes on with the parameters that FSDP2 has made of the model's."""
        if not self.is_fsdp_enabled:
            return
        reshard(self.model)
        self._expert = expert_parameters(self.model, self.args.expert_modules)
        self.preservation.follow_shards(self.model)
        if self.ema is not None:
            self.ema.follow(self._expert)
        if hasattr(self.model, "sample_actions"):
            # As the Trainer does for `generate`: weights are gathered where not `forward` itself is called.
            register_fsdp_forward_method(self.model, "sample_actions")

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
        # What is swapped are shards: before and afterwards no whole weights may be left over.
        reshard(self.model)
        with torch.random.fork_rng(devices), self.memory.during("evaluation"), averaged:
            torch.manual_seed(self.args.seed)
            yield
            reshard(self.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds flow error, penalties, the projection's means and the dropped steps to what the training loop logs."""
        if "loss" in logs:
            logs = {**logs, **self._task_means.read(self._total), **self.preservation.figures(self._total)}
            if self._projection is not None:
                logs = {**logs, **self._projection.means()}
                if self._projection.unprotected_steps:
                    logs = {**logs, "unprotected_steps": float(self._projection.unprotected_steps)}
            if self.non_finite_guard.skipped_steps:
                logs = {**logs, "skipped_steps": float(self.non_finite_guard.skipped_steps)}
        if "train_runtime" in logs:
            logs = {**logs, **self.memory.figures()}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # With `save_total_limit` it would take the place of one that a training can go on from.
        self.non_finite_guard.check_weights(self.args, self.state, self.model)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._follow_shards()
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _choose_shards(model: nn.Module, plugin: Any, expert: Iterable[str]) -> None:
    """
    Names the classes of modules that FSDP gathers one at a time, where the user has not. accelerate would take all
    `_no_split_modules`: PaliGemma lacks some of them, and an action expert's layers do part of their work outside of
    their own forward pass, so that it is gathered with what is left over.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        apart = {type(module).__name__ for path in expert for module in model.get_submodule(path).modules()}
        named = set(getattr(model, "_no_split_modules", None) or ())
        plugin.transformer_cls_names_to_wrap = sorted((present & named) - apart)


@torch.no_grad()
def _take_from_main_process(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    for parameter in parameters:
        # Under FSDP they are not on the device yet, where processes can talk to each other.
        mine = parameter.data
        whole = mine.to(device)
        torch.distributed.broadcast(whole, 0)
        if whole is not mine:
            mine.copy_(whole)


def _because(args: AEGISConfig, name: str) -> str:
    """The argument that asks for `name`, as its user wrote it."""
    if args.holds_subspaces and name == "transport":
        return f'preserve="{args.preserve}"'
    if args.projects and args.reference in (name, "replayed_transport"):
        return f'preserve="{args.preserve}" with reference="{args.reference}"'
    wanted = ("replay", "ewc") if name == "replay" else (name,)
    return f"penalties={ ({key: weight for key, weight in (args.penalties or {}).items() if key in wanted}) }"
