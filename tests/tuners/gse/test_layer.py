"""One layer with experts: against a loop over experts, at its start, its gradients and dtypes."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_aegis import GSEConfig
from hf_aegis.functional.spectral_experts import expert_ranks


@pytest.fixture
def one_layer(adapted):
    def make(weight, **options):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
        torch.manual_seed(0)
        model = adapted(nn.Sequential(linear), GSEConfig(target_modules=["0"], **options))
        return model, model.get_base_model()[0]

    return make


def gaussian(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 11, "num_experts": 4, "top_k": 3},
        {"num_generalized": 2, "top_k": 1},
        {"num_generalized": 0},
        {"num_generalized": 8},
        {"r": 10, "num_generalized": 8},
        {"backbone_adjustment": "none"},
        {"backbone_adjustment": "full", "base_scale": None},
        {"init_weights": False},
    ],
)
def test_it_computes_what_a_loop_over_experts_does(options, one_layer, disturb, loop_over_experts):
    model, layer = one_layer(gaussian(20, 30, dtype=torch.float64), **options)
    disturb(model)
    inputs = gaussian(35, 30, seed=3, dtype=torch.float64).reshape(5, 7, 30).requires_grad_()
    found, expected = model(inputs), loop_over_experts(layer, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    trained = [inputs, *(p for p in model.parameters() if p.requires_grad)]
    cotangent = gaussian(35, 20, seed=4, dtype=torch.float64).reshape(5, 7, 20)
    for ours, theirs in zip(
        torch.autograd.grad(found, trained, cotangent, retain_graph=True),
        torch.autograd.grad(expected, trained, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_each_expert_starts_at_its_slice_of_the_weight(one_layer):
    weight = gaussian(20, 30, dtype=torch.float64)
    _, layer = one_layer(weight)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    downs, ups = layer.gse_A["default"].split(2), layer.gse_B["default"].split(2, dim=1)
    for index, scale in enumerate(layer.gse_scaling["default"]):
        part = slice(2 * index, 2 * index + 2)
        torch.testing.assert_close(
            scale * ups[index] @ downs[index], left[:, part] @ torch.diag(values[part]) @ right[part] / 10
        )


@pytest.mark.parametrize(("adjustment", "error"), [("expectation", 0.010), ("full", 0.040)])
def test_how_far_the_output_is_off_at_the_start(adjustment, error, one_layer):
    weight = gaussian(256, 256)
    inputs = gaussian(4096, 256, seed=1)
    model, _ = one_layer(weight, backbone_adjustment=adjustment)
    expected = inputs @ weight.T
    with torch.no_grad():
        found = (model(inputs) - expected).norm() / expected.norm()
    assert found.item() == pytest.approx(error, rel=0.15)


def test_without_adjustment_and_with_zero_experts_the_output_is_the_base_models(one_layer):
    model, layer = one_layer(gaussian(20, 30), backbone_adjustment="none", init_weights=False)
    inputs = gaussian(9, 30, seed=1)
    assert torch.equal(model(inputs), layer.base_layer(inputs))
    # It learns from there: B's gradient is not zero.
    model(inputs).square().sum().backward()
    assert layer.gse_B["default"].grad.norm() > 0


def test_generalized_experts_alone_start_as_the_base_model(one_layer):
    for adjustment in ("expectation", "full"):
        model, layer = one_layer(gaussian(20, 30), num_generalized=8, backbone_adjustment=adjustment)
        inputs = gaussian(9, 30, seed=1)
        torch.testing.assert_close(model(inputs), layer.base_layer(inputs))


def test_gradients_reach_every_routed_expert_and_the_router(one_layer):
    model, layer = one_layer(gaussian(48, 40), r=16)
    (model(gaussian(64, 40, seed=1)) ** 2).sum().backward()
    router = layer.gse_router["default"].grad
    assert router.shape == (7, 40)
    assert (router.norm(dim=1) > 0).all()
    for gradient, dim in ((layer.gse_A["default"].grad, 1), (layer.gse_B["default"].grad, 0)):
        assert (gradient.norm(dim=dim) > 0).all()
    frozen = [layer.gse_scaling, layer.gse_backbone_A, layer.gse_backbone_B]
    assert not any(factors["default"].requires_grad for factors in frozen)


def test_balanced_scales_even_the_gradients_out(one_layer):
    # On a falling spectrum, the weakest specialized expert's gradient falls behind with equal scales.
    left, right = (torch.linalg.qr(gaussian(40, 40, seed=seed))[0] for seed in (0, 1))
    weight = left @ torch.diag(0.8 ** torch.arange(40.0)) @ right
    spreads = {}
    for base_scale in (2.0, None):
        model, layer = one_layer(weight, base_scale=base_scale, top_k=7)
        model(gaussian(256, 40, seed=2)).square().sum().backward()
        norms = torch.stack([part.norm() for part in layer.gse_B["default"].grad.split(2, dim=1)])[1:]
        spreads[base_scale] = (norms.max() / norms.min()).item()
    assert spreads[2.0] < spreads[None] / 1.5


def test_the_base_weight_is_not_touched(adapted, disturb, make_network):
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    model = adapted(network, GSEConfig(target_modules=["first", "second"]))
    disturb(model)
    inputs = gaussian(9, 24)
    with model.disable_adapter():
        found = model(inputs)
    untouched = make_network()
    assert torch.equal(found, untouched(inputs))
    assert not torch.equal(model(inputs), found)
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in unloaded.state_dict().items())
    assert not unloaded._forward_pre_hooks


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_a_bfloat16_model(autocast, adapted):
    weight = gaussian(32, 32).bfloat16()
    network = nn.Sequential(nn.Linear(32, 32, bias=False, dtype=torch.bfloat16))
    with torch.no_grad():
        network[0].weight.copy_(weight)
    model = adapted(network, GSEConfig(target_modules=["0"]), autocast_adapter_dtype=autocast)
    layer = network[0]
    trained = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    # The decomposition is not rounded on its way.
    assert layer.gse_backbone_A["default"].dtype == torch.float32
    _, exact, _ = torch.linalg.svd(weight.float())
    norms = layer.gse_backbone_A["default"].norm(dim=1)
    torch.testing.assert_close(norms, (exact[:16] / 10).sqrt(), rtol=1e-5, atol=0)
    inputs = gaussian(64, 32, seed=1).bfloat16()
    output = model(inputs)
    assert output.dtype == torch.bfloat16
    expected = inputs.float() @ weight.float().T
    assert ((output.float() - expected).norm() / expected.norm()).item() < 0.05


def test_under_autocast(one_layer):
    model, layer = one_layer(gaussian(32, 32))
    inputs = gaussian(64, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(inputs)
        expected = layer.base_layer(inputs)
    assert output.dtype == torch.bfloat16
    assert ((output - expected).norm() / expected.norm()).item() < 0.05
    output.float().square().sum().backward()
    assert layer.gse_router["default"].grad.isfinite().all()


def test_conv1d_is_a_linear_layer_with_its_weight_transposed(one_layer, adapted):
    weight = gaussian(20, 30, dtype=torch.float64)
    conv = Conv1D(20, 30).double()
    with torch.no_grad():
        conv.weight.copy_(weight.T)
    torch.manual_seed(0)
    turned = adapted(nn.Sequential(conv), GSEConfig(target_modules=["0"]))
    plain, _ = one_layer(weight)
    inputs = gaussian(9, 30, seed=1, dtype=torch.float64)
    torch.testing.assert_close(turned(inputs), plain(inputs))


def test_randomized_decomposition_starts_close_to_the_exact_one(one_layer):
    weight = gaussian(64, 64) + 8 * gaussian(64, 20, seed=1) @ gaussian(20, 64, seed=2)
    inputs = gaussian(50, 64, seed=3)
    exact, exact_layer = one_layer(weight)
    found, layer = one_layer(weight, svd="randomized")
    torch.testing.assert_close(layer.gse_scaling["default"], exact_layer.gse_scaling["default"], rtol=1e-3, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(found(inputs), exact(inputs), rtol=1e-3, atol=0.05)


def test_a_layer_too_small_for_the_rank_is_named(adapted, make_network):
    with pytest.raises(ValueError, match=r"head: r=16, but a weight of shape \(3, 24\) .* exclude_modules"):
        adapted(make_network(), GSEConfig(target_modules=["first", "head"]))


def test_a_weight_without_the_rank_is_named(one_layer):
    weight = gaussian(20, 5) @ gaussian(5, 30)
    with pytest.raises(ValueError, match=r"0: r=16, but its weight has a rank of 5 only"):
        one_layer(weight)


def test_it_compiles_in_one_graph(one_layer):
    _, layer = one_layer(gaussian(20, 30), r=11, num_experts=4)
    inputs = gaussian(9, 30, seed=1)
    expected = layer(inputs)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), expected)


def test_ranks_of_the_experts_fill_the_stack(one_layer):
    _, layer = one_layer(gaussian(20, 30), r=11, num_experts=4)
    assert expert_ranks(11, 4) == [3, 3, 3, 2]
    assert layer.gse_A["default"].shape == (11, 30)
    assert layer.gse_scaling["default"].shape == (4,)
    assert layer.gse_router["default"].shape == (3, 30)


@pytest.mark.parametrize("options", [{}, {"autocast_adapter_dtype": False}])
def test_what_is_frozen_stays_so_when_it_is_moved_or_cast(options, adapted, make_network):
    network = make_network(dtype=torch.bfloat16)
    model = adapted(network, GSEConfig(target_modules=["first"]), **options)
    model.add_adapter("other", GSEConfig(target_modules=["first"]), **options)
    layer, names = network.first, ("gse_A", "gse_B", "gse_router", "gse_scaling", "gse_backbone_A", "gse_backbone_B")
    expected = {f"{name}.default" for name in names[:3]}
    for device in ("cpu", "meta"):
        for adapter in ("default", "other"):
            layer._move_adapter_to_device_of_base_layer(adapter, torch.device(device))
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == expected
        assert {getattr(layer, name)["other"].device.type for name in names} == {device}
