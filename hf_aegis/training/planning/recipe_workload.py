"""The training that a recipe describes, as shapes."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers import initialization as init
from transformers.training_args import OptimizerNames

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.anchors.fingerprint import AnchorFingerprint
from hf_aegis.models import PaliGemmaFlowForAction
from hf_aegis.training.adapters import add_gse, add_lora
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.planning.held_shapes import HeldDirections, directions_of, most_directions
from hf_aegis.training.planning.workload import ChangeableWorkload, tensors_like
from hf_aegis.training.run_arguments import RunArguments
from hf_aegis.training.unsupported import asks_for_fsdp


# Questions asked at a time in training: the default of `VQAHoldout`.
_QUESTIONS = 64


@dataclass(frozen=True)
class Sizes:
    """
    What a recipe does not say, for the data are not looked at.

    Args:
        text_tokens (`int`, *optional*, defaults to 24): Tokens of a prompt, or of a question with its answer, without
            the image's; a batch is as long as its longest.
        answer_tokens (`int`, *optional*, defaults to 4): Labelled tokens of a replayed question.
        fast_tokens (`int`, *optional*, defaults to 64): FAST tokens of a chunk, where the language model learns them.
        cameras (`int`, *optional*, defaults to 2): Pictures of a sample.
        subspaces ([`SubspaceOptions`], *optional*): Bounds on what is held, where there is no anchor to look at.
    """

    text_tokens: int = 24
    answer_tokens: int = 4
    fast_tokens: int = 64
    cameras: int = 2
    subspaces: SubspaceOptions = field(default_factory=SubspaceOptions)

    def __post_init__(self) -> None:
        for name in ("text_tokens", "answer_tokens", "fast_tokens", "cameras"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")


class RecipeWorkload(ChangeableWorkload):
    """
    A [`Workload`] of `hf-aegis train`.

    Args:
        run ([`RunArguments`]): What is trained on what.
        args ([`AEGISConfig`]): How.
        config (`PaliGemmaConfig`): Of the vision-language model.
        sizes ([`Sizes`], *optional*): What the recipe does not say.
    """

    def __init__(
        self, run: RunArguments, args: AEGISConfig, config: PaliGemmaConfig, sizes: Sizes | None = None
    ) -> None:
        run.check()
        self.run, self.args, self.config, self.sizes = run, args, config, sizes or Sizes()
        self.goes_back = run.interpolates
        self._anchor = self._read_anchor()
        self._moments = self._stand_in()

    def _read_anchor(self) -> ActivationAnchor | None:
        """The anchor itself, if it is in a folder here: what it holds decides what is held."""
        wanted = self.args.needs_anchor or self.run.certificate_samples
        here = wanted and self.run.anchor is not None and Path(self.run.anchor).is_dir()
        return ActivationAnchor.from_pretrained(str(self.run.anchor)) if here else None

    def _stand_in(self) -> ActivationAnchor:
        """An anchor of the model's shape with moments alone, whose values are read where it is made."""
        text = self.config.get_text_config()
        shape = (text.num_hidden_layers, text.hidden_size)
        fingerprint = AnchorFingerprint(*shape, "", "batch", 1, 1, 1)
        if self._anchor is not None:
            fingerprint = replace(fingerprint, mask_policy=self._anchor.fingerprint.mask_policy)
        return ActivationAnchor(torch.zeros(shape), torch.ones(shape), fingerprint)

    @property
    def selected(self) -> int:
        """How many labelled tokens a training batch has."""
        return self.args.per_device_train_batch_size * self.sizes.fast_tokens if self.run.fast is not None else 0

    def describe(self, device: str) -> str:
        """Model, batch, dtype and optimiser in a line."""
        args, sizes = self.args, self.sizes
        accumulated = args.gradient_accumulation_steps
        tokens = sizes.cameras * self._image_tokens + sizes.text_tokens
        parts = [
            self.run.model or "the embedded model",
            f"batch {args.per_device_train_batch_size}" + (f" × {accumulated}" if accumulated > 1 else ""),
            f"{tokens} tokens",
            f"{self.run.dtype} weights" + (", computed in bfloat16" if args.bf16 else ""),
            str(OptimizerNames(args.optim).value),
            *(["checkpointed"] if args.activation_checkpointing else []),
        ]
        return f"{', '.join(parts)}; on {device}, one device"

    def assumptions(self, device: str) -> list[str]:
        """What the plan assumes that the recipe does not say, and what it leaves out."""
        sizes = self.sizes
        found = [f"{sizes.cameras} cameras and {sizes.text_tokens} tokens of text are assumed for a sample"]
        if self.run.fast is not None:
            found.append(f"{sizes.fast_tokens} FAST tokens are assumed for a chunk")
        if self.args.holds_subspaces and self._anchor is None:
            bounds = sizes.subspaces
            found.append(
                f"no anchor at {self.run.anchor!r} to look at: as an upper bound, {bounds.max_rank} input and "
                f"{bounds.max_output_rank} output directions of each linear are assumed to be held"
            )
        if self.run.vqa_samples and self.args.vqa_accuracy:
            found.append("the key-value cache of generated answers is not counted")
        if self.args.checkpointing_options.get("offload"):
            found.append("activations that are offloaded to the host are counted as if they were not")
        if asks_for_fsdp(self.args):
            found.append(
                "the recipe asks for FSDP, and this is what one device would take alone, with nothing sharded; what "
                "each of several takes is not planned"
            )
        if (interval := self.args.reference_interval) > 1:
            found.append(
                f"operations are a mean: one backward pass in {interval} computes a reference, and takes more than "
                "the others"
            )
        if device == "cpu" and self.args.bf16:
            found.append(
                "what oneDNN compiles and keeps for each shape of a product in bfloat16 is not counted: tens of MB"
            )
        return found

    def model(self) -> nn.Module:
        run, config = self.run, copy.deepcopy(self.config)
        config._attn_implementation = dict.fromkeys(("", "text_config", "vision_config"), "eager")
        with torch.device("meta"), init.no_init_weights():
            vlm = PaliGemmaForConditionalGeneration(config)
            vlm.tie_weights()
            vlm.to(getattr(torch, run.dtype))
            model = PaliGemmaFlowForAction.from_vlm(vlm, chunk_size=run.chunk_size, **(run.expert or {}))
            if not model.config.flow_gradient_to_vlm and run.fast is None:
                model.model.requires_grad_(False)
                model.lm_head.requires_grad_(False)
            if run.lora is not None:
                return add_lora(model, run.lora)
            if run.gse is not None:
                # Of the weights, which are not there.
                return add_gse(model, {**run.gse, "check_base_weights": False})
        return model

    def anchor(self) -> ActivationAnchor:
        return self._moments

    def anchor_tensors(self) -> list[Tensor]:
        if not self.args.needs_anchor:
            return []
        return tensors_like(self._anchor or self._moments)

    def directions(self, model: nn.Module) -> list[HeldDirections]:
        if self._anchor is not None:
            return directions_of(self._anchor, model, self.args)
        return most_directions(model, self.args, self.sizes.subspaces)

    def batch(self, size: int) -> dict[str, Tensor]:
        sizes = self.sizes
        fast = sizes.fast_tokens if self.run.fast is not None else 0
        batch = self._prompts(size, sizes.cameras, sizes.text_tokens + fast)
        flow: Any = self._flow_config
        chunk = (size, self.run.chunk_size, flow["action_dim"])
        batch |= {"actions": torch.empty(chunk), "action_is_pad": torch.empty(chunk[:2], dtype=torch.bool)}
        if flow["use_state"]:
            batch["state"] = torch.empty(size, flow["state_dim"])
        if fast:
            batch["labels"] = torch.empty_like(batch["input_ids"])
        return batch

    def replayed(self, size: int) -> dict[str, Tensor]:
        batch = self._prompts(size, 1, self.sizes.text_tokens)
        return {**batch, "labels": torch.empty_like(batch["input_ids"])}

    def ask(self, model: nn.Module) -> None:
        if not self.run.vqa_samples:
            return
        size = min(_QUESTIONS, self.run.vqa_samples)
        batch = self._prompts(size, 1, self.sizes.text_tokens)
        answered = torch.empty(self.sizes.answer_tokens, dtype=torch.long)
        logits = model(**batch, logits_to_keep=answered, use_cache=False).logits
        labels = torch.empty(logits.shape[:2], dtype=torch.long)
        cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")

    @property
    def _flow_config(self) -> dict[str, Any]:
        from hf_aegis.models import PaliGemmaFlowConfig

        given = self.run.expert or {}
        return {n: given.get(n, getattr(PaliGemmaFlowConfig, n)) for n in ("action_dim", "state_dim", "use_state")}

    @property
    def _image_tokens(self) -> int:
        vision: Any = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def _prompts(self, size: int, pictures: int, text_tokens: int) -> dict[str, Tensor]:
        vision: Any = self.config.vision_config
        ids = torch.empty(size, pictures * self._image_tokens + text_tokens, dtype=torch.long)
        pixels = torch.empty(size, pictures, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        return {
            "input_ids": ids,
            "attention_mask": torch.empty_like(ids),
            "token_type_ids": torch.empty_like(ids),
            "pixel_values": pixels,
        }
