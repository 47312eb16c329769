import pytest
import torch

from hf_aegis.functional.flow_matching import (
    euler_integrate,
    flow_matching_loss,
    interpolate,
    sample_timesteps,
    target_velocity,
)
from hf_aegis.models import ActionExpert, PaliGemmaFlowConfig


@pytest.fixture
def action_expert(vlm_config, expert):
    parts = {"text_config": vlm_config.text_config, "vision_config": vlm_config.vision_config}
    torch.manual_seed(0)
    return ActionExpert(PaliGemmaFlowConfig(**parts, **expert))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    return {
        "noisy_actions": draw(2, 5, 3),
        "timestep": torch.tensor([0.2, 0.7]),
        "state": draw(2, 4),
        "hidden_states": draw(2, 6, 32),
        "attention_mask": mask,
    }


def test_cached_context_gives_the_same_velocity(action_expert, inputs):
    expected = action_expert(**inputs)
    cache = action_expert.encode_context(inputs.pop("hidden_states"), inputs.pop("attention_mask"))
    assert len(cache.keys) == len(cache.values) == 2
    assert cache.keys[0].shape == (2, 4, 6, 8)
    assert torch.equal(action_expert(**inputs, cache=cache), expected)


def test_masked_context_is_not_read(action_expert, inputs):
    expected = action_expert(**inputs)
    inputs["hidden_states"][0, 4:] = 1e3
    torch.testing.assert_close(action_expert(**inputs), expected)
    inputs["hidden_states"][0, 3] = 1e3
    assert not torch.allclose(action_expert(**inputs), expected, atol=1e-3)


def test_every_input_matters(action_expert, inputs):
    expected = action_expert(**inputs)
    for key in ("noisy_actions", "state", "hidden_states", "timestep"):
        changed = inputs | {key: inputs[key] * 0.5}
        assert not torch.allclose(action_expert(**changed), expected, atol=1e-4), key
    # Without positions, permuting the chunk would only permute the velocity.
    flipped = action_expert(**inputs | {"noisy_actions": inputs["noisy_actions"].flip(1)}).flip(1)
    assert not torch.allclose(flipped, expected, atol=1e-3)


def test_scale_of_the_hidden_states_does_not_matter(action_expert, inputs):
    torch.nn.init.zeros_(action_expert.vlm_projection.bias)
    expected = action_expert(**inputs)
    inputs["hidden_states"] = inputs["hidden_states"] * 50
    torch.testing.assert_close(action_expert(**inputs), expected, atol=1e-3, rtol=1e-3)


def test_context_is_given_once(action_expert, inputs):
    cache = action_expert.encode_context(inputs["hidden_states"], inputs["attention_mask"])
    with pytest.raises(ValueError, match="not both"):
        action_expert(**inputs, cache=cache)
    with pytest.raises(ValueError, match="needs `cache`"):
        action_expert(inputs["noisy_actions"], inputs["timestep"], inputs["state"])
    with pytest.raises(ValueError, match="`state` is missing"):
        action_expert(inputs["noisy_actions"], inputs["timestep"], cache=cache)


def test_learns_chunks_that_depend_on_the_context(action_expert, inputs):
    torch.manual_seed(0)
    actions = torch.rand(2, 5, 3) * 2 - 1
    hidden_states, mask = (
        inputs[key].repeat(8, *[1] * (inputs[key].ndim - 1)) for key in ("hidden_states", "attention_mask")
    )
    state, targets = torch.zeros(16, 4), actions.repeat(8, 1, 1)
    optimizer = torch.optim.Adam(action_expert.parameters(), lr=3e-3)
    for _ in range(220):
        noise, t = torch.randn(targets.shape), sample_timesteps(16)
        velocity = action_expert(interpolate(noise, targets, t), t, state, hidden_states, mask)
        loss = flow_matching_loss(velocity, target_velocity(noise, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        cache = action_expert.encode_context(hidden_states, mask)
        found = euler_integrate(lambda x, t: action_expert(x, t, state, cache=cache), torch.randn(targets.shape), 10)
    blind_error = (actions - actions.mean(dim=0)).abs().mean()
    assert (found - targets).abs().mean() < 0.6 * blind_error
