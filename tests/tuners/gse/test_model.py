"""The tuner in PEFT's hands: targets, several adapters, merging, what is refused."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from hf_aegis import GSEConfig


def tokens(seed=0, shape=(2, 7)):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_all_linear_layers_but_the_head_are_adapted(adapted, make_llama):
    model = adapted(make_llama(), GSEConfig(target_modules="all-linear"))
    names = model.base_model.targeted_module_names
    assert len(names) == 2 * 7 and not any("lm_head" in name for name in names)
    assert model(tokens()).logits.shape == (2, 7, 64)


def test_lora_s_targets_are_the_default(adapted, make_llama):
    model = adapted(make_llama(), GSEConfig())
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": r".*\.1\..*(gate|down)_proj"}, ["1.mlp.down_proj", "1.mlp.gate_proj"]),
        ({"target_modules": ["o_proj"], "layers_to_transform": [0]}, ["0.self_attn.o_proj"]),
        ({"target_modules": ["o_proj"], "exclude_modules": ["layers.1.self_attn.o_proj"]}, ["0.self_attn.o_proj"]),
    ],
)
def test_targets_are_chosen_as_in_peft(options, expected, adapted, make_llama):
    model = adapted(make_llama(), GSEConfig(**options))
    assert sorted(model.base_model.targeted_module_names) == [f"model.layers.{name}" for name in expected]


def test_only_experts_router_and_saved_modules_train(adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=["first", "second"], modules_to_save=["head"]))
    trained = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    layers = {f"{layer}.gse_{part}.default" for layer in ("first", "second") for part in ("A", "B", "router")}
    assert trained == layers | {"head.modules_to_save.default.weight", "head.modules_to_save.default.bias"}
    per_layer = 16 * (24 + 40)
    head = 24 * 3 + 3
    assert model.get_nb_trainable_parameters()[0] == 2 * per_layer + 7 * (24 + 40) + head


def test_adapters_live_side_by_side(adapted, make_network, disturb):
    inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    model = adapted(make_network(), GSEConfig(target_modules=["first", "second"]))
    disturb(model)
    first = model(inputs)
    model.add_adapter("other", GSEConfig(target_modules=["second"], r=6, num_experts=3, top_k=1))
    assert torch.equal(model(inputs), first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "other" in name)
    model.set_adapter("other")
    other = model(inputs)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".other" in name and "second.gse" in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(model(inputs), first) and not torch.equal(other, first)
    # Both at once add up what each adds.
    model.base_model.set_adapter(["default", "other"])
    layer = model.get_base_model().second
    hidden = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    both = layer(hidden)
    parts = []
    for name in ("default", "other"):
        model.base_model.set_adapter([name])
        parts.append(layer(hidden) - layer.base_layer(hidden))
    torch.testing.assert_close(both, layer.base_layer(hidden) + parts[0] + parts[1])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(inputs), first)
    assert not any("other" in name for name in model.state_dict())


def test_an_adapter_on_top_of_lora_sees_the_weight_itself(make_network):
    network = inject_adapter_in_model(LoraConfig(target_modules=["first"]), make_network(), "low_rank")
    linear = network.first.base_layer
    with pytest.warns(UserWarning, match="multiple adapters"):
        network = inject_adapter_in_model(GSEConfig(target_modules=["first"]), network, "experts")
    assert network.first.get_base_layer() is linear
    _, values, _ = torch.linalg.svd(linear.weight)
    torch.testing.assert_close(network.first.gse_backbone_A["experts"].norm(dim=1), (values[:16] / 10).sqrt())


def test_merging_without_routing(adapted, make_network, disturb):
    inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = make_network(dtype=torch.float64)
    before = copy.deepcopy(network.state_dict())
    model = adapted(network, GSEConfig(target_modules=["first", "second"], num_generalized=8))
    disturb(model)
    expected = model(inputs)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(network.first.get_base_layer().weight, before["first.weight"])
    model.unmerge_adapter()
    torch.testing.assert_close(network.first.get_base_layer().weight, before["first.weight"], rtol=0, atol=1e-14)
    merged = model.merge_and_unload()
    assert isinstance(merged.first, nn.Linear)
    torch.testing.assert_close(merged(inputs), expected, rtol=1e-12, atol=1e-12)


def test_routing_cannot_be_merged(adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=["first"]))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"'default' routes each token to other experts.*unload\(\)"):
            merge()
    assert torch.equal(model.unload()(torch.ones(1, 24)), make_network()(torch.ones(1, 24)))


def test_of_several_adapters_those_that_are_asked_for_are_merged(adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=["first"]))
    plain = GSEConfig(target_modules=["first"], num_experts=4, num_generalized=4, top_k=1)
    model.add_adapter("plain", plain)
    with pytest.raises(ValueError, match="'default' routes"):
        model.merge_adapter(["plain", "default"])
    first = model.get_base_model().first
    assert not first.merged_adapters
    # The one that is active routes.
    model.merge_adapter(["plain"])
    assert first.merged_adapters == ["plain"]


def test_what_is_refused(adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=["first"]))
    with pytest.raises(NotImplementedError, match="cannot be combined into one"):
        model.add_weighted_adapter(["default"], [1.0], "mean")
    with pytest.raises(ValueError, match=r"adapter_names, .* set_adapter\(\)"):
        model(torch.ones(2, 24), adapter_names=["default", "__base__"])
    embedding = nn.Sequential(nn.Embedding(24, 24))
    with pytest.raises(
        ValueError, match=r"0 is a Embedding in torch.float32; only torch.nn.Linear, transformers' Conv1D and bits"
    ):
        adapted(embedding, GSEConfig(target_modules=["0"]))
    bytes_alone = make_network().to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"first is a Linear in torch.float8_e4m3fn; only torch"):
        adapted(bytes_alone, GSEConfig(target_modules=["first"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 7}, "r must be an integer of at least num_experts, .* found 7"),
        ({"r": 16.0}, "r must be an integer"),
        ({"num_generalized": 9}, "num_generalized must be at most num_experts=8, found 9"),
        ({"num_generalized": 6, "top_k": 3}, "top_k must be at most the 2 specialized experts .* found 3"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, found 0"),
        ({"rho": 0.0}, "rho must be a positive number, found 0.0"),
        ({"base_scale": -1}, "base_scale must be a positive number, found -1"),
        ({"backbone_adjustment": "half"}, r"backbone_adjustment must be one of \('expectation', 'full', 'none'\)"),
        ({"svd": "fast"}, r"svd must be one of \('exact', 'randomized'\), found 'fast'"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef must not be negative, found -0.1"),
        ({"layers_pattern": "layers"}, "layers_pattern has no effect without layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform cannot be combined"),
    ],
)
def test_configurations_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GSEConfig(**options)


def test_models_with_experts_can_be_copied_and_pickled_after_a_step(adapted, make_network, disturb):
    model = adapted(make_network(), GSEConfig(target_modules=["first", "second"]))
    inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    expected = model(inputs)
    clone, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model.get_base_model()))
    disturb(model)
    assert torch.equal(clone(inputs), expected) and torch.equal(loaded(inputs), expected)
    # The copy keeps a log of its own.
    model.eval()
    model(inputs)
    assert clone.get_auxiliary_loss() > 0 and model.get_auxiliary_loss() == 0


def test_a_model_without_peft_s_wrapper(make_network):
    network = inject_adapter_in_model(GSEConfig(target_modules=["first"]), make_network())
    assert not isinstance(network, PeftModel)
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(GSEConfig(target_modules=["second"]), network, "other")
    assert network(torch.ones(2, 24)).shape == (2, 3)
    assert len(network._forward_pre_hooks) == 1
