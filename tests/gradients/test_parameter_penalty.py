"""Quadratic penalties and the Fisher information against autograd in float64."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_aegis.gradients import QuadraticPenalty, fisher_diagonal


def move(parameters, by=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def written_out(parameters, start, scale, weights=None):
    return scale / 2 * sum(
        ((1.0 if weights is None else weights[name]) * (parameter - start[name]) ** 2).sum()
        for name, parameter in parameters.items()
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_equal_autograd(network, weighted):
    parameters = dict(network.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    weights = {name: torch.rand_like(p) for name, p in start.items()} if weighted else None
    penalty = QuadraticPenalty(parameters, 3.0, weights)
    assert penalty.value() == 0
    move(parameters)
    expected = written_out(parameters, start, 3.0, weights)
    torch.testing.assert_close(penalty.value(), expected.detach())
    assert not penalty.value().requires_grad
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    parameters["0.bias"].grad = torch.ones(5).double()
    penalty.add_gradients()
    penalty.add_gradients(factor=0.5)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 1.5 * gradient + (name == "0.bias"))


def test_steps_along_the_penalty_go_home(network):
    """Each step of rate 1/λ ends where the parameters started; those that were frozen meanwhile stay."""
    parameters = dict(network.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    penalty = QuadraticPenalty(parameters, 4.0)
    move(parameters)
    network[0].requires_grad_(False)
    frozen = network[0].weight.clone()
    penalty.add_gradients()
    assert network[0].weight.grad is None
    torch.optim.SGD(network.parameters(), lr=0.25).step()
    assert torch.equal(network[0].weight, frozen)
    torch.testing.assert_close(network[2].weight.detach(), start["2.weight"])


def test_bfloat16_parameters(network):
    network.bfloat16()
    parameters = dict(network.named_parameters())
    start = {name: parameter.detach().double() for name, parameter in parameters.items()}
    penalty = QuadraticPenalty(parameters, 2.0)
    move(parameters)
    penalty.add_gradients()
    assert all(p.grad.dtype == torch.bfloat16 for p in parameters.values())
    exact = {name: parameter.detach().double() for name, parameter in parameters.items()}
    assert penalty.value().dtype == torch.float32
    assert penalty.value().item() == pytest.approx(float(written_out(exact, start, 2.0)), rel=1e-5)


class Regression(nn.Module):
    """Squared error with dropout, whose Fisher information can be written down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1, bias=False).double()
        self.unused = nn.Linear(1, 1).double()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        error = self.linear(self.dropout(x))
        return type("Output", (), {"loss": error.square().mean()})()


def test_fisher_of_single_samples_is_the_mean_of_their_squared_gradients():
    model = Regression().train()
    model.unused.eval()
    samples = torch.randn(7, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.linear.weight.grad = torch.ones(1, 3).double()
    state = torch.get_rng_state()
    fisher = fisher_diagonal(model, parameters, [{"x": x} for x in samples], progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.dropout.training and not model.unused.training
    assert torch.equal(model.linear.weight.grad, torch.ones(1, 3).double())
    assert model.unused.weight.grad is None
    # L = (w · x)², so ∂L/∂w = 2 (w · x) x.
    with torch.no_grad():
        by_hand = (2 * (samples[:, 0] @ model.linear.weight[0])[:, None] * samples[:, 0]).square().mean(dim=0)
    torch.testing.assert_close(fisher["linear.weight"][0], by_hand)
    assert not fisher["unused.weight"].any()


def test_fisher_of_batches_squares_the_batches_mean_gradient():
    model = Regression()
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = dict(model.linear.named_parameters())
    fisher = fisher_diagonal(model, parameters, [{"x": batch}], lambda m, b: 3 * m(**b).loss, progress=False)
    model.eval()
    (gradient,) = torch.autograd.grad(3 * model(batch).loss, list(parameters.values()))
    torch.testing.assert_close(fisher["weight"], gradient.square())


def test_elastic_weight_consolidation_of_a_language_model():
    """λ F (θ − θ*) by both parts together, on a transformer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)).double().train()
    parameters = dict(model.named_parameters())
    ids = torch.randint(0, 20, (3, 1, 6), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": row, "labels": row} for row in ids]
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches:
        for name, g in zip(parameters, torch.autograd.grad(model(**batch).loss, [*parameters.values()]), strict=True):
            squares[name] += g.square() / 3
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    penalty = QuadraticPenalty(parameters, 50.0, fisher_diagonal(model, parameters, batches, progress=False))
    assert model.training
    move(parameters)
    penalty.add_gradients()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, 50.0 * squares[name] * (parameter.detach() - start[name]))


def test_refusals(network):
    parameters = dict(network.named_parameters())
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    for arguments, message in (
        (({}, 1.0), "needs at least one"),
        ((parameters, 0.0), "scale must be positive, found 0.0"),
        ((parameters, float("nan")), "scale must be positive, found nan"),
        ((parameters, 1.0, {}), r"no weights for the parameter '0.weight', found those of \[\]"),
        (
            (parameters, 1.0, {**ones, "0.bias": torch.ones(4)}),
            r"weights of '0.bias' have shape \(4,\), expected \(5,\)",
        ),
        ((parameters, 1.0, {**ones, "0.bias": -torch.ones(5)}), "weights of '0.bias' must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            QuadraticPenalty(*arguments)
    for model_parameters, batches, message in (
        ({}, [], "needs at least one parameter"),
        (parameters, [], "the iterable is empty"),
        (parameters, [{"x": torch.full((1, 4), float("nan")).double()}], "batch 0: its loss, nan, has a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher_diagonal(network, model_parameters, batches, lambda m, b: m(b["x"]).sum(), progress=False)
