"""Sampling under `torch.compile`: no graph breaks, few graphs, and the actions that are sampled without it."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend


OBSERVATION = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "state")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def observation(batch):
    return {key: batch[key] for key in OBSERVATION}


@pytest.fixture
def noise():
    return torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def cached(model, observation):
    """What the expert reads of an observation, and the state."""
    with torch.no_grad():
        inputs = {key: value for key, value in observation.items() if key != "state"}
        outputs, prefix = model._encode(**inputs | {"pixel_values": inputs["pixel_values"].flatten(0, 1)})
        return model.action_expert.encode_context(outputs.last_hidden_state, prefix), observation["state"]


@torch.no_grad()
def test_the_velocity_is_one_graph(model, cached, noise):
    cache, state = cached
    timestep = torch.tensor([0.0, 0.3, 0.9])
    expected = model.action_expert(noise, timestep, state, cache=cache)
    compiled = torch.compile(model.action_expert, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(noise, timestep, state, cache=cache), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_all_euler_steps_are_one_graph(model, cached, noise):
    cache, state = cached
    expected = model.action_expert.sample(noise, cache, state, 10)
    compiled = torch.compile(model.action_expert.sample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(noise, cache, state, 10), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="PaliGemma's checks break the graph in torch 2.9")
def test_sampling_as_a_whole_is_one_graph(model, observation, noise):
    expected = model.sample_actions(**observation, noise=noise)
    compiled = torch.compile(model.sample_actions, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**observation, noise=noise), expected, rtol=1e-5, atol=1e-6)


def test_an_expert_compiled_in_place_serves_all_steps_with_one_graph(model, observation, noise):
    expected = {steps: model.sample_actions(**observation, noise=noise, num_steps=steps) for steps in (10, 4)}
    counter = CompileCounterWithBackend("eager")
    model.action_expert.compile(backend=counter, fullgraph=True)
    for steps, actions in expected.items():
        found = model.sample_actions(**observation, noise=noise, num_steps=steps)
        torch.testing.assert_close(found, actions, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    # A second size is compiled for any size; further ones are not compiled for again.
    for rows in (2, 1, 3):
        some = {key: value[:rows] for key, value in observation.items()}
        found = model.sample_actions(**some, noise=noise[:rows])
        torch.testing.assert_close(found, expected[10][:rows], rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3, "one, any, and one row, which torch always compiles for apart"


# What inductor warns of (its own imports, missing GPUs) says nothing about the model.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_inductor_gives_the_same_actions(model, observation, noise):
    expected = model.sample_actions(**observation, noise=noise)
    model.action_expert.compile(fullgraph=True)
    torch.testing.assert_close(model.sample_actions(**observation, noise=noise), expected, rtol=1e-4, atol=1e-5)
