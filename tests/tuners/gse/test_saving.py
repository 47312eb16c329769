"""Adapters on disk: bit-equal in a new process, without decomposing, and refused on other weights."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_aegis import GSEConfig
from hf_aegis.tuners.gse import layer as layer_module


OPTIONS = {"target_modules": ["q_proj", "down_proj"], "r": 11, "num_experts": 4, "modules_to_save": ["lm_head"]}


def tokens(seed=0, shape=(2, 7)):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(adapted, make_llama, disturb, tmp_path):
    """Base model and adapter on disk, and the logits that they gave."""
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, GSEConfig(**OPTIONS))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        save_file({"logits": model.eval()(tokens()).logits}, tmp_path / "logits.safetensors")
    return tmp_path


@pytest.fixture
def undecomposed(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decomposed a weight")

    monkeypatch.setattr(layer_module, "truncated_svd", refuse)


def load(base, folder, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.peft_model.infer_device", lambda: "cpu")
        return PeftModel.from_pretrained(base, folder, **options)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_loaded_adapter_is_the_saved_one(saved, make_llama, undecomposed, options):
    model = load(make_llama(), saved / "adapter", **options).eval()
    expected = load_file(saved / "logits.safetensors")["logits"]
    assert torch.equal(model(tokens()).logits, expected)
    assert any(p.requires_grad for p in model.parameters()) == bool(options.get("is_trainable"))
    frozen = [p for name, p in model.named_parameters() if "gse_scaling" in name or "gse_backbone" in name]
    assert frozen and not any(p.requires_grad for p in frozen)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_loaded_beside_another(saved, make_llama, adapted, disturb):
    model = adapted(make_llama(), GSEConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.load_adapter(saved / "adapter", "trained")
    model.set_adapter("trained")
    assert torch.equal(model.eval()(tokens()).logits, load_file(saved / "logits.safetensors")["logits"])


@pytest.mark.parametrize("entrance", ["load_adapter", "from_pretrained"])
def test_an_adapter_is_loaded_through_transformers(saved, make_llama, adapted, disturb, entrance, tmp_path):
    """Which puts the saved tensors in the place of the placeholders, and knows no modules that train in full."""
    folder = tmp_path / "experts_alone"
    model = adapted(make_llama(), GSEConfig(target_modules=["q_proj", "down_proj"], r=11, num_experts=4))
    disturb(model)
    model.save_pretrained(folder)
    expected = model.eval()(tokens()).logits
    if entrance == "load_adapter":
        loaded = make_llama()
        loaded.load_adapter(str(folder))
    else:
        stored = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps(stored | {"base_model_name_or_path": str(saved / "base")})
        )
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.eval()(tokens()).logits, expected)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "gse_backbone" in name)


def test_the_configuration_comes_back(saved):
    config = PeftConfig.from_pretrained(saved / "adapter")
    assert type(config) is GSEConfig and config.awaits_weights
    assert config.target_modules == {"q_proj", "down_proj"}
    stored = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert stored["peft_type"] == "GSE" and len(stored["base_weights_sha256"]) == 64
    assert "_awaits_weights" not in stored


# Whichever comes first, peft or hf_aegis.
@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import hf_aegis, peft", "import peft, hf_aegis"])
def test_in_a_new_process(saved, imports):
    script = f"""
import sys, warnings
{imports}
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{saved}/base"), "{saved}/adapter").eval()
tokens = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
assert torch.equal(model(tokens).logits.detach(), load_file("{saved}/logits.safetensors")["logits"])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_another_base_model_is_refused_before_it_is_changed(saved, make_llama):
    base = make_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    stored = json.loads((saved / "adapter" / "adapter_config.json").read_text())["base_weights_sha256"]
    with pytest.raises(ValueError, match=f"4 targeted layers hash to {stored}, but those of this model hash to "):
        load(base, saved / "adapter")
    assert not any("gse" in name for name in base.state_dict())
    config = GSEConfig.from_pretrained(saved / "adapter")
    config.check_base_weights = False
    load(base, saved / "adapter", config=config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_layers_that_are_not_targeted_may_change(saved, make_llama):
    base = make_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight += 1
    load(base, saved / "adapter")


def test_a_saved_configuration_waits_for_its_weights(saved, make_llama, adapted):
    model = adapted(make_llama(), GSEConfig.from_pretrained(saved / "adapter"))
    with pytest.raises(RuntimeError, match="'default' was made from the configuration of a saved adapter"):
        model(tokens())


def test_a_configuration_can_be_used_again(make_network, adapted):
    config = GSEConfig(target_modules=["first"])
    first = adapted(make_network(0), config)
    hashed = config.base_weights_sha256
    second = adapted(make_network(1), config)
    assert config.base_weights_sha256 != hashed
    inputs = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    assert first(inputs).isfinite().all() and second(inputs).isfinite().all()
    layers = [model.get_base_model().first for model in (first, second)]
    assert not torch.equal(layers[0].gse_scaling["default"], layers[1].gse_scaling["default"])


def test_a_bfloat16_base_hashes_as_its_float32_copy(make_network, adapted):
    half = make_network().bfloat16()
    full = make_network().bfloat16().float()
    hashes = set()
    for network in (half, full):
        config = GSEConfig(target_modules=["first"])
        adapted(network, config)
        hashes.add(config.base_weights_sha256)
    assert len(hashes) == 1
