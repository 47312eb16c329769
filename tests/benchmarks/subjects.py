"""What the benchmark of training steps trains: a model, a batch, and an anchor of other inputs."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from decoder import random_decoder
from torch import nn
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers import initialization as init

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.models import PaliGemmaFlowConfig, PaliGemmaFlowForAction
from hf_aegis.training.planning.vlm_shapes import paligemma2_3b


@dataclass
class Subject:
    """A model with random weights, one batch for it, and an anchor."""

    model: nn.Module
    batch: dict[str, torch.Tensor]
    anchor: ActivationAnchor
    width: int

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch["input_ids"].numel()


def build(arguments: argparse.Namespace, checkpointing: bool) -> Subject:
    """The subject of the size that is asked for."""
    subject = _decoder(arguments) if arguments.tokens else _policy(arguments)
    if checkpointing:
        model: Any = subject.model
        model.activation_checkpointing_enable({"use_reentrant": False})
    return subject


def _decoder(arguments: argparse.Namespace) -> Subject:
    model = random_decoder(arguments.width, arguments.layers, arguments.tokens)
    model.to(arguments.device, getattr(torch, arguments.dtype))
    shape = (arguments.batch, arguments.tokens)
    ids, other = (torch.randint(512, shape, device=arguments.device) for _ in range(2))
    mask = torch.ones(shape, device=arguments.device)
    anchor = _anchor(model, {"input_ids": other, "attention_mask": mask}, arguments)
    return Subject(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}, anchor, arguments.width)


def sliced(layers: int | None, vocabulary: int | None) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """
    PaliGemma2-3B at its real widths, and sizes of its action expert.

    Args:
        layers (`int`, *optional*):
            Of the decoder; the vision tower and the expert have the same share of theirs. All by default.
        vocabulary (`int`, *optional*):
            Size of the embeddings, of which the flow loss looks few up and multiplies none. All by default.
    """
    config, expert = paligemma2_3b(), {"expert_num_layers": PaliGemmaFlowConfig.expert_num_layers}
    text, vision = config.text_config, config.vision_config
    if layers is not None:
        share = layers / text.num_hidden_layers
        text.num_hidden_layers = layers
        text.layer_types = text.layer_types[:layers]
        vision.num_hidden_layers = max(1, round(share * vision.num_hidden_layers))
        expert["expert_num_layers"] = max(1, round(share * expert["expert_num_layers"]))
    if vocabulary is not None:
        text.vocab_size, config.image_token_id = vocabulary, vocabulary - 1
    return config, expert


def _policy(arguments: argparse.Namespace) -> Subject:
    """PaliGemma2-3B with an action expert, or a slice of it; two cameras, the vision tower frozen."""
    torch.manual_seed(0)
    config, expert = sliced(arguments.layers, arguments.vocabulary)
    config._attn_implementation = dict.fromkeys(("", "text_config", "vision_config"), "eager")
    dtype = getattr(torch, arguments.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(arguments.device), init.no_init_weights():
            vlm = PaliGemmaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    vlm.tie_weights()
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.normal_(std=0.02)
    model = PaliGemmaFlowForAction.from_vlm(vlm, **expert).train()
    model.freeze_vision_tower()
    image_tokens, size = 2 * 256, arguments.batch
    ids = torch.randint(1000, (size, image_tokens + arguments.text_tokens), device=arguments.device)
    ids[:, :image_tokens] = config.image_token_id
    vision = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": torch.randn(size, 2, 3, 224, 224, device=arguments.device, dtype=dtype),
    }
    batch = {
        **vision,
        "state": torch.randn(size, 9, device=arguments.device),
        "actions": torch.randn(size, 50, 7, device=arguments.device),
        "action_is_pad": torch.zeros(size, 50, dtype=torch.bool, device=arguments.device),
    }
    other = vision | {"pixel_values": torch.randn_like(vision["pixel_values"]).flatten(0, 1)}
    return Subject(model, batch, _anchor(model, other, arguments), config.get_text_config().hidden_size)


def _anchor(model: nn.Module, batch: dict[str, torch.Tensor], arguments: argparse.Namespace) -> ActivationAnchor:
    held = {"subspace", "pairs"} & set(arguments.variants)
    options = SubspaceOptions(energy=0.99, sensitivity="pairs" in arguments.variants) if held else None
    return ActivationAnchor.collect(model, [batch], subspaces=options, progress=False)
