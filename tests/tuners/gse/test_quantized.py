"""Experts on layers that bitsandbytes quantised: decomposed as they are decoded, never merged."""

import pytest
import torch
from torch import nn

from hf_aegis import GSEConfig


def quantized(kind):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    if kind == "4bit":
        layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    # Moving them quantises them.
    return nn.Sequential(layer).to("cpu")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_quantized_layers_get_experts(kind, adapted, disturb):
    network = quantized(kind)
    base = network[0]
    inputs = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    before = network(inputs)
    model = adapted(network, GSEConfig(target_modules=["0"]))
    layer = model.get_base_model()[0]
    assert layer.is_quantized and layer.get_base_layer() is base
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    _, values, _ = torch.linalg.svd(layer.base_weight().float())
    torch.testing.assert_close(layer.gse_backbone_A["default"].norm(dim=1), (values[:16] / 10).sqrt())
    assert 0 < (model(inputs) - before).norm() / before.norm() < 0.05
    disturb(model)
    model(inputs).square().sum().backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(inputs), before)
    assert model.unload()[0] is base


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_merging_into_quantized_weights_is_refused(kind, adapted):
    model = adapted(quantized(kind), GSEConfig(target_modules=["0"], num_generalized=8))
    with pytest.raises(ValueError, match="0 is quantised: merging would round the adapter away"):
        model.merge_and_unload()
