"""Top-k gates and the load-balancing loss, by hand."""

import math

import pytest
import torch

from hf_aegis.functional.expert_routing import load_balance_loss, routing_entropy, token_mean, top_k_gate


def test_the_gate_is_dense_and_sums_to_one():
    logits = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    gate, probabilities, selected = top_k_gate(logits, 2)
    torch.testing.assert_close(gate.sum(-1), torch.ones(5, 6))
    assert torch.equal(selected.sum(-1), torch.full((5, 6), 2.0))
    assert torch.equal(gate > 0, selected > 0)
    weights, indices = probabilities.topk(2)
    torch.testing.assert_close(gate.gather(-1, indices), weights / weights.sum(-1, keepdim=True))


def test_by_hand():
    logits = torch.tensor([5.0, 2.0, 3.0]).log()
    gate, probabilities, selected = top_k_gate(logits, 2)
    torch.testing.assert_close(probabilities, torch.tensor([0.5, 0.2, 0.3]))
    torch.testing.assert_close(gate, torch.tensor([5 / 8, 0.0, 3 / 8]))
    assert selected.tolist() == [1.0, 0.0, 1.0]


def test_equal_logits_still_select_k():
    gate, _, selected = top_k_gate(torch.zeros(4, 7), 3)
    assert selected.sum(-1).tolist() == [3.0] * 4
    torch.testing.assert_close(gate.max(-1).values, torch.full((4,), 1 / 3))


def test_gradients_reach_selected_logits_through_the_weights_and_agree_with_differences():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (top_k_gate(x, 2)[0] * coefficients).sum(), logits)


def test_half_precision_is_softmaxed_in_float32():
    logits = torch.randn(8, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate, probabilities, _ = top_k_gate(logits, 2)
    assert gate.dtype == probabilities.dtype == torch.float32
    assert torch.equal(probabilities, logits.float().softmax(-1))


def test_the_balance_loss_by_hand():
    # Four tokens, three experts, two each. Expert 0 gets all, 1 gets three, 2 gets one.
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3]])
    selected = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 1]])
    load, probability = token_mean(selected), token_mean(probabilities)
    assert load.tolist() == [1.0, 0.75, 0.25]
    torch.testing.assert_close(probability, torch.tensor([0.6, 0.25, 0.15]))
    # 3 · (1 · 0.6 + 0.75 · 0.25 + 0.25 · 0.15) = 3 · 0.825
    assert load_balance_loss(load, probability).item() == pytest.approx(2.475)
    # Without the last token, which is padding: 3 · (1 · 0.6 + 1 · 0.3).
    mask = torch.tensor([1, 1, 1, 0])
    loss = load_balance_loss(token_mean(selected, mask), token_mean(probabilities, mask))
    assert loss.item() == pytest.approx(2.7)


def test_an_even_load_is_k_and_the_least_even_is_the_number_of_experts():
    even = torch.full((7,), 2 / 7), torch.full((7,), 1 / 7)
    assert load_balance_loss(*even).item() == pytest.approx(2.0)
    one = torch.eye(7)[0]
    assert load_balance_loss(one, one).item() == pytest.approx(7.0)


def test_masked_means():
    values = torch.arange(12.0).reshape(2, 3, 2)
    assert token_mean(values).tolist() == [5.0, 6.0]
    assert token_mean(values, torch.tensor([[1, 0, 0], [0, 0, 1]])).tolist() == [5.0, 6.0]
    assert token_mean(values, torch.tensor([[True, True, False], [False] * 3])).tolist() == [1.0, 2.0]
    assert token_mean(values, torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_entropy():
    probabilities = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    assert routing_entropy(probabilities).item() == pytest.approx(math.log(4) / 2)
    assert routing_entropy(probabilities, torch.tensor([1, 0])).item() == pytest.approx(math.log(4))
