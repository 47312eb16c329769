"""
A training step gone through with shapes alone.

The step is the trainer's own: the same model, shield, held subspaces, added losses, optimiser and expert average run,
on tensors that have shapes and no values. What comes and goes is noted storage by storage, so that nothing has to be
modelled twice. The kernels are those of the CPU, also where a GPU is planned for; see [`Device`].
"""

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_aegis.gradients.projector import bending_on_device
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.expert_ema import ExpertEMA
from hf_aegis.training.expert_parameters import expert_parameters
from hf_aegis.training.frozen_modules import freeze_modules
from hf_aegis.training.planning.assumed_values import AssumedValues
from hf_aegis.training.planning.flop_log import FlopLog
from hf_aegis.training.planning.observation import Observation
from hf_aegis.training.planning.optimizer_shapes import make_optimizer
from hf_aegis.training.planning.shapes_of_model import without_values
from hf_aegis.training.planning.storage_log import Peak, StorageLog
from hf_aegis.training.planning.workload import PlannedPreservation, Workload
from hf_aegis.training.resources import PHASES


# The allocator of CUDA rounds what it gives up to this.
_CUDA_GRANULE = 512
_REFERENCE = "reference gradients"


@dataclass(frozen=True)
class Rehearsal:
    """
    What a step takes.

    Attributes:
        peak ([`Peak`]): The moment of most memory while training, evaluations included.
        phases (`dict[str, Peak]`): The same for each of [`PHASES`].
        flops (`dict[str, int]`):
            Floating-point operations of one optimiser step by phase, all micro-batches together; with a
            `reference_interval` their mean over steps that compute a reference and steps that do not.
        trainable_parameters, parameters (`int`): Their numbers.
        held (`dict[str, numpy.ndarray]`): Of each phase, the bytes held at each of its moments.
    """

    peak: Peak
    phases: dict[str, Peak]
    flops: dict[str, int]
    trainable_parameters: int
    parameters: int
    held: Mapping[str, np.ndarray] = field(repr=False, compare=False)

    @property
    def step_flops(self) -> int:
        """Floating-point operations of one optimiser step."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """All figures, in bytes and operations."""
        return {
            "peak_bytes": self.peak.bytes,
            "peak_phase": self.peak.phase,
            "items": self.peak.items,
            "phases": {name: peak.bytes for name, peak in self.phases.items()},
            "step_flops": self.step_flops,
            "flops": self.flops,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
        }


def rehearse(workload: Workload, device: str = "cuda", evaluates: bool = True) -> Rehearsal:
    """
    Goes through the load, the first steps and an evaluation of a training, with shapes alone. Of many micro-batches,
    or many backward passes that share a reference direction, those are gone through that differ.

    Args:
        workload ([`Workload`]): The training.
        device (`"cuda"` or `"cpu"`, *optional*, defaults to `"cuda"`):
            What is planned for. It decides how optimisers step and gradients are bent (tensor by tensor, or by kernels
            that work on many or take temporary copies), how sizes are rounded, and whether the anchor itself counts,
            which stays on the host.
        evaluates (`bool`, *optional*, defaults to `True`): Whether evaluations count.

    Raises:
        ValueError: If the training asks for an optimiser whose memory is not known here, or for what no trainer takes.
    """
    log, flops = StorageLog(_CUDA_GRANULE if device == "cuda" else 1), FlopLog()
    assumed = AssumedValues(workload.selected)
    with assumed:
        whole = workload.model()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Where a model is copied, PyTorch looks whether its tensors have values, and means to stop doing so.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Observation(assumed, log, flops))
        if device == "cuda":
            stack.enter_context(bending_on_device())
        return _Stage(workload, device, log, flops).play(whole, evaluates)


@dataclass
class _Stage:
    workload: Workload
    device: str
    log: StorageLog
    flops: FlopLog
    preservation: Any = None
    ema: ExpertEMA | None = None
    optimizer: Any = None
    kept: list[Any] = field(default_factory=list)

    @property
    def args(self) -> AEGISConfig:
        return self.workload.args

    def play(self, whole: nn.Module, evaluates: bool) -> Rehearsal:
        with self.log.phase("load"):
            model = without_values(whole, self.workload.dtype)
            self._prepare(model)
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.log.tag([p.grad], "gradients"))
        flops = self._steps(model)
        if evaluates:
            with self.log.phase("evaluation"):
                self._evaluate(model)
        found = {name: self.log.peak(name) for name in PHASES}
        phases = {name: peak for name, peak in found.items() if peak is not None}
        highest = max(phases.values(), key=lambda peak: peak.bytes)
        held = {name: self.log.held(name) for name in phases}
        return Rehearsal(highest, phases, flops, trainable, parameters, held)

    def _prepare(self, model: nn.Module) -> None:
        args = self.args
        self.log.tag([*model.parameters(), *model.buffers()], "parameters")
        freeze_modules(model, args.frozen_modules)
        expert = expert_parameters(model, args.expert_modules)
        if self.device == "cpu":
            self.kept += self.workload.anchor_tensors()
            self.log.tag(self.kept, "anchor")
        once = copy.copy(args)
        # EWC's Fisher information is a mean over samples, each of which takes as much as one.
        once.fisher_samples = 1
        once.reference_interval = min(args.reference_interval, 2)
        self.preservation = PlannedPreservation(
            model, once, self.workload, partial(self._replay_loss, model), partial(_trained, model, expert)
        )
        self.log.tag_live("what is kept beside the model", "load")
        if self.preservation.held is not None:
            self.log.tag(self.preservation.held.tensors, "held directions")
        shield = self.preservation.shield
        if hasattr(shield, "on_reference"):
            shield.on_reference = lambda unit, name, reference: self.log.tag([reference], _REFERENCE)
        if self.workload.goes_back:
            copies = [p.detach().clone() for p in self.preservation.weights.values()]
            self.log.tag(copies, "what is kept beside the model")
            self.kept += copies
        self.optimizer = make_optimizer(model, args, self.device)
        self.preservation.attach(self.optimizer)
        if expert and args.expert_ema_decay > 0:
            self.ema = ExpertEMA(expert, args.expert_ema_decay)
            self.log.tag(self.ema.average.values(), "expert average")
        checkpoint_activations(model, args)

    def _steps(self, model: nn.Module) -> dict[str, int]:
        """
        Goes through steps until nothing new can come; returns the operations of one by phase.

        A step's second micro-batch finds gradients, as those after it do; of the backward passes that do not compute a
        reference direction, one is enough.
        """
        model.train()
        args = self.args
        # Makes the optimiser's state, and is the first of the passes that compute a reference direction.
        self._micro_batch(model, 0)
        self._update(model)
        passes, update = [], Counter[str]()
        for _ in range(min(args.reference_interval, 2)):
            for number in range(min(args.gradient_accumulation_steps, 2)):
                passes.append(self._counted(partial(self._micro_batch, model, number)))
            update = self._counted(partial(self._update, model))
        computing, keeping, interval = passes[-1], passes[0], args.reference_interval
        accumulated = args.gradient_accumulation_steps
        flops = {
            name: accumulated * (computing[name] + (interval - 1) * keeping[name]) // interval + update[name]
            for name in PHASES
        }
        return {name: count for name, count in flops.items() if count}

    def _counted(self, run: Callable[[], None]) -> Counter[str]:
        """The operations of what runs, by phase."""
        self.flops.flops.clear()
        run()
        return self.flops.flops.copy()

    def _update(self, model: nn.Module) -> None:
        with self._in("optimizer"):
            trained = [p for p in model.parameters() if p.grad is not None]
            if self.args.max_grad_norm:
                foreach = True if self.device == "cuda" else None
                torch.nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm, foreach=foreach)
            self.optimizer.step()
            self.log.tag(_tensors(self.optimizer.state), "optimiser state")
            if self.preservation.held is not None:
                self.preservation.held.restore()
            model.zero_grad()
            if self.ema is not None:
                self.ema.update()

    def _micro_batch(self, model: nn.Module, number: int) -> None:
        share = 1 / self.args.gradient_accumulation_steps
        with contextlib.ExitStack() as block:
            with self._in("forward"):
                batch = self.workload.batch(self.args.per_device_train_batch_size)
                self.log.tag(batch.values(), "batch")
                # A replayed batch is differentiated here.
                block.enter_context(self.preservation.micro_batch(number, share, model))
                self.log.tag_live(_REFERENCE, "forward")
                with self.preservation.recording():
                    loss = self._outputs(model, batch).loss
                auxiliary = getattr(model, "get_auxiliary_loss", None)
                terms = [auxiliary() if callable(auxiliary) else None, self.preservation.added_loss()]
                for added in (term for term in terms if term is not None):
                    loss = loss + added
                self.log.tag_live("activations", "forward")
            with self._in("backward"):
                (loss * share).backward()
                del loss, terms
                block.close()

    def _evaluate(self, model: nn.Module) -> None:
        model.eval()
        averaged = self.ema.swapped_in() if self.ema is not None else contextlib.nullcontext()
        with torch.no_grad(), averaged:
            self._outputs(model, self.workload.batch(self.args.per_device_eval_batch_size))
        with torch.no_grad():
            self.workload.ask(model)

    def _outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """What accelerate's wrapper of the model gives."""
        if not self.args.bf16:
            return model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            return convert_outputs_to_fp32(lambda: model(**batch))()

    def _replay_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self._outputs(model, batch).loss

    @contextlib.contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        self.flops.phase = phase
        with self.log.phase(phase):
            yield


def checkpoint_activations(model: Any, args: AEGISConfig) -> None:
    """Turns activation checkpointing on or off, as the Trainer does."""
    if args.activation_checkpointing:
        options = args.checkpointing_options
        every = options.pop("every_n_layers", 1)
        options.pop("offload", None)
        model.activation_checkpointing_enable(options or None, every_n_layers=every)
    elif getattr(model, "is_activation_checkpointing", False):
        model.activation_checkpointing_disable()


def _trained(model: nn.Module, expert: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in expert}


def _tensors(state: Mapping[Any, Mapping[str, Any]]) -> list[Tensor]:
    return [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
