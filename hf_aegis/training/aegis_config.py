"""Arguments of [`AEGISTrainer`]."""

from dataclasses import dataclass, field

from transformers import SchedulerType, TrainingArguments

from hf_aegis.gradients.projector import GRANULARITIES
from hf_aegis.gradients.shield import DUAL_BACKWARDS


PRESERVE = ("projection", "none")


@dataclass
class AEGISConfig(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`], with what AEGIS adds and its authors' defaults (arXiv 2604.16067, §4): a
    constant learning rate after 100 warm-up steps, no weight decay, gradients clipped at norm 1. The rates themselves
    are ours; the paper's published text does not give them.

    Args:
        preserve (`str`, *optional*, defaults to `"projection"`):
            How the pre-trained knowledge is kept: `"projection"` bends task gradients off the anchor's transport
            penalty; `"none"` trains as a plain `Trainer`.
        dual_backward (`str`, *optional*, defaults to `"streaming"`):
            `"streaming"` sends task and anchor cotangent through each layer together; `"two_pass"` runs two full
            backward passes. The gradients agree to rounding; streaming needs less time and memory.
        granularity (`str`, *optional*, defaults to `"layer"`):
            What is projected as one vector: `"layer"`, `"global"` or `"tensor"`. `"global"` keeps the reference
            gradients of all layers to the end of each backward pass: as much memory as the gradients themselves.
        penalty_scale (`float`, *optional*, defaults to `1.0`):
            Weight \\(\lambda\\) of the transport penalty.
        projection_eps (`float`, *optional*, defaults to `1e-12`):
            Damping of the projection's denominator.
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

    Raises:
        ValueError: If a value is unknown or out of range; the message names the field.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of all but the action expert."})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule."}
    )
    warmup_steps: float = field(default=100, metadata={"help": "Steps of linear warm-up, or their share below 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    preserve: str = field(default="projection", metadata={"help": "How knowledge is kept.", "choices": PRESERVE})
    dual_backward: str = field(
        default="streaming", metadata={"help": "Form of the dual backward.", "choices": DUAL_BACKWARDS}
    )
    granularity: str = field(
        default="layer", metadata={"help": "What is projected as one vector.", "choices": GRANULARITIES}
    )
    penalty_scale: float = field(default=1.0, metadata={"help": "Weight of the transport penalty."})
    projection_eps: float = field(default=1e-12, metadata={"help": "Damping of the projection's denominator."})
    decoder_layers: str | None = field(default=None, metadata={"help": "Dotted path of the decoder layers."})
    expert_learning_rate: float | None = field(default=1e-4, metadata={"help": "Learning rate of the action expert."})
    expert_modules: list[str] | None = field(default=None, metadata={"help": "Paths of the action expert's modules."})
    frozen_modules: list[str] | None = field(default=None, metadata={"help": "Modules to freeze, by end of path."})
    expert_ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the expert's moving average."})
    vqa_steps: int = field(default=100, metadata={"help": "Steps between evaluations on the VQA hold-out."})
    vqa_accuracy: bool = field(default=True, metadata={"help": "Also generate answers in these evaluations."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("preserve", PRESERVE),
            ("dual_backward", DUAL_BACKWARDS),
            ("granularity", GRANULARITIES),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {choices}, found {value!r}")
        for name in ("penalty_scale", "projection_eps", "vqa_steps"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive, found {value}")
        if self.expert_learning_rate is not None and not self.expert_learning_rate >= 0:
            raise ValueError(f"expert_learning_rate must not be negative, found {self.expert_learning_rate}")
        if not 0 <= self.expert_ema_decay < 1:
            raise ValueError(f"expert_ema_decay must lie in [0, 1), found {self.expert_ema_decay}")
