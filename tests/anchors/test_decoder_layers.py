import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from hf_aegis.anchors import find_decoder_layers, unwrap_model


# PEFT still asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


EXPECTED = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gemma2": "model.layers",
    "paligemma2": "model.language_model.layers",
    "pi0": "model.vlm.language_model.layers",
}


@pytest.mark.parametrize(("kind", "path"), EXPECTED.items())
def test_layers_of_the_language_model_are_found(build_model, kind, path):
    model = build_model(kind)
    assert find_decoder_layers(model) is model.get_submodule(path)
    assert find_decoder_layers(model.model) is model.get_submodule(path)


def test_the_action_expert_is_not_mistaken_for_the_language_model(build_model):
    model = build_model("pi0")
    assert find_decoder_layers(model) is not model.model.dit.layers
    assert find_decoder_layers(model)[0].self_attn.q_proj.in_features == 16


@pytest.mark.parametrize("kind", ["llama", "paligemma2", "pi0"])
def test_peft_models_are_looked_into(build_model, kind):
    model = build_model(kind)
    layers = find_decoder_layers(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert find_decoder_layers(wrapped) is layers
    assert unwrap_model(wrapped) is model


def test_engines_are_unwrapped_in_any_nesting(build_model):
    class Engine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = build_model("llama")
    assert find_decoder_layers(Engine(model)) is model.model.layers
    assert find_decoder_layers(Engine(torch.compile(model))) is model.model.layers
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert find_decoder_layers(Engine(wrapped)) is model.model.layers


def test_plain_modules_with_layers_are_enough():
    toy = nn.Module()
    toy.layers = nn.ModuleList([nn.Linear(2, 2)])
    assert find_decoder_layers(toy) is toy.layers


def test_a_model_without_layers_is_named_with_what_was_looked_for():
    vision = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match=r"SiglipVisionModel.*`layers` in .*get_decoder\(\).*Pass layers="):
        find_decoder_layers(vision)


def test_layers_can_be_given(build_model):
    model = build_model("pi0")
    assert find_decoder_layers(model, "model.dit.layers") is model.model.dit.layers
    assert find_decoder_layers(model, model.model.dit.layers) is model.model.dit.layers


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("model.nowhere", "LlamaForCausalLM has no submodule at layers='model.nowhere'"),
        ("model.norm", "is a LlamaRMSNorm, expected an nn.ModuleList"),
        (nn.ModuleList(), "the list of layers is empty"),
    ],
)
def test_layers_that_are_none_are_refused(build_model, layers, message):
    with pytest.raises(ValueError, match=message):
        find_decoder_layers(build_model("llama"), layers)
