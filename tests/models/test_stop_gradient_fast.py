"""The stop-gradient condition with a FAST head: the language model learns the tokens, the expert never sees them."""

import copy

import pytest
import torch

from hf_aegis.models import PaliGemmaFlowForAction


@pytest.fixture
def flow():
    return {
        "noise": torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(5)),
        "timestep": torch.full((3,), 0.5),
    }


@pytest.fixture
def stopped(vlm, expert):
    torch.manual_seed(1)
    model = PaliGemmaFlowForAction.from_vlm(copy.deepcopy(vlm), **expert, flow_gradient_to_vlm=False)
    torch.nn.init.normal_(model.action_expert.action_out_proj.weight, std=0.3)
    model.freeze_vision_tower()
    return model


def _gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_expert_and_the_prompt_do_not_see_the_action_tokens(model, fast_batch, fast_processor, flow):
    suffix, ids = fast_batch["token_type_ids"] == 1, fast_processor.action_tokenizer.vlm_ids()
    fast = suffix & (fast_batch["input_ids"] != fast_processor.tokenizer.eos_token_id)
    assert (fast.sum(dim=1) > 3).all()
    others = fast_batch["input_ids"].clone()
    others[fast] = ids.start + (others[fast] - ids.start + 7) % len(ids)
    assert not (others == fast_batch["input_ids"])[fast].any()

    expected, found = model(**fast_batch, **flow), model(**fast_batch | {"input_ids": others}, **flow)
    assert torch.equal(found.velocity, expected.velocity)
    assert torch.equal(found.flow_mse, expected.flow_mse)
    prompt = (fast_batch["attention_mask"] == 1) & ~suffix
    assert torch.equal(found.last_hidden_state[prompt], expected.last_hidden_state[prompt])
    # The suffix itself did change.
    assert not torch.equal(found.language_loss, expected.language_loss)
    assert not torch.isclose(found.last_hidden_state[fast], expected.last_hidden_state[fast]).all(dim=-1).any()
    # Nor does it matter whether there is a suffix at all.
    plain = {key: value for key, value in fast_batch.items() if key != "labels"}
    width = int(prompt.sum(dim=1).max())
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        plain[key] = torch.where(prompt, plain[key], 0)[:, :width]
    torch.testing.assert_close(model(**plain, **flow).velocity, expected.velocity, atol=2e-5, rtol=1e-4)


def test_no_gradient_of_the_velocity_reaches_an_embedded_action_token(model, fast_batch, flow):
    embedded = []

    def keep(module, arguments, output):
        output.retain_grad()
        embedded.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    model(**fast_batch, **flow).velocity.square().sum().backward()
    (embedding,) = embedded
    suffix = fast_batch["token_type_ids"] == 1
    assert torch.count_nonzero(embedding.grad[suffix]) == 0
    words = (fast_batch["attention_mask"] == 1) & ~suffix & (fast_batch["input_ids"] != model.config.image_token_index)
    assert (embedding.grad[words].abs().amax(dim=-1) > 0).all()


def test_the_flow_loss_leaves_no_gradient_in_the_vision_language_model(stopped, fast_batch, flow):
    output = stopped(**fast_batch, **flow)
    flow_alone = _gradients(stopped, stopped.config.flow_loss_scale * output.flow_mse)
    assert flow_alone
    assert all(name.startswith("action_expert.") for name in flow_alone)
    # As a gradient of the whole loss too, where there are no tokens to learn.
    without = {key: value for key, value in fast_batch.items() if key != "labels"}
    assert _gradients(stopped, stopped(**without, **flow).loss).keys() == flow_alone.keys()

    # The tokens are what trains it, and they train nothing of the expert.
    tokens_alone = _gradients(stopped, output.language_loss)
    assert not any(name.startswith("action_expert.") for name in tokens_alone)
    trained = {
        name for name, p in stopped.named_parameters() if p.requires_grad and not name.startswith("action_expert.")
    }
    assert tokens_alone.keys() == trained
    both = _gradients(stopped, output.loss)
    assert both.keys() == flow_alone.keys() | tokens_alone.keys()
    for name, gradient in both.items():
        alone = flow_alone[name] if name.startswith("action_expert.") else tokens_alone[name]
        torch.testing.assert_close(gradient, alone)
