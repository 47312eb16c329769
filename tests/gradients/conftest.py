import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_aegis.anchors import ActivationAnchor, find_decoder_layers


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    # Small random weights would leave every hidden state alike.
    "initializer_range": 0.2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
}
IMAGE_TOKEN, IMAGE_TOKENS = 60, 4
OFF = {"attn_implementation": "eager", "use_cache": False}


def _paligemma_config(text_type):
    return PaliGemmaConfig(
        text_config={"model_type": text_type, **TEXT, "use_cache": False},
        vision_config=VISION,
        image_token_index=IMAGE_TOKEN,
        projection_dim=16,
    )


def _paligemma(**_):
    model = PaliGemmaForConditionalGeneration._from_config(_paligemma_config("gemma2"), attn_implementation="eager")
    model.model.vision_tower.requires_grad_(False)
    return model


def _pi0(**_):
    expert = {"model_type": "gemma", **TEXT, "hidden_size": 8, "intermediate_size": 12}
    model = PI0ForConditionalGeneration(
        PI0Config(vlm_config=_paligemma_config("gemma"), dit_config=expert, chunk_size=4)
    )
    model.model.vlm.vision_tower.requires_grad_(False)
    return model


BUILDERS = {
    "llama": lambda **options: LlamaForCausalLM(LlamaConfig(**TEXT, **OFF, **options)),
    "qwen2": lambda **options: Qwen2ForCausalLM(Qwen2Config(**TEXT, **OFF, **options)),
    "gemma2": lambda **options: Gemma2ForCausalLM(Gemma2Config(**TEXT, **OFF, **options)),
    "paligemma2": _paligemma,
    "pi0": _pi0,
}
# Where the decoder's parameters are, for the oracle's own idea of the groups.
DECODERS = {
    "llama": "model.",
    "qwen2": "model.",
    "gemma2": "model.",
    "paligemma2": "model.language_model.",
    "pi0": "model.vlm.language_model.",
    "embedded": "model.language_model.",
}


def _batch(kind, dtype, seed=0, size=3, length=10):
    generator = torch.Generator().manual_seed(seed)
    images = 2 if kind == "paligemma2" else 1
    length += (images - 1) * IMAGE_TOKENS
    input_ids = torch.randint(1, IMAGE_TOKEN, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.int64)
    for row in range(1, size):
        mask[row, length - row :] = 0
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
    if kind in ("paligemma2", "pi0"):
        input_ids[:, : images * IMAGE_TOKENS] = IMAGE_TOKEN
    if kind == "paligemma2":
        batch["pixel_values"] = torch.randn(size * images, 3, 16, 16, generator=generator).to(dtype)
        batch["token_type_ids"] = (torch.arange(length) >= length - 4).long().expand(size, -1).contiguous()
    if kind == "pi0":
        batch["pixel_values"] = torch.randn(size, 1, 3, 16, 16, generator=generator).to(dtype)
        batch["pixel_attention_mask"] = torch.ones(size, 1, dtype=torch.bool)
        batch["state"] = torch.randn(size, 32, generator=generator).to(dtype)
        batch["noise"] = torch.randn(size, 4, 32, generator=generator).to(dtype)
        batch["actions"] = torch.randn(size, 4, 32, generator=generator).to(dtype)
        batch["timestep"] = torch.rand(size, generator=generator).to(dtype)
    else:
        batch["labels"] = torch.where(mask == 1, input_ids, -100)
    return batch


@dataclass
class Case:
    """A tiny model, a batch, an anchor that its task works against in some groups, and the oracle for it."""

    kind: str
    model: nn.Module
    batch: dict
    anchor: ActivationAnchor
    push: float = 2.0

    def loss(self, batch=None):
        """Cross-entropy plus a term that pushes the last hidden state away from the anchor's mean."""
        batch = self.batch if batch is None else batch
        if self.kind in ("pi0", "embedded"):
            return self.model(**batch).loss.mean()
        output = self.model(**batch, output_hidden_states=True)
        away = self.anchor.mean[-1].to(output.hidden_states[-1].dtype)
        return output.loss + self.push * (output.hidden_states[-1] * away).mean()

    def parameters(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self):
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.parameters().items()}

    def group_of(self, name):
        """The oracle's group, or `None` for what is not protected."""
        name = name.replace("base_model.model.", "")
        decoder = DECODERS[self.kind]
        if name.startswith(decoder + "layers."):
            return "layers." + name[len(decoder) + len("layers.") :].split(".")[0]
        if name.startswith(decoder) or name.startswith("lm_head"):
            return "embeddings"
        return "multi_modal_projector" if "multi_modal_projector" in name else None

    def differentiate(self, loss=None):
        """Task gradients and penalty gradients by plain autograd, `None` where unused, and the penalty's terms."""
        hidden = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: hidden.append(out if torch.is_tensor(out) else out[0]))
            for layer in find_decoder_layers(self.model)
        ]
        value = (self.loss if loss is None else loss)()
        for hook in hooks:
            hook.remove()
        terms = [self.written_out(index, states) for index, states in enumerate(hidden)]
        penalty = sum(mean_term + std_term for mean_term, std_term in terms)
        parameters = self.parameters()
        task = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        reference = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True)
        names = list(parameters)
        return dict(zip(names, task, strict=True)), dict(zip(names, reference, strict=True)), terms

    def written_out(self, layer, hidden, eps=1e-6):
        """The transport penalty straight from its definition."""
        tokens = hidden[self.batch["attention_mask"].bool()]
        if tokens.dtype != torch.float64:
            tokens = tokens.float()
        mean, variance = tokens.mean(dim=0), tokens.var(dim=0, unbiased=False)
        there = self.anchor.mean[layer].to(tokens.dtype), self.anchor.variance[layer].to(tokens.dtype)
        spread = (variance + eps).sqrt() - (there[1] + eps).sqrt()
        return (mean - there[0]).square().mean(), spread.square().mean()

    def project(self, task, reference, granularity="layer", eps=1e-12):
        """The projection with explicit flat vectors; returns gradients and each group's scalars."""
        units = {}
        for name, gradient in task.items():
            group = self.group_of(name)
            if gradient is not None and group is not None:
                unit = {"layer": group, "global": "global", "tensor": name}[granularity]
                units.setdefault(unit, []).append(name)
        projected = dict(task)
        scalars = {}
        for unit, names in units.items():
            g = torch.cat([task[n].flatten() for n in names])
            r = torch.cat([torch.zeros_like(task[n]).flatten() if reference[n] is None else reference[n].flatten()
                           for n in names])  # fmt: skip
            dot = g @ r
            alpha = dot / (r @ r + eps) if dot < 0 else torch.zeros_like(dot)
            flat = g - alpha * r
            for name, part in zip(names, flat.split([task[n].numel() for n in names]), strict=True):
                projected[name] = part.view_as(task[name])
            scalars[unit] = SimpleNamespace(
                dot=dot.item(),
                task=(g @ g).item(),
                reference=(r @ r).item(),
                alpha=alpha.item(),
                projected=(flat @ flat).item(),
            )
        return projected, scalars


def build_case(kind="gemma2", dtype=torch.float64, seed=0, checkpointing=False, push=2.0, size=3, **options):
    """Builds a [`Case`]; the model is in training mode."""
    torch.manual_seed(seed)
    model = BUILDERS[kind](**options)
    anchor = ActivationAnchor.collect(model, [_batch(kind, torch.float32, seed=7)], progress=False)
    generator = torch.Generator().manual_seed(3)
    anchor = copy.copy(anchor)
    anchor.mean = anchor.mean + torch.randn(anchor.mean.shape, generator=generator)
    anchor.variance = anchor.variance * (0.5 + torch.rand(anchor.variance.shape, generator=generator))
    model = model.to(dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    return Case(kind, model, _batch(kind, dtype, size=size), anchor, push)


@pytest.fixture(scope="session")
def make_case():
    """[`build_case`]."""
    return build_case


@pytest.fixture(scope="session")
def make_embedded_case():
    """The shipped PaliGemma 2 with a small action expert, on shipped demonstrations, with an anchor of easy-VQA."""
    from transformers import AutoProcessor

    from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM
    from hf_aegis.data import LiberoDataset, VQACollator, load_easy_vqa
    from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor

    dataset = LiberoDataset(DEMONSTRATIONS, chunk_size=8)
    instructions = {}
    for index in range(0, len(dataset), 10):
        instructions.setdefault(dataset[index]["instruction"], dataset[index])
    # The longest and the shortest instruction, so that there is padding.
    rows = sorted(instructions.values(), key=lambda row: len(row["instruction"]))[:: max(1, len(instructions) - 1)]
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        EMBEDDED_VLM, statistics=dataset.statistics, cameras=dataset.cameras
    )
    batch = dict(PaliGemmaFlowCollator(processor)(rows))
    generator = torch.Generator().manual_seed(0)
    batch["noise"] = torch.randn(batch["actions"].shape, generator=generator)
    batch["timestep"] = torch.tensor([0.3, 0.8])
    questions = VQACollator(AutoProcessor.from_pretrained(EMBEDDED_VLM))(load_easy_vqa("test", 16, seed=0))

    def make(dtype):
        torch.manual_seed(0)
        model = PaliGemmaFlowForAction.from_vlm(
            EMBEDDED_VLM,
            chunk_size=8,
            expert_hidden_size=32,
            expert_num_layers=2,
            expert_num_heads=2,
            expert_intermediate_size=48,
        )
        model.freeze_vision_tower()
        anchor = ActivationAnchor.collect(model, [questions], progress=False)
        model = model.to(dtype).train()
        floating = {"pixel_values", "state", "actions", "noise", "timestep"}
        return Case("embedded", model, {k: v.to(dtype) if k in floating else v for k, v in batch.items()}, anchor)

    return make


@pytest.fixture(scope="session")
def make_batch():
    return _batch


def check_same(found, expected, tolerance):
    """Asserts a relative difference over all gradients together, and that the same ones are missing."""
    assert found.keys() == expected.keys()
    assert [n for n, v in found.items() if v is None] == [n for n, v in expected.items() if v is None]
    names = [n for n, v in expected.items() if v is not None]
    for name in names:
        assert torch.isfinite(found[name]).all(), name
    difference = sum((found[n].double() - expected[n].double()).square().sum() for n in names).sqrt()
    norm = sum(expected[n].double().square().sum() for n in names).sqrt()
    assert norm > 0
    assert difference <= tolerance * norm, f"relative difference {float(difference / norm):.2e}"


@pytest.fixture(scope="session")
def assert_same():
    """[`check_same`]."""
    return check_same
