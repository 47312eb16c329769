"""The load-balancing loss as a user reads it: by hand, with padding, under gradient checkpointing."""

import pytest
import torch

from hf_aegis import GSEConfig


TARGETS = ["first", "second"]


def by_hand(layer, inputs, mask=None):
    """n_s Σ_j f_j P_j with plain counting."""
    config = layer.gse_config["default"]
    flat = inputs.reshape(-1, inputs.shape[-1])
    if mask is not None:
        flat = flat[mask.reshape(-1).bool()]
    probabilities = (flat @ layer.gse_router["default"].T).softmax(-1)
    chosen = probabilities.topk(config.top_k).indices
    loss = 0.0
    for expert in range(config.num_specialized):
        share = (chosen == expert).sum() / len(flat)
        loss = loss + share * probabilities[:, expert].mean()
    return config.num_specialized * loss


def test_it_is_the_weighted_sum_over_layers(adapted, make_network, disturb):
    model = adapted(make_network(), GSEConfig(target_modules=TARGETS, router_aux_loss_coef=0.25))
    disturb(model, size=0.3)
    inputs = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(0))
    model(inputs)
    base = model.get_base_model()
    hidden = torch.tanh(base.first(inputs))
    model(inputs)
    expected = 0.25 * (by_hand(base.first, inputs) + by_hand(base.second, hidden))
    torch.testing.assert_close(model.get_auxiliary_loss(), expected)
    gradients = torch.autograd.grad(
        model.get_auxiliary_loss(), [layer.gse_router["default"] for layer in (base.first, base.second)]
    )
    assert all((gradient.norm(dim=1) > 0).all() for gradient in gradients)


def test_padding_does_not_count(adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=["first"]))
    inputs = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    layer = model.get_base_model().first
    model(inputs, attention_mask=mask)
    torch.testing.assert_close(model.get_auxiliary_loss(), 0.01 * by_hand(layer, inputs, mask))
    # Of another shape than what the layer sees: it is not about these tokens.
    model(inputs, attention_mask=torch.ones(2, 3))
    torch.testing.assert_close(model.get_auxiliary_loss(), 0.01 * by_hand(layer, inputs))


def test_it_is_of_the_last_forward_pass_in_training(adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=TARGETS))
    assert model.get_auxiliary_loss() == 0
    first, second = (torch.randn(6, 24, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    model(first)
    of_first = model.get_auxiliary_loss()
    model(second)
    of_second = model.get_auxiliary_loss()
    assert of_second != of_first
    assert {name for name, _ in model.routing_records()} == set(TARGETS)
    model.eval()
    model(first)
    assert model.get_auxiliary_loss() == 0 and not model.routing_records()
    model.train()
    model(first)
    assert model.get_auxiliary_loss() == of_first
    with model.disable_adapter():
        model(first)
    assert model.get_auxiliary_loss() == 0


@pytest.mark.parametrize("options", [{"router_aux_loss_coef": 0.0}, {"num_generalized": 8}])
def test_it_can_be_nothing(options, adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=TARGETS, **options))
    model(torch.ones(3, 24))
    assert model.get_auxiliary_loss() == 0


def test_records_tell_load_and_entropy(adapted, make_network):
    model = adapted(make_network(), GSEConfig(target_modules=["first"], top_k=3))
    model(torch.randn(50, 24, generator=torch.Generator().manual_seed(0)))
    (record,) = model.routing_records().values()
    assert record.load.shape == (7,) and record.load.sum().item() == pytest.approx(3.0)
    probabilities = record.probabilities.detach()
    assert record.entropy().item() == pytest.approx(-(probabilities * probabilities.log()).sum(-1).mean().item())
    assert not record.load.requires_grad and not record.entropy().requires_grad


def checkpointed(make_llama, adapted, reentrant=None):
    model = adapted(make_llama(layers=3), GSEConfig(target_modules="all-linear", router_aux_loss_coef=0.1))
    model.config.use_cache = False
    if reentrant is not None:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    return model


def gradients(model, batch, between=lambda: None):
    loss = model(**batch).loss + model.get_auxiliary_loss()
    between()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}, loss.detach()


def make_batch(seed=0):
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def test_gradient_checkpointing_changes_nothing(make_llama, adapted):
    batch = make_batch()
    plain, loss = gradients(checkpointed(make_llama, adapted), batch)
    model = checkpointed(make_llama, adapted, reentrant=False)
    records = {}

    def between():
        records.update(model.routing_records())
        # Another batch in between, as a replayed one: what is recomputed is still the first.
        other = make_batch(1)
        other["attention_mask"][:] = 1
        model(**other)

    found, found_loss = gradients(model, batch, between)
    assert torch.equal(loss, found_loss)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    # What the backward pass recomputed was not noted.
    assert all(model.routing_records()[key] is not record for key, record in records.items())


def test_reentrant_checkpointing_is_refused(make_llama, adapted):
    model = checkpointed(make_llama, adapted, reentrant=True)
    model(**make_batch())
    with pytest.raises(RuntimeError, match=r'ran without gradients.*"use_reentrant": False'):
        model.get_auxiliary_loss()
    with torch.no_grad():
        assert model.get_auxiliary_loss() > 0
