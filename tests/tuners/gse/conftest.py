"""Small models of linear layers, and the experts written out as a loop."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from hf_aegis.functional.spectral_experts import expert_ranks


class Network(nn.Module):
    """Two linear layers with a nonlinearity between them, and a head."""

    def __init__(self, width=24, hidden=40, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(width, hidden, dtype=dtype)
        self.second = nn.Linear(hidden, width, dtype=dtype)
        self.head = nn.Linear(width, 3, dtype=dtype)

    def forward(self, inputs, attention_mask=None):
        return self.head(self.second(torch.tanh(self.first(inputs))))


def make_network(seed=0, **options):
    torch.manual_seed(seed)
    return Network(**options)


def make_llama(seed=0, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def adapted(model, config, **options):
    with warnings.catch_warnings():
        # peft asks transformers by a name that is deprecated there.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config, **options)


def disturb(model, seed=1, size=0.05):
    """Moves what trains, so that nothing is as it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += size * noise.to(parameter)


def loop_over_experts(layer, inputs, adapter="default"):
    """The formulation of the authors' code: one expert after the other, each on the tokens it gets."""
    config = layer.gse_config[adapter]
    flat = inputs.reshape(-1, inputs.shape[-1])
    ranks = expert_ranks(config.r, config.num_experts)
    downs = layer.gse_A[adapter].split(ranks)
    ups = layer.gse_B[adapter].split(ranks, dim=1)
    scales = layer.gse_scaling[adapter]
    output = layer.get_base_layer()(flat)
    if adapter in layer.gse_backbone_A:
        output = output - flat @ layer.gse_backbone_A[adapter].T @ layer.gse_backbone_B[adapter].T
    for index in range(config.num_generalized):
        expert = functional.linear(functional.linear(flat, downs[index]), ups[index])
        output = output + scales[index] * expert / config.num_generalized
    if config.num_specialized:
        probabilities = functional.linear(flat, layer.gse_router[adapter]).softmax(-1)
        weights, chosen = probabilities.topk(config.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        for number in range(config.num_specialized):
            index = config.num_generalized + number
            tokens, place = torch.where(chosen == number)
            expert = functional.linear(functional.linear(flat[tokens], downs[index]), ups[index])
            output = output.index_add(0, tokens, weights[tokens, place, None] * scales[index] * expert)
    return output.reshape(*inputs.shape[:-1], -1)


@pytest.fixture(name="make_network")
def make_network_fixture():
    return make_network


@pytest.fixture(name="make_llama")
def make_llama_fixture():
    return make_llama


@pytest.fixture(name="adapted")
def adapted_fixture():
    return adapted


@pytest.fixture(name="disturb")
def disturb_fixture():
    return disturb


@pytest.fixture(name="loop_over_experts")
def loop_over_experts_fixture():
    return loop_over_experts
