"""What keeps a model's knowledge in one training: the parts of `hf_aegis.gradients`, wired as the arguments say."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from hf_aegis.anchors import ActivationAnchor, find_decoder_layers
from hf_aegis.gradients import (
    AdamMetric,
    DistillationLoss,
    GradientShield,
    HeldSubspace,
    QuadraticPenalty,
    ReplayShield,
    ShardedGradientShield,
    TransportLoss,
    UpdateProjection,
    average_over_processes,
    fisher_diagonal,
)
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.replay_batches import ReplayBatches
from hf_aegis.training.running_means import RunningMeans


# Of the batches that the Fisher information is estimated on, apart from those that are replayed.
_FISHER_STREAM = 1


class Preservation:
    """
    The held subspaces, the reference gradient, the added losses and the weight penalties of one training.

    The model's weights at construction are what is to be kept: they are what the subspaces are held at, the teacher of
    `"distillation"` and the centre of `"l2sp"` and `"ewc"`, in a resumed training too.

    Args:
        model (`torch.nn.Module`): What is trained.
        args ([`AEGISConfig`]): Says which parts there are.
        anchor ([`ActivationAnchor`], *optional*): For those that need it.
        replay ([`ReplayBatches`], *optional*): For those that need it.
        replay_loss (`Callable`): The model's loss on a replayed batch.
        kept (`Callable`):
            Gives what `"l2sp"` and `"ewc"` hold, by name: all that trains but the action expert. It is asked after
            held subspaces have frozen what they need frozen.
        answering (`torch.nn.Module`, *optional*):
            What replayed batches and the anchor's subspaces are of, where that is not the model itself: one that
            shares its decoder layers.
        sharded (`bool`, *optional*, defaults to `False`):
            Whether FSDP2 will spread the weights over processes: [`Preservation.follow_shards`] makes the shield then.

    Attributes:
        held ([`HeldSubspace`], *optional*): What restores the subspaces after each optimiser step.
        shield ([`GradientShield`], [`ShardedGradientShield`] or [`ReplayShield`], *optional*):
            What combines task and reference gradients.
        weights (`dict[str, torch.nn.Parameter]`): What `kept` gave.
        replay ([`ReplayBatches`], *optional*): What was given.
        means ([`RunningMeans`]): Of the added losses, unweighted, as `<name>_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: AEGISConfig,
        anchor: ActivationAnchor | None,
        replay: ReplayBatches | None,
        replay_loss: Callable[[Any], Tensor],
        kept: Callable[[], Mapping[str, Parameter]],
        answering: nn.Module | None = None,
        sharded: bool = False,
    ) -> None:
        penalties = args.penalties or {}
        self._answering = model if answering is None else answering
        # Found in the model: their path in the other one is another.
        self._layers = args.decoder_layers if answering is None else find_decoder_layers(model, args.decoder_layers)
        self.held = self._hold(self._answering, args, anchor) if args.holds_subspaces else None
        self.weights = weights = dict(kept())
        self.means = RunningMeans()
        self._number, self._share = 0, 1.0
        self._penalties = penalties
        self.replay = replay
        self._replay_loss = replay_loss
        self._layer_losses: dict[str, TransportLoss | DistillationLoss] = {}
        if "transport" in penalties:
            assert anchor is not None
            self._layer_losses["transport"] = TransportLoss(model, anchor, layers=args.decoder_layers)
        if "distillation" in penalties:
            self._layer_losses["distillation"] = DistillationLoss(model, layers=args.decoder_layers)
        self._weight_penalties: dict[str, QuadraticPenalty] = {}
        if "l2sp" in penalties:
            self._weight_penalties["l2sp"] = QuadraticPenalty(weights, penalties["l2sp"])
        if "ewc" in penalties:
            self._weight_penalties["ewc"] = QuadraticPenalty(
                weights, penalties["ewc"], self._fisher(model, args, weights)
            )
        self.shield: GradientShield | ShardedGradientShield | ReplayShield | None = None
        if not sharded:
            self.shield = self._make_shield(model, args, anchor)
        self._args = args
        self._anchor = anchor
        self._kept = kept
        self._optimizer: Optimizer | None = None

    def follow_shards(self, model: nn.Module) -> None:
        """Goes on with a model whose weights FSDP2 has spread over processes; held subspaces find them themselves."""
        self.weights = dict(self._kept())
        if self._args.projects and self.shield is None:
            assert self._anchor is not None
            self.shield = ShardedGradientShield(
                model,
                self._anchor,
                granularity=self._args.granularity,  # type: ignore[arg-type]
                penalty_scale=self._args.penalty_scale,
                projection_eps=self._args.projection_eps,
                restoring=self._args.restoring,
                layers=self._args.decoder_layers,
                drop_non_finite=False,
            )

    @contextlib.contextmanager
    def micro_batch(self, number: int, share: float, wrapper: nn.Module | None = None) -> Iterator[None]:
        """
        Around forward and backward pass of micro-batch `number`, counted over the whole training, which makes up
        `share` of its optimiser step. `wrapper` is what the forward pass goes through, where it is not the model.
        """
        if isinstance(self.shield, ShardedGradientShield):
            # Accumulated or not: what is projected is the gradient of all processes.
            self.shield.model.set_requires_gradient_sync(True)  # type: ignore[operator]
        elif self.shield is not None and wrapper is not None:
            self.shield.wrapper = wrapper
        self._number, self._share = number, share
        if isinstance(self.shield, ReplayShield):
            self.shield.step, self.shield.replay_scale = number, share
        with self.shield or contextlib.nullcontext():
            yield
        for penalty in self._weight_penalties.values():
            penalty.add_gradients(share)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the task's forward pass, whose layers the added losses look at."""
        with contextlib.ExitStack() as stack:
            for loss in self._layer_losses.values():
                stack.enter_context(loss.recording())
            yield

    def added_loss(self) -> Tensor | None:
        """The weighted sum of what is added to the loss of the micro-batch under way, or `None` if nothing is."""
        values = {name: loss.value() for name, loss in self._layer_losses.items()}
        if "replay" in self._penalties:
            values["replay"] = self._next_replay_loss()
        for name, value in values.items():
            self.means.add(f"{name}_loss", value)
        weighted = [self._penalties[name] * value for name, value in values.items()]
        return torch.stack(weighted).sum() if weighted else None

    def figures(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """
        Means of the added losses since the last call, and the weight penalties' present values. `total` sums a tensor
        over processes.
        """
        weights = {f"{name}_penalty": float(penalty.value()) for name, penalty in self._weight_penalties.items()}
        return {**self.means.read(total), **weights}

    def _hold(self, model: nn.Module, args: AEGISConfig, anchor: ActivationAnchor | None) -> HeldSubspace:
        assert anchor is not None
        energy: Any = args.subspace_energy
        if args.subspace_energies:
            energy = args.subspace_energies | {"*": 1.0 if energy is None else energy}
        return HeldSubspace(
            model,
            anchor,
            energy=energy,
            sensitivity=args.subspace_sensitivity,
            softness=args.subspace_softness,
            layers=self._layers,
            freeze=args.freeze_unheld,
        )

    def _make_shield(
        self, model: nn.Module, args: AEGISConfig, anchor: ActivationAnchor | None
    ) -> GradientShield | ReplayShield | None:
        if not args.projects:
            return None
        options: dict[str, Any] = {
            "granularity": args.granularity,
            "projection_eps": args.projection_eps,
            "layers": args.decoder_layers,
            "projection_scope": args.projection_scope,
            # The trainer's guard drops the whole step, and has to see why.
            "drop_non_finite": False,
        }
        if args.reference == "replay":
            return ReplayShield(model, self._next_replay_loss, combiner=args.combiner, seed=args.seed, **options)
        assert anchor is not None
        if args.reference == "replayed_transport":
            scope: Any = args.projection_scope
            transport = TransportLoss(self._answering, anchor, layers=self._layers, scope=scope)
            return ReplayShield(model, partial(self._next_replayed_penalty, transport), seed=args.seed, **options)
        return GradientShield(
            model,
            anchor,
            dual_backward=args.dual_backward,  # type: ignore[arg-type]
            penalty_scale=args.penalty_scale,
            restoring=args.restoring,
            reference_interval=args.reference_interval,
            reference_share=args.reference_share,
            **options,
        )

    def attach(self, optimizer: Optimizer) -> None:
        """Gives the projection the optimiser, where it looks at what that makes of the gradients."""
        if not isinstance(self.shield, GradientShield) or self._optimizer is optimizer:
            return
        self._optimizer = optimizer
        if self._args.projection_metric == "adam":
            self.shield.metric = AdamMetric(self.shield.model, optimizer)
        if self._args.projection_target == "update":
            UpdateProjection(self.shield, optimizer)

    def _next_replay_loss(self) -> Tensor:
        assert self.replay is not None
        return self._replay_loss(self.replay[self._number])

    def _next_replayed_penalty(self, transport: TransportLoss) -> Tensor:
        with transport.recording():
            self._next_replay_loss()
        return transport.value()

    def _fisher(self, model: nn.Module, args: AEGISConfig, weights: Mapping[str, Parameter]) -> dict[str, Tensor]:
        assert self.replay is not None
        if args.fisher_samples > len(self.replay.dataset):
            raise ValueError(
                f"fisher_samples={args.fisher_samples}, but replay_dataset has {len(self.replay.dataset)} samples"
            )
        rank, size = args.process_index, args.world_size
        if args.fisher_samples < size:
            raise ValueError(f"fisher_samples={args.fisher_samples} are fewer than the {size} processes")
        singles = ReplayBatches(self.replay.dataset, self.replay.collator, 1, args.seed + _FISHER_STREAM)
        # Each process has its share of the samples, and all come to the same information.
        mine = range(rank, args.fisher_samples, size)
        batches = (singles[number] for number in mine)
        fisher = fisher_diagonal(model, weights, batches, loss=lambda _, batch: self._replay_loss(batch))
        if size == 1:
            return fisher
        weighted = {name: value * (len(mine) * size / args.fisher_samples) for name, value in fisher.items()}
        return average_over_processes(weighted)
