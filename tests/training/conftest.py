from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.training import AEGISConfig


VOCABULARY = 61
TOKENS = 10


class TokenDataset(Dataset):
    """Random token sequences of varying length, as a causal language model takes them."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (size, TOKENS), generator=generator)
        self.lengths = torch.randint(4, TOKENS + 1, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(TOKENS) < self.lengths[index]).long()
        return {
            "input_ids": self.ids[index],
            "attention_mask": mask,
            "labels": self.ids[index].masked_fill(mask == 0, -100),
        }


@pytest.fixture
def token_dataset() -> TokenDataset:
    return TokenDataset(24)


@pytest.fixture
def make_language_model() -> Callable[[], Gemma2ForCausalLM]:
    """A tiny Gemma2 decoder, the same at every call."""

    def make() -> Gemma2ForCausalLM:
        torch.manual_seed(0)
        config = Gemma2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=VOCABULARY,
            attn_implementation="eager",
            use_cache=False,
            initializer_range=0.2,
        )
        return Gemma2ForCausalLM(config)

    return make


@pytest.fixture
def make_anchor() -> Callable[[PreTrainedModel], ActivationAnchor]:
    """An anchor of other sequences than those of `token_dataset`."""

    def make(model: PreTrainedModel) -> ActivationAnchor:
        other = TokenDataset(16, seed=7)
        rows = [other[index] for index in range(len(other))]
        batches = [
            {
                key: torch.stack([row[key] for row in rows[start : start + 8]])
                for key in ("input_ids", "attention_mask")
            }
            for start in (0, 8)
        ]
        return ActivationAnchor.collect(model, batches, progress=False)

    return make


@pytest.fixture
def make_args(tmp_path) -> Callable[..., AEGISConfig]:
    """Arguments of a short run; keywords win."""

    def make(**changes: Any) -> AEGISConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        }
        return AEGISConfig(**{**defaults, **changes})

    return make
