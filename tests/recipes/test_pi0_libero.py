"""The recipe that fine-tunes transformers' π0, with a tiny random one, on the shipped demonstrations and easy-VQA."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoProcessor, PaliGemmaConfig, PI0Config, PI0ForConditionalGeneration, PI0Processor

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import EMBEDDED_VLM


RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = 3
CONDITIONS = list(yaml.safe_load((RECIPES / "pi0_libero.yaml").read_text())["conditions"])
ADAPTED = {"lora": {"r": 2, "lora_alpha": 4}, "gse": {"r": 4, "num_experts": 4, "num_generalized": 1, "top_k": 2}}


@pytest.fixture(scope="module")
def recipe():
    """The study as a module: recipes are scripts, not a package. A script finds its neighbours by the search path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield importlib.import_module("pi0_libero")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random π0 with the embedded model's tokenizer and pictures, as `from_pretrained` finds it."""
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(EMBEDDED_VLM)
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(processor.tokenizer),
        # Small random weights would leave every hidden state alike.
        "initializer_range": 0.2,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 16,
        "vision_use_head": False,
    }
    vlm = PaliGemmaConfig(
        text_config={"model_type": "gemma", **text},
        vision_config=vision,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=16,
    )
    expert = {"model_type": "gemma", **text, "hidden_size": 8, "intermediate_size": 12}
    folder = tmp_path_factory.mktemp("pi0") / "pi0_tiny"
    PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """The shipped recipe with a tiny model and little data; its conditions are as they are, but for adapters' sizes."""
    raw = yaml.safe_load((RECIPES / "pi0_libero.yaml").read_text())
    raw |= {"model": str(checkpoint), "processor": str(EMBEDDED_VLM), "demonstrations": None, "flow_samples": 6}
    raw["anchored"] |= {"dataset": "easy-vqa", "split": "train", "samples": 12, "batch_size": 6}
    raw["holdout"] |= {"dataset": "easy-vqa", "split": "test", "samples": 6}
    raw["subspaces"] |= {"max_rank": 24}
    raw["training"] |= {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    raw["training"] |= {"learning_rate": 1e-2, "expert_learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
    raw["training"] |= {"use_cpu": True, "disable_tqdm": True, "bf16": False, "optim": "adamw_torch"}
    raw["training"] |= {"save_steps": STEPS - 1}
    for condition in raw["conditions"].values():
        condition |= {name: small for name, small in ADAPTED.items() if name in condition}
    raw["conditions"]["ewc"]["fisher_samples"] = 4
    return raw


@pytest.fixture(scope="module")
def finished(recipe, tiny, tmp_path_factory):
    """A study of all conditions that has been run to its end, and its results."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny, sort_keys=False))
    study = dataclasses.replace(recipe.PI0Study.from_yaml(folder / "tiny.yaml"), output_dir=str(folder / "out"))
    return study, recipe.run_study(study)


def test_all(finished):
    study, results = finished
    print((study.folder / "results.md").read_text())
