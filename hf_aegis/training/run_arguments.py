"""What one training run is of: model, data, evaluation. Its way of training is an [`AEGISConfig`]."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints


@dataclass
class RunArguments:
    """
    What is trained on what. The arguments of the training itself are those of [`AEGISConfig`].

    Questions come from easy-VQA, from a folder, or from the Hub: `"easy-vqa"`, the path of a folder that exists, or
    else an id, as of `load_vqa`. Of a set on the Hub no more is downloaded than the asked number of samples needs:
    they are streamed, and then come from about the first `2 * samples` of shuffled shards. Without a number (as
    `vqa_final_samples` by default) the whole set is downloaded.

    Args:
        model (`str`, *optional*): Folder or Hub id of a PaliGemma; by default the embedded one.
        demonstrations (`list[str]`, *optional*): LIBERO HDF5 files or folders; by default the embedded ones.
        anchor (`str`, *optional*): Folder or Hub id of the anchor, where the training needs one.
        chunk_size (`int`, *optional*, defaults to `50`): Actions per chunk.
        held_out_per_task (`int`, *optional*, defaults to `1`): Demonstrations of each task kept for evaluation.
        short_demonstrations (`str`, *optional*, defaults to `"error"`): `"pad"` admits those shorter than a chunk.
        expert (`dict`, *optional*): Fields that [`PaliGemmaFlowConfig`] adds to a PaliGemma's, such as
            `expert_hidden_size`, or `flow_gradient_to_vlm: false` to keep the action loss out of the vision-language
            model; all but `chunk_size`, which is an argument of its own.
        lora (`dict`, *optional*): Fields of `peft.LoraConfig`: the language model trains through low-rank adapters,
            projector and expert in full, all else is frozen. An empty mapping takes peft's defaults.
        gse (`dict`, *optional*): Fields of [`~tuners.gse.GSEConfig`]: the language model trains through generalized
            and specialized experts instead. They are not merged: the output folder holds the model without them, and
            `adapter/` has them.
        fast (`dict`, *optional*): The options `vocab_size` and `scale` of [`FASTTokenizer.fit`], both optional: a
            tokenizer is fitted on the training actions, and the language model learns to predict their tokens.
        weight_interpolation (`float`, *optional*):
            After training, the vision-language model's weights become this share of the fine-tuned and the rest of the
            pre-trained ones; of LoRA, its update is scaled by it.
        keep_within (`float`, *optional*):
            The share is the largest, of sixteenths, at which the cross-entropy on the replayed questions is at most
            this much above the pre-trained model's, in its terms (0.05 is five percent). Where weights are held, these
            should be others than the anchor's, on which they change least: see `replay_seed`.
        settling_steps (`int`, *optional*, defaults to `0`):
            Steps of the action expert alone, on the weights that have gone back.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the weights: `"float32"`, `"bfloat16"`, `"float16"` or `"float64"`. `bf16` of [`AEGISConfig`] computes
            in bfloat16 on float32 weights. `hf-aegis anchor` collects in the first two alone, and in float16 gradients
            are not combined.
        vqa_dataset (`str`, *optional*, defaults to `"easy-vqa"`): Questions of the hold-out; see `load_vqa`.
        vqa_split (`str`, *optional*, defaults to `"test"`): Their split.
        vqa_samples (`int`, *optional*, defaults to `500`): How many during training; 0 for none.
        vqa_seed (`int`, *optional*, defaults to `0`): Selects them.
        vqa_final_dataset (`str`, *optional*): Questions asked after training; by default those of `vqa_dataset`.
        vqa_final_split (`str`, *optional*): Their split; by default `vqa_split`.
        vqa_final_samples (`int`, *optional*): How many after training; by default the whole split, 0 for none.
        replay_dataset (`str`, *optional*, defaults to `"easy-vqa"`):
            Questions that methods with replay or Fisher information learn from.
        replay_split (`str`, *optional*, defaults to `"train"`): Their split.
        replay_samples (`int`, *optional*, defaults to `3000`): How many.
        replay_seed (`int`, *optional*): Selects them; by default `vqa_seed`.
        action_samples (`int`, *optional*, defaults to `256`):
            Held-out chunks, evenly spaced, whose sampled actions are compared with the recorded ones; 0 for none.
        certificate_samples (`int`, *optional*, defaults to `0`):
            The first so many questions of the hold-out, on which it is measured how far layers and logits go from the
            pre-trained model's; 0 for none. Needs an anchor with subspaces, whatever the training does with it.
        analysis_samples (`int`, *optional*, defaults to `0`):
            Samples from which gradient spectra before training, and hidden states before and after, are kept for the
            report; 0 for none.
    """

    model: str | None = field(default=None, metadata={"help": "PaliGemma to fine-tune; default: the embedded one."})
    demonstrations: list[str] | None = field(default=None, metadata={"help": "LIBERO HDF5; default: embedded."})
    anchor: str | None = field(default=None, metadata={"help": "Folder or Hub id of the anchor."})
    chunk_size: int = field(default=50, metadata={"help": "Actions per chunk."})
    held_out_per_task: int = field(default=1, metadata={"help": "Demonstrations of each task kept for evaluation."})
    short_demonstrations: Literal["error", "pad"] = field(
        default="error", metadata={"help": "What those shorter than a chunk are."}
    )
    expert: dict[str, Any] | None = field(default=None, metadata={"help": "Fields of PaliGemmaFlowConfig, as JSON."})
    lora: dict[str, Any] | None = field(default=None, metadata={"help": "Fields of peft.LoraConfig, as JSON."})
    gse: dict[str, Any] | None = field(default=None, metadata={"help": "Fields of GSEConfig, as JSON."})
    fast: dict[str, Any] | None = field(
        default=None, metadata={"help": "vocab_size and scale of the FAST tokenizer, as JSON."}
    )
    weight_interpolation: float | None = field(
        default=None, metadata={"help": "Share of the fine-tuned weights in the final model."}
    )
    keep_within: float | None = field(
        default=None, metadata={"help": "Choose that share by how much cross-entropy on replayed questions may rise."}
    )
    settling_steps: int = field(default=0, metadata={"help": "Steps of the expert alone on weights gone back."})
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = field(
        default="float32", metadata={"help": "Dtype of the weights."}
    )
    vqa_dataset: str = field(default="easy-vqa", metadata={"help": "Questions of the hold-out."})
    vqa_split: str = field(default="test", metadata={"help": "Their split."})
    vqa_samples: int = field(default=500, metadata={"help": "Questions of the hold-out during training."})
    vqa_seed: int = field(default=0, metadata={"help": "Selects them."})
    vqa_final_dataset: str | None = field(default=None, metadata={"help": "Questions after training; default: same."})
    vqa_final_split: str | None = field(default=None, metadata={"help": "Their split; default: the same."})
    vqa_final_samples: int | None = field(default=None, metadata={"help": "Questions after training; default: all."})
    replay_dataset: str = field(default="easy-vqa", metadata={"help": "Questions that are replayed."})
    replay_split: str = field(default="train", metadata={"help": "Their split."})
    replay_samples: int = field(default=3000, metadata={"help": "How many of them."})
    replay_seed: int | None = field(default=None, metadata={"help": "Selects them; default: vqa_seed."})
    action_samples: int = field(default=256, metadata={"help": "Held-out chunks whose actions are sampled."})
    certificate_samples: int = field(default=0, metadata={"help": "Questions of the hold-out for the certificate."})
    analysis_samples: int = field(default=0, metadata={"help": "Samples of spectra and hidden states."})

    @property
    def interpolates(self) -> bool:
        """Whether weights go back towards the pre-trained ones when training has ended."""
        return self.weight_interpolation is not None or self.keep_within is not None

    def check(self) -> None:
        """
        Checks what can be checked before model and data are loaded.

        Raises:
            ValueError: If a value is unknown or out of range; the message names the field, and the key in it.
        """
        for name in ("dtype", "short_demonstrations"):
            choices = get_args(get_type_hints(RunArguments)[name])
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {choices}, found {value!r}")
        counts = ("vqa_samples", "vqa_final_samples", "vqa_seed", "replay_seed", "action_samples", "settling_steps")
        for name in (*counts, "certificate_samples", "analysis_samples"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must not be negative, found {value}")
        for name in ("chunk_size", "held_out_per_task", "replay_samples"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.certificate_samples and self.anchor is None:
            raise ValueError("certificate_samples needs an anchor with subspaces, found none")
        if self.certificate_samples > self.vqa_samples:
            raise ValueError(
                f"certificate_samples must be at most vqa_samples, found {self.certificate_samples} and "
                f"{self.vqa_samples}"
            )
        if self.weight_interpolation is not None and not 0 <= self.weight_interpolation <= 1:
            raise ValueError(f"weight_interpolation must lie in [0, 1], found {self.weight_interpolation}")
        if self.lora is not None and self.gse is not None:
            raise ValueError("lora and gse are adapters of the same layers: they cannot be combined")
        if self.keep_within is not None and not 0 <= self.keep_within < math.inf:
            raise ValueError(f"keep_within must not be negative, found {self.keep_within}")
        if self.keep_within is not None and self.weight_interpolation is not None:
            raise ValueError("keep_within chooses the share that weight_interpolation gives: set one of them")
        if self.settling_steps and not self.interpolates:
            raise ValueError("settling_steps follow weights that go back: set keep_within or weight_interpolation too")
        if self.interpolates and self.gse is not None:
            name = "weight_interpolation" if self.keep_within is None else "keep_within"
            raise ValueError(f"{name} is of weights, which routed experts have no path back to: it excludes gse")
        if self.expert is not None:
            _check_expert(self.expert)
        if self.lora is not None:
            _check_lora(self.lora)
        if self.gse is not None:
            _check_gse(self.gse)
        if self.fast is not None:
            _check_fast(self.fast)


def _check_expert(fields: dict[str, Any]) -> None:
    from huggingface_hub.errors import StrictDataclassError

    from hf_aegis.models import PaliGemmaFlowConfig

    known = set(PaliGemmaFlowConfig.__annotations__) - {"chunk_size"}
    _refuse_unknown("expert", fields, known)
    try:
        # With the sizes of some vision-language model, which the expert's do not depend on.
        PaliGemmaFlowConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"expert: {error.__cause__ or error}") from error


def _check_lora(fields: dict[str, Any]) -> None:
    from peft import LoraConfig

    _refuse_unknown("lora", fields, set(LoraConfig.__dataclass_fields__))
    try:
        config = LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from error
    # Left to peft, these come up when the model has been loaded, or never.
    _require_whole("lora: r", config.r)
    _require_positive("lora: lora_alpha", config.lora_alpha)
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        raise ValueError(f"lora: lora_dropout must be a number in [0, 1), found {config.lora_dropout!r}")


def _check_gse(fields: dict[str, Any]) -> None:
    from hf_aegis.tuners.gse import GSEConfig

    _refuse_unknown("gse", fields, set(GSEConfig.__dataclass_fields__))
    try:
        GSEConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"gse: {error}") from error


def _check_fast(options: dict[str, Any]) -> None:
    _refuse_unknown("fast", options, {"scale", "vocab_size"})
    _require_whole("fast: vocab_size", options.get("vocab_size", 1))
    _require_positive("fast: scale", options.get("scale", 1))


def _refuse_unknown(field_name: str, mapping: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(map(str, set(mapping) - known)):
        raise ValueError(f"{field_name}: unknown key {unknown[0]!r}, expected some of {sorted(known)}")


def _require_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")


def _require_positive(name: str, value: Any) -> None:
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a positive number, found {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
