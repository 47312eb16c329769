import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_aegis.data.vqa import load_easy_vqa


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="session")
def recipe():
    """The pre-training recipe as a module: recipes are scripts, not a package."""
    spec = importlib.util.spec_from_file_location("easy_vqa_pretrain", RECIPES / "easy_vqa_pretrain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """The shipped recipe's file with a tiny model and two steps a stage, as a path."""
    raw = yaml.safe_load((RECIPES / "easy_vqa_pretrain.yaml").read_text())
    raw |= {"max_train_samples": 60, "max_test_samples": 12, "checkpoint_every": 1000}
    raw["tokenizer"]["vocab_size"] = 448
    raw["text_config"] |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8}
    raw["vision_config"] |= {"patch_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    for stage in ("vision", "language"):
        raw[stage] |= {"steps": 2, "batch_size": 8, "warmup_steps": 1}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="session")
def samples():
    return load_easy_vqa("test", max_samples=12, seed=3)


@pytest.fixture(scope="session")
def tiny_processor(recipe, tiny_recipe):
    return recipe.build_processor(recipe.PretrainConfig.from_yaml(tiny_recipe), load_easy_vqa("train", 200))


@pytest.fixture
def tiny_model(recipe, tiny_recipe, tiny_processor):
    """A random PaliGemma2 with a wide initialisation, so that samples differ in their scores."""
    torch.manual_seed(0)
    model = recipe.build_model(recipe.PretrainConfig.from_yaml(tiny_recipe), tiny_processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model
