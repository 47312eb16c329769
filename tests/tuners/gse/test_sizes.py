"""How many parameters train on PaliGemma-3B's shapes."""

import pytest
import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from hf_aegis import GSEConfig


def paligemma_3b():
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=2048,
        vision_use_head=False,
    )
    text = GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=257216,
    )
    with torch.device("meta"):
        return PaliGemmaForConditionalGeneration(
            PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=2048)
        )


def test_paligemma_3b_has_33_88_million(adapted):
    model = adapted(paligemma_3b(), GSEConfig(target_modules="all-linear"))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 33_880_976
    parts = {
        part: sum(n for name, n in trained.items() if part in name) for part in ("language_model", "vision_tower")
    }
    # 18 layers of the language model, 27 of the vision tower, and the projector: 16 (in + out) + 7 in for each linear.
    assert parts == {"language_model": 23_224_320, "vision_tower": 10_597_392}
    assert sum("multi_modal_projector" in name for name in trained) == 3
    assert len(model.base_model.targeted_module_names) == 18 * 7 + 27 * 6 + 1
    # Without data there is nothing to hash, and what is saved of it is a saved adapter all the same.
    assert model.peft_config["default"].base_weights_sha256 == "unknown"


@pytest.mark.parametrize("routed", [True, False])
def test_per_layer(routed, adapted, make_network):
    config = GSEConfig(target_modules=["first"], num_generalized=1 if routed else 8)
    trained = adapted(make_network(), config).get_nb_trainable_parameters()[0]
    assert trained == 16 * (24 + 40) + (7 * 24 if routed else 0)
