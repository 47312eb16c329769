import pytest
import torch
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


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
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


def _paligemma_config(text_type):
    return PaliGemmaConfig(
        text_config={"model_type": text_type, **TEXT},
        vision_config=VISION,
        image_token_index=IMAGE_TOKEN,
        projection_dim=16,
    )


def _pi0():
    expert = {"model_type": "gemma", **TEXT, "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 12}
    return PI0ForConditionalGeneration(
        PI0Config(vlm_config=_paligemma_config("gemma"), dit_config=expert, chunk_size=4)
    )


BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TEXT, attn_implementation="eager")),
    "paligemma2": lambda: PaliGemmaForConditionalGeneration._from_config(
        _paligemma_config("gemma2"), attn_implementation="eager"
    ),
    "pi0": _pi0,
}


@pytest.fixture(scope="session")
def build_model():
    """Builds a tiny model with random weights, the same ones each time for the same seed."""

    def build(kind, seed=0):
        torch.manual_seed(seed)
        return BUILDERS[kind]().eval()

    return build


@pytest.fixture(scope="session")
def make_batches():
    """Forward arguments for such a model; sequences are padded on the right to different lengths."""

    def make(kind, sizes=(3, 2), length=9, seed=0):
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for size in sizes:
            input_ids = torch.randint(1, IMAGE_TOKEN, (size, length), generator=generator)
            attention_mask = torch.ones(size, length, dtype=torch.int64)
            for row in range(1, size):
                attention_mask[row, length - row :] = 0
            batch = {"input_ids": input_ids, "attention_mask": attention_mask}
            if kind in ("paligemma2", "pi0"):
                input_ids[:, :IMAGE_TOKENS] = IMAGE_TOKEN
            if kind == "paligemma2":
                batch["pixel_values"] = torch.randn(size, 3, 16, 16, generator=generator)
                batch["token_type_ids"] = (torch.arange(length) >= length - 3).long().expand(size, -1).contiguous()
                batch["labels"] = input_ids.clone()
            if kind == "pi0":
                batch["pixel_values"] = torch.randn(size, 1, 3, 16, 16, generator=generator)
                batch["pixel_attention_mask"] = torch.ones(size, 1, dtype=torch.bool)
                batch["state"] = torch.randn(size, 32, generator=generator)
                batch["noise"] = torch.randn(size, 4, 32, generator=generator)
                batch["timestep"] = torch.rand(size, generator=generator)
            batches.append(batch)
        return batches

    return make
