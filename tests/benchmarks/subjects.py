"""What the benchmark of training steps trains: a model, a batch, and an anchor of other inputs."""

import argparse
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from decoder import random_decoder
from torch import nn
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PI0Config, PI0ForConditionalGeneration
from transformers import initialization as init

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.models import PaliGemmaFlowConfig, PaliGemmaFlowForAction, pi0_vlm
from hf_aegis.training.planning.vlm_shapes import paligemma2_3b


# Model, batch, what the anchor is of, a batch for it, and the width of a token.
_Parts: TypeAlias = tuple[Any, dict[str, torch.Tensor], nn.Module, dict[str, torch.Tensor], int]
PI0_LAYERS = PI0Config().dit_config.num_hidden_layers
_PATCHES = 256  # tokens of an image
_CAMERAS = 2


@dataclass
class Subject:
    """
    A model with random weights, one batch for it, and an anchor.

    Attributes:
        answering (`torch.nn.Module`): What the anchor is of, which shares the model's modules.
        autocast (`bool`): Whether the loss is computed in bfloat16.
    """

    model: nn.Module
    batch: dict[str, torch.Tensor]
    anchor: ActivationAnchor
    width: int
    answering: nn.Module
    autocast: bool

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch["input_ids"].numel()

    def loss(self) -> torch.Tensor:
        """Of the batch."""
        with torch.autocast(self.batch["input_ids"].device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(**self.batch).loss


def build(arguments: argparse.Namespace, checkpointing: bool) -> Subject:
    """The subject of the size that is asked for."""
    make = _pi0 if arguments.size.startswith("pi0") else _policy if arguments.text_tokens else _decoder
    model, batch, answering, others, width = make(arguments)
    anchor = _anchor(answering, others, arguments)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Subject(model, batch, anchor, width, answering, bool(arguments.autocast))


def _decoder(arguments: argparse.Namespace) -> _Parts:
    model = random_decoder(arguments.width, arguments.layers, arguments.tokens)
    model.to(arguments.device, getattr(torch, arguments.dtype))
    shape = (arguments.batch, arguments.tokens)
    ids, other = (torch.randint(512, shape, device=arguments.device) for _ in range(2))
    mask = torch.ones(shape, device=arguments.device)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    return model, batch, model, {"input_ids": other, "attention_mask": mask}, arguments.width


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


def _policy(arguments: argparse.Namespace) -> _Parts:
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
    image_tokens, size = _CAMERAS * _PATCHES, arguments.batch
    ids = torch.randint(1000, (size, image_tokens + arguments.text_tokens), device=arguments.device)
    ids[:, :image_tokens] = config.image_token_id
    vision = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": torch.randn(size, _CAMERAS, 3, 224, 224, device=arguments.device, dtype=dtype),
    }
    batch = {
        **vision,
        "state": torch.randn(size, 9, device=arguments.device),
        "actions": torch.randn(size, 50, 7, device=arguments.device),
        "action_is_pad": torch.zeros(size, 50, dtype=torch.bool, device=arguments.device),
    }
    other = vision | {"pixel_values": torch.randn_like(vision["pixel_values"]).flatten(0, 1)}
    return model, batch, model, other, config.get_text_config().hidden_size


def make_pi0(layers: int, vocabulary: int) -> PI0ForConditionalGeneration:
    """
    A random π0 at its published widths. Its vision tower is frozen, and so are its expert's embeddings, which nothing
    reads.

    Args:
        layers (`int`): Of [`PI0_LAYERS`]; the vision tower has the same share of its own.
        vocabulary (`int`): Size of the embeddings.
    """
    config = PI0Config()
    text, vision = config.vlm_config.text_config, config.vlm_config.vision_config
    vision.num_hidden_layers = max(1, round(vision.num_hidden_layers * layers / PI0_LAYERS))
    text.num_hidden_layers = config.dit_config.num_hidden_layers = layers
    text.vocab_size = config.dit_config.vocab_size = vocabulary
    config.vlm_config.image_token_id = vocabulary
    model = PI0ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.model.vlm.vision_tower.requires_grad_(False)
    model.model.dit.embed_tokens.requires_grad_(False)
    return model


def pi0_batch(config: PI0Config, size: int, cameras: int, words: int) -> dict[str, torch.Tensor]:
    """Random pictures and words, a state and a chunk of actions, on the default device."""
    images = torch.full((size, cameras * _PATCHES), config.vlm_config.image_token_id)
    ids = torch.cat([images, torch.randint(config.vlm_config.text_config.vocab_size, (size, words))], dim=1)
    chunk = (size, config.chunk_size, config.max_action_dim)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(size, cameras, 3, 224, 224),
        "pixel_attention_mask": torch.ones(size, cameras, dtype=torch.bool),
        "state": torch.randn(size, config.max_state_dim),
        "actions": torch.randn(chunk),
        "noise": torch.randn(chunk),
        "timestep": torch.rand(size),
    }


def _pi0(arguments: argparse.Namespace) -> _Parts:
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = make_pi0(arguments.layers, arguments.vocabulary).train()
        batch = pi0_batch(model.config, arguments.batch, _CAMERAS, arguments.text_tokens)
        other = pi0_batch(model.config, arguments.batch, 1, arguments.text_tokens)
    questions = {name: other[name] for name in ("input_ids", "attention_mask")}
    questions |= {"pixel_values": other["pixel_values"][:, 0], "token_type_ids": torch.zeros_like(other["input_ids"])}
    return model, batch, pi0_vlm(model), questions, model.config.vlm_config.text_config.hidden_size


def _anchor(model: nn.Module, batch: dict[str, torch.Tensor], arguments: argparse.Namespace) -> ActivationAnchor:
    held = {"subspace", "pairs"} & set(arguments.variants)
    options = SubspaceOptions(energy=0.99, sensitivity="pairs" in arguments.variants) if held else None
    return ActivationAnchor.collect(model, [batch], subspaces=options, progress=False)
