import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_aegis.anchors import find_decoder_layers, hash_layer_weights, named_base_parameters


# PEFT still asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_adapters_do_not_change_the_hash(build_model):
    model = build_model("paligemma2")
    before = hash_layer_weights(find_decoder_layers(model))
    names = [name for name, _ in named_base_parameters(find_decoder_layers(model))]
    config = LoraConfig(
        target_modules="all-linear", init_lora_weights=False, modules_to_save=["post_attention_layernorm"]
    )
    wrapped = get_peft_model(model, config)
    assert hash_layer_weights(find_decoder_layers(wrapped)) == before
    assert sorted(name for name, _ in named_base_parameters(find_decoder_layers(wrapped))) == sorted(names)
    wrapped.merge_adapter()
    assert hash_layer_weights(find_decoder_layers(wrapped)) != before


def test_a_bfloat16_checkpoint_hashes_the_same_in_float32(build_model):
    model = build_model("llama").bfloat16()
    in_bfloat16 = hash_layer_weights(find_decoder_layers(model))
    assert hash_layer_weights(find_decoder_layers(copy.deepcopy(model).float())) == in_bfloat16
    assert hash_layer_weights(find_decoder_layers(build_model("llama"))) != in_bfloat16


def test_one_changed_weight_changes_the_hash(build_model):
    layers = find_decoder_layers(build_model("llama"))
    before = hash_layer_weights(layers)
    with torch.no_grad():
        layers[2].mlp.up_proj.weight[3, 5] += 1e-6
    assert hash_layer_weights(layers) != before


def test_swapped_layers_change_the_hash(build_model):
    layers = find_decoder_layers(build_model("llama"))
    before = hash_layer_weights(layers)
    layers[0], layers[1] = layers[1], layers[0]
    assert hash_layer_weights(layers) != before


def test_what_is_outside_the_layers_does_not_matter(build_model):
    model = build_model("llama")
    before = hash_layer_weights(find_decoder_layers(model))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    assert hash_layer_weights(find_decoder_layers(model)) == before


def test_weights_without_data_are_refused(build_model):
    layers = find_decoder_layers(build_model("llama").to("meta"))
    with pytest.raises(ValueError, match=r"'0\.input_layernorm\.weight'.*meta device"):
        hash_layer_weights(layers)
