"""Arguments of [`AEGISTrainer`]."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments

from hf_aegis.gradients.combiners import COMBINERS
from hf_aegis.gradients.data_parallel import PROJECTION_SCOPES
from hf_aegis.gradients.projector import GRANULARITIES
from hf_aegis.gradients.reference_backward import DUAL_BACKWARDS


PRESERVE = ("projection", "subspace", "both", "none")
REFERENCES = ("transport", "replay", "replayed_transport")
PROJECTION_TARGETS = ("gradient", "update")
PROJECTION_METRICS = ("euclidean", "adam")
LAYER_PENALTIES = ("transport", "distillation")
WEIGHT_PENALTIES = ("l2sp", "ewc")
# Of the projection, with reference="transport" alone.
_TRANSPORT_ALONE = (
    *("projection_target", "projection_metric", "restoring"),
    *("reference_interval", "reference_share"),
)
PENALTIES = (*LAYER_PENALTIES, "replay", *WEIGHT_PENALTIES)


@dataclass
class AEGISConfig(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`], with what AEGIS adds and its authors' defaults (arXiv 2604.16067, §4): a
    constant learning rate after 100 warm-up steps, no weight decay, gradients clipped at norm 1. The rates themselves
    are ours; the paper's published text does not give them.

    Args:
        preserve (`str`, *optional*, defaults to `"projection"`):
            How the pre-trained knowledge is kept: `"projection"` combines the task's gradient with a reference
            gradient, group by group; `"subspace"` restores, after each optimiser step, how the linear layers act on
            the anchored inputs ([`~gradients.HeldSubspace`]); `"both"` does both. `"none"` leaves gradients and
            weights as they are, and without `penalties` trains as a plain `Trainer`.
        reference (`str`, *optional*, defaults to `"transport"`):
            What the reference gradient is of: `"transport"`, the anchor's penalty on the task batch (AEGIS), or
            `"replay"`, the loss on a batch of the trainer's `replay_dataset` (as in A-GEM), or `"replayed_transport"`,
            the anchor's penalty on such a batch, which tells what the penalty is worth on inputs that it describes.
        combiner (`str`, *optional*, defaults to `"one_sided"`):
            How the two are combined: `"one_sided"` removes from the task's gradient what opposes the reference
            (AEGIS; with a replay reference A-GEM); `"pcgrad"` and `"graddrop"`, for a replay reference, follow both.
        penalties (`dict[str, float]`, *optional*):
            What is added to the loss, by name, with its weight. On decoder layers' outputs on the task batch:
            `"transport"`, the anchor's penalty; `"distillation"`, the mean squared distance to those of the
            pre-trained model. `"replay"`: the loss on a batch of `replay_dataset` (co-training). On weights outside
            the action expert: `"l2sp"`, half the squared distance to the pre-trained weights (L2-SP); `"ewc"`, the
            same weighted by the diagonal of the Fisher information on `replay_dataset` (EWC).
        replay_batch_size (`int`, *optional*):
            Samples of a replayed batch; by default as many as in a training batch.
        fisher_samples (`int`, *optional*, defaults to `200`):
            Samples of `replay_dataset` that the Fisher information is estimated on.
        neuron_cosine_steps (`int`, *optional*, defaults to `0`):
            Steps between entries into `neuron_cosines.json`, a histogram of the cosine between each neuron's task and
            reference gradients with the transport reference. Zero writes none.
        dual_backward (`str`, *optional*, defaults to `"streaming"`):
            `"streaming"` sends task and anchor cotangent through each layer together; `"two_pass"` runs two full
            backward passes. The gradients agree to rounding; streaming needs less time and memory.
        granularity (`str`, *optional*, defaults to `"layer"`):
            What is projected as one vector: `"layer"`, `"global"` or `"tensor"`. `"global"` keeps the reference
            gradients of all layers to the end of each backward pass: as much memory as the gradients themselves.
            GradDrop combines each element by itself; to it this is the order in which numbers are drawn.
        penalty_scale (`float`, *optional*, defaults to `1.0`):
            Weight \\(\lambda\\) of the transport penalty that is the reference.
        projection_eps (`float`, *optional*, defaults to `1e-12`):
            Damping of the projection's denominator; GradDrop has none.
        projection_target (`str`, *optional*, defaults to `"gradient"`):
            With the transport reference, what is projected: the task's `"gradient"` (AEGIS), or the `"update"` that
            the optimiser made of it, momentum, rescaling and weight decay included ([`~gradients.UpdateProjection`]).
        projection_metric (`str`, *optional*, defaults to `"euclidean"`):
            With the transport reference, in what metric gradients are projected: `"euclidean"` (AEGIS), or that of
            `"adam"`, in which the projected gradient no longer works against the reference once Adam has rescaled it
            ([`~gradients.AdamMetric`]).
        projection_scope (`str`, *optional*, defaults to `"global"`):
            With several processes, what is projected: `"global"`, the gradient of the batch that they share, so that
            their number makes no difference; it sends both gradients, with every micro-batch. `"rank"`: each process's
            own gradient, before the mean is taken; it sends no more than plain data parallelism, but the mean may
            work against the reference of the whole batch, and `projection.jsonl` tells of the main process alone.
        restoring (`float`, *optional*, defaults to `0.0`):
            With the transport reference, adds the reference gradient to the projected one at this share of the task
            gradient's length, so that what is lost is sought again. Zero is AEGIS.
        reference_interval (`int`, *optional*, defaults to `1`):
            With the transport reference, computes the reference direction for every so many-th micro-batch only, and
            projects off the same one in those between: an approximation that costs little more than training without
            the projection, and a set of gradients that is kept. A resumed training begins with a new one.
        reference_share (`float`, *optional*, defaults to `1.0`):
            With the transport reference and `dual_backward="streaming"`, computes the reference direction from this
            share of each micro-batch, rounded up to whole samples: an approximation that saves that much of its cost.
        subspace_energy (`float`, *optional*):
            Share of the energy of the anchored inputs in the subspaces that are held, from 0 to 1; all directions that
            the anchor has by default.
        subspace_energies (`dict[str, float]`, *optional*):
            The same for single linear layers, by patterns of their names such as `"layers.0.*"`; the first that fits
            goes before `subspace_energy`.
        subspace_sensitivity (`float`, *optional*):
            Holds single pairs of an input and an output direction in place of whole input directions: those that the
            predictions on the anchored data are most sensitive to, up to this share of the sensitivity, above 0. Needs
            an anchor that was collected with `sensitivity`.
        subspace_softness (`float`, *optional*, defaults to `0.0`):
            Above 0, directions are brought back in proportion to their energy rather than entirely.
        subspace_steps (`int`, *optional*, defaults to `1`):
            Optimiser steps between restorations. Weights that are saved or evaluated are restored in any case.
        freeze_unheld (`bool`, *optional*, defaults to `True`):
            With held subspaces, freezes what else could change the decoder's answers: norms, biases and embeddings.
        certificate_steps (`int`, *optional*, defaults to `0`):
            Steps between measurements of how far layers and logits have gone from the pre-trained model's, on the
            trainer's `certificate_batches`; 0 measures at the end alone.
        decoder_layers (`str`, *optional*):
            Dotted path of the decoder layers, for models where they cannot be found.
        expert_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the action expert; `learning_rate` is that of everything else. `None` trains all alike.
        expert_modules (`list[str]`, *optional*):
            Dotted paths of the modules that make up the action expert. By default `action_expert`, or, on π0, all that
            is not the vision-language model; a model without an expert has none.
        frozen_modules (`list[str]`, *optional*):
            Names of modules to freeze, by the end of their path. By default the vision tower, where there is one; an
            empty list freezes nothing.
        expert_ema_decay (`float`, *optional*, defaults to `0.9999`):
            Decay of the exponential moving average of the expert's weights, warmed up as
            `min(decay, (1 + step) / (10 + step))`. Used for evaluation, and left in the model when training ends.
            Zero turns it off.
        vqa_steps (`int`, *optional*, defaults to `100`):
            Steps between evaluations on the VQA hold-out given to the trainer.
        vqa_accuracy (`bool`, *optional*, defaults to `True`):
            Generate answers in these evaluations, besides the teacher-forced cross-entropy.
        max_skipped_steps (`int`, *optional*, defaults to `20`):
            Steps in a row whose loss or gradients are not finite, and which are dropped therefore, before the training
            ends with an error that says what may be wrong. Zero never ends it while the weights are finite; where they
            are not, it ends at once. The schedule of learning rates goes on over dropped steps. In `fp16` the gradient
            scaler's search for its scale takes up to 16 at the start.

    Raises:
        ValueError: If a value is unknown or out of range, or has no effect; the message names the field.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of all but the action expert."})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule."}
    )
    warmup_steps: float = field(default=100, metadata={"help": "Steps of linear warm-up, or their share below 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    preserve: str = field(default="projection", metadata={"help": "How knowledge is kept.", "choices": PRESERVE})
    reference: str = field(
        default="transport", metadata={"help": "What the reference gradient is of.", "choices": REFERENCES}
    )
    combiner: str = field(
        default="one_sided", metadata={"help": "How task and reference gradient are combined.", "choices": COMBINERS}
    )
    penalties: dict[str, float] | None = field(
        default=None, metadata={"help": f"Weights of what is added to the loss, of {', '.join(PENALTIES)}, as JSON."}
    )
    replay_batch_size: int | None = field(default=None, metadata={"help": "Samples of a replayed batch."})
    fisher_samples: int = field(default=200, metadata={"help": "Samples that EWC's Fisher information is from."})
    neuron_cosine_steps: int = field(default=0, metadata={"help": "Steps between entries into neuron_cosines.json."})
    dual_backward: str = field(
        default="streaming", metadata={"help": "Form of the dual backward.", "choices": DUAL_BACKWARDS}
    )
    granularity: str = field(
        default="layer", metadata={"help": "What is projected as one vector.", "choices": GRANULARITIES}
    )
    penalty_scale: float = field(default=1.0, metadata={"help": "Weight of the transport penalty."})
    projection_eps: float = field(default=1e-12, metadata={"help": "Damping of the projection's denominator."})
    projection_target: str = field(
        default="gradient", metadata={"help": "What is projected.", "choices": PROJECTION_TARGETS}
    )
    projection_metric: str = field(
        default="euclidean", metadata={"help": "In what metric it is projected.", "choices": PROJECTION_METRICS}
    )
    projection_scope: str = field(
        default="global",
        metadata={"help": "What is projected with several processes.", "choices": PROJECTION_SCOPES},
    )
    restoring: float = field(default=0.0, metadata={"help": "Share of the reference gradient that is added."})
    reference_interval: int = field(
        default=1, metadata={"help": "Micro-batches that one computation of the reference direction serves."}
    )
    reference_share: float = field(
        default=1.0, metadata={"help": "Share of each micro-batch that the reference direction is computed from."}
    )
    subspace_energy: float | None = field(default=None, metadata={"help": "Share of the inputs' energy to hold."})
    subspace_energies: dict[str, float] | None = field(
        default=None, metadata={"help": "The same by patterns of the linear layers' names, as JSON."}
    )
    subspace_sensitivity: float | None = field(
        default=None, metadata={"help": "Share of the predictions' sensitivity to hold, pair by pair."}
    )
    subspace_softness: float = field(default=0.0, metadata={"help": "Holds directions by their energy, not entirely."})
    subspace_steps: int = field(default=1, metadata={"help": "Optimiser steps between restorations."})
    freeze_unheld: bool = field(default=True, metadata={"help": "Freeze norms, biases and embeddings."})
    certificate_steps: int = field(default=0, metadata={"help": "Steps between measurements of the certificate."})
    decoder_layers: str | None = field(default=None, metadata={"help": "Dotted path of the decoder layers."})
    expert_learning_rate: float | None = field(default=1e-4, metadata={"help": "Learning rate of the action expert."})
    expert_modules: list[str] | None = field(default=None, metadata={"help": "Paths of the action expert's modules."})
    frozen_modules: list[str] | None = field(default=None, metadata={"help": "Modules to freeze, by end of path."})
    expert_ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the expert's moving average."})
    vqa_steps: int = field(default=100, metadata={"help": "Steps between evaluations on the VQA hold-out."})
    vqa_accuracy: bool = field(default=True, metadata={"help": "Also generate answers in these evaluations."})
    max_skipped_steps: int = field(default=20, metadata={"help": "Steps in a row that may be dropped; 0: any number."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("preserve", PRESERVE),
            ("reference", REFERENCES),
            ("combiner", tuple(COMBINERS)),
            ("dual_backward", DUAL_BACKWARDS),
            ("granularity", GRANULARITIES),
            ("projection_target", PROJECTION_TARGETS),
            ("projection_metric", PROJECTION_METRICS),
            ("projection_scope", PROJECTION_SCOPES),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {choices}, found {value!r}")
        for name in ("penalty_scale", "projection_eps", "vqa_steps", "fisher_samples", "subspace_steps"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive, found {value}")
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps must not be negative, found {self.max_skipped_steps}")
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint is not supported: upon SIGTERM the trainer saves a checkpoint by itself, after "
                "the step under way, unless save_strategy is 'no'"
            )
        if self.reference_interval < 1:
            raise ValueError(f"reference_interval must be at least 1, found {self.reference_interval}")
        if not 0 < self.reference_share <= 1:
            raise ValueError(f"reference_share must lie in (0, 1], found {self.reference_share}")
        if self.expert_learning_rate is not None and not self.expert_learning_rate >= 0:
            raise ValueError(f"expert_learning_rate must not be negative, found {self.expert_learning_rate}")
        if self.replay_batch_size is not None and self.replay_batch_size < 1:
            raise ValueError(f"replay_batch_size must be at least 1, found {self.replay_batch_size}")
        for name in ("neuron_cosine_steps", "certificate_steps", "subspace_softness", "restoring"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, found {value}")
        if self.subspace_sensitivity is not None:
            if not 0 < self.subspace_sensitivity <= 1:
                raise ValueError(f"subspace_sensitivity must lie in (0, 1], found {self.subspace_sensitivity}")
            if self.subspace_softness:
                raise ValueError("subspace_softness cannot be combined with subspace_sensitivity")
        shares = {"subspace_energy": self.subspace_energy} | {
            f"subspace_energies[{pattern!r}]": share for pattern, share in (self.subspace_energies or {}).items()
        }
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], found {share}")
        self._check_composition()
        if not 0 <= self.expert_ema_decay < 1:
            raise ValueError(f"expert_ema_decay must lie in [0, 1), found {self.expert_ema_decay}")

    @property
    def projects(self) -> bool:
        """Whether the task's gradient is combined with a reference gradient."""
        return self.preserve in ("projection", "both")

    @property
    def holds_subspaces(self) -> bool:
        """Whether subspaces of the linear layers' inputs are held."""
        return self.preserve in ("subspace", "both")

    @property
    def needs_anchor(self) -> bool:
        """Whether training uses an anchor."""
        transported = self.projects and self.reference != "replay"
        return transported or self.holds_subspaces or "transport" in (self.penalties or {})

    @property
    def needs_replay(self) -> bool:
        """Whether training uses a `replay_dataset`."""
        replayed = self.projects and self.reference != "transport"
        return replayed or not {"replay", "ewc"}.isdisjoint(self.penalties or {})

    @property
    def checkpointing_options(self) -> dict[str, Any]:
        """
        A copy of `activation_checkpointing_kwargs`.

        Raises:
            ValueError: If they are no mapping; `TrainingArguments` reads JSON, and keeps other strings.
        """
        options = self.activation_checkpointing_kwargs or {}
        if isinstance(options, str):
            raise ValueError(f"activation_checkpointing_kwargs must be a JSON object, found {options!r}")
        return dict(options)

    def _check_composition(self) -> None:
        for name, weight in (self.penalties or {}).items():
            if name not in PENALTIES:
                raise ValueError(f"penalties: unknown key {name!r}, expected some of {list(PENALTIES)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"penalties: the weight of {name!r} must be a positive number, found {weight!r}")
        if not self.holds_subspaces:
            self._refuse_without_effect(
                f'preserve="{self.preserve}"',
                *("subspace_energy", "subspace_energies", "subspace_sensitivity", "subspace_softness"),
                *("subspace_steps", "freeze_unheld"),
            )
        if not self.projects:
            self._refuse_without_effect(
                f'preserve="{self.preserve}"',
                *("reference", "combiner", "granularity", "penalty_scale", "projection_eps", "dual_backward"),
                "projection_scope",
                *_TRANSPORT_ALONE,
            )
        elif self.reference != "replay":
            if self.reference == "replayed_transport":
                self._refuse_without_effect(
                    'reference="replayed_transport"', "penalty_scale", "dual_backward", *_TRANSPORT_ALONE
                )
            if self.combiner != "one_sided":
                raise ValueError(
                    f'combiner={self.combiner!r} needs reference="replay": the transport penalty says where not to '
                    "go, and is not followed itself"
                )
            if self.reference == "transport" and "replay" in (self.penalties or {}):
                raise ValueError(
                    'penalties: "replay" cannot be combined with the transport reference, whose statistics would mix '
                    'those of the replayed batch in; use preserve="none" with it, or reference="replay" instead of it'
                )
        else:
            self._refuse_without_effect('reference="replay"', "penalty_scale", "dual_backward", *_TRANSPORT_ALONE)
            if self.combiner == "graddrop":
                self._refuse_without_effect('combiner="graddrop"', "projection_eps")
            if "replay" in (self.penalties or {}):
                raise ValueError(
                    'penalties: "replay" cannot be combined with reference="replay", which would combine a replayed '
                    'batch\'s gradient with itself; use combiner="pcgrad" to follow both losses, or preserve="none" '
                    "to add them"
                )
        if self.reference_share != 1:
            if self.dual_backward != "streaming":
                raise ValueError(f'reference_share={self.reference_share} needs dual_backward="streaming"')
            size = self.per_device_train_batch_size
            if math.ceil(self.reference_share * size) == size:
                raise ValueError(
                    f"reference_share={self.reference_share} has no effect with per_device_train_batch_size={size}: "
                    "rounded up, it is the whole batch"
                )
        if self.projection_target == "update":
            self._refuse_without_effect('projection_target="update"', "projection_metric")
            if self.projection_scope == "rank":
                raise ValueError(
                    'projection_scope="rank" cannot be combined with projection_target="update": the processes\' '
                    "weights would part"
                )
        if self.neuron_cosine_steps and not (self.projects and self.reference == "transport"):
            raise ValueError('neuron_cosine_steps needs preserve="projection" or "both", and reference="transport"')

    def _refuse_without_effect(self, with_what: str, *names: str) -> None:
        defaults = {each.name: each.default for each in fields(self)}
        for name in names:
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{name}={value!r} has no effect with {with_what}")
