"""Adapters on the Hub."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_aegis import GSEConfig
from hf_aegis.cli import main


REPO = "org/adapter"
# peft asks transformers by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "gse": GSEConfig(r=4, num_experts=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.fixture
def make_base():
    """A tiny decoder, the same at every call."""

    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes)).eval()

    return make


@pytest.fixture(params=CONFIGS)
def adapted(request, make_base):
    """The decoder with an adapter that does something."""
    model = get_peft_model(make_base(), CONFIGS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def tokens():
    return torch.arange(12).reshape(2, 6)


def test_adapters_come_back_bit_equal(hub, adapted, make_base, tokens):
    adapted.push_to_hub(REPO, private=True)
    files = hub.repo(REPO).files()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert hub.repo(REPO).private
    loaded = PeftModel.from_pretrained(make_base(), REPO).eval()
    assert torch.equal(loaded(tokens).logits, adapted(tokens).logits)
    own, other = adapted.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    with hub.offline():
        assert torch.equal(PeftModel.from_pretrained(make_base(), REPO)(tokens).logits, adapted(tokens).logits)


def test_revisions(hub, adapted, make_base, tokens):
    adapted.push_to_hub(REPO)
    first = adapted(tokens).logits
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    adapted.push_to_hub(REPO, revision="longer")
    for revision, expected in (("main", first), ("longer", adapted(tokens).logits)):
        loaded = PeftModel.from_pretrained(make_base(), REPO, revision=revision).eval()
        assert torch.equal(loaded(tokens).logits, expected)


def test_routed_experts_are_refused_on_other_weights(hub, make_base):
    get_peft_model(make_base(), CONFIGS["gse"]).push_to_hub(REPO)
    other = make_base()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1e-3)
    with pytest.raises(ValueError, match="this adapter was made for a base model"):
        PeftModel.from_pretrained(other, REPO)


def test_a_base_model_on_the_hub_is_found_by_the_adapter(hub, make_base, tokens):
    make_base().push_to_hub("org/base")
    base = LlamaForCausalLM.from_pretrained("org/base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.push_to_hub(REPO)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(REPO)(tokens).logits, adapted(tokens).logits)


def test_the_command_pushes_an_adapter_with_a_card_and_without_paths(
    hub, adapted, make_base, tokens, tmp_path, capsys
):
    make_base().save_pretrained(tmp_path / "llama")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "llama")
    adapted.save_pretrained(tmp_path / "adapter")
    assert main(["push", str(tmp_path / "adapter"), REPO, "--private"]) == 0
    assert f"adapter: {hub.url}/{REPO}/commit/" in capsys.readouterr().out
    files = hub.repo(REPO).files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "llama"
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert 'PeftModel.from_pretrained(base, "org/adapter")' in card.text
    assert torch.equal(PeftModel.from_pretrained(make_base(), REPO).eval()(tokens).logits, adapted(tokens).logits)
    # The folder itself still knows where its base model is.
    local = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert local["base_model_name_or_path"] == str(tmp_path / "llama")
