import json

import numpy as np
import pytest
import torch

from hf_aegis.data.vqa import VQACollator
from hf_aegis.evaluation.gradient_spectra import gradient_spectra
from hf_aegis.models import PaliGemmaFlowForAction


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

EXPERT = {"expert_hidden_size": 32, "expert_num_layers": 1, "expert_num_heads": 4, "expert_intermediate_size": 32}


@pytest.fixture
def flow_model(tiny_model):
    torch.manual_seed(1)
    return PaliGemmaFlowForAction.from_vlm(tiny_model, chunk_size=3, **EXPERT)


@pytest.fixture
def vqa_batches(tiny_processor, samples):
    collator = VQACollator(tiny_processor)
    return [dict(collator(samples[:4])), dict(collator(samples[4:6]))]


@pytest.fixture
def flow_batches(flow_model, tiny_processor, samples):
    torch.manual_seed(2)
    config, batches = flow_model.config, []
    for chunk in (samples[:2], samples[2:5]):
        actions = torch.randn(len(chunk), config.chunk_size, config.action_dim)
        batches.append(
            {
                **VQACollator(tiny_processor).prompts(chunk),
                "state": torch.randn(len(chunk), config.state_dim),
                "actions": actions,
                "noise": torch.randn_like(actions),
                "timestep": torch.rand(len(chunk)),
            }
        )
    return batches


def expected(model, batches, loss_of):
    """NumPy's singular values of what `backward` leaves in `.grad`, of the mean over all samples."""
    model.eval()
    model.zero_grad()
    samples = sum(len(batch["input_ids"]) for batch in batches)
    for batch in batches:
        (loss_of(model(**batch)) * len(batch["input_ids"]) / samples).backward()
    found = {
        name: np.linalg.svd(parameter.grad.double().numpy(), compute_uv=False)
        for name, parameter in model.model.language_model.layers.named_parameters()
        if parameter.ndim == 2
    }
    model.zero_grad()
    return found


def flat(spectra, loss):
    return {
        f"{layer['name'].removeprefix('layers.')}.{name}.weight": values[loss]
        for layer in spectra["layers"]
        for name, values in layer["matrices"].items()
    }


def test_spectra_are_those_of_the_gradients_that_backward_computes(flow_model, vqa_batches, flow_batches):
    spectra = json.loads(json.dumps(gradient_spectra(flow_model, vqa_batches, flow_batches)))
    assert (spectra["samples"], spectra["flow_samples"]) == (6, 5)
    assert [layer["name"] for layer in spectra["layers"]] == ["layers.0", "layers.1"]
    for loss, batches, loss_of in (
        ("cross_entropy", vqa_batches, lambda output: output.loss),
        ("flow", flow_batches, lambda output: output.loss / flow_model.config.flow_loss_scale),
    ):
        reference = expected(flow_model, batches, loss_of)
        found = flat(spectra, loss)
        assert found.keys() == reference.keys()
        assert len(found) == 2 * 7
        for name, values in reference.items():
            assert values[0] > 0
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-5 * values[0], err_msg=name)
            assert found[name] == sorted(found[name], reverse=True)


def test_the_model_is_left_as_it_was(flow_model, vqa_batches, flow_batches):
    for batch in flow_batches:
        del batch["noise"], batch["timestep"]
    flow_model.train()
    flow_model.freeze_vision_tower()
    flow_model.model.vision_tower.eval()
    frozen = flow_model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    for index, parameter in enumerate(flow_model.parameters()):
        if index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
    modes = [module.training for module in flow_model.modules()]
    trained = [parameter.requires_grad for parameter in flow_model.parameters()]
    state = torch.get_rng_state()
    first = gradient_spectra(flow_model, vqa_batches, flow_batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in flow_model.modules()] == modes
    assert [parameter.requires_grad for parameter in flow_model.parameters()] == trained
    for index, parameter in enumerate(flow_model.parameters()):
        assert (parameter.grad is None) if not index % 2 else (parameter.grad == index).all()
    # A frozen weight has a spectrum too, and the draws were those of the state that was kept.
    assert first["layers"][0]["matrices"]["mlp.up_proj"]["flow"][0] > 0
    assert gradient_spectra(flow_model, vqa_batches, flow_batches) == first
    assert not frozen.requires_grad


def test_a_loss_that_does_not_reach_the_layers_has_an_empty_spectrum(flow_model, vqa_batches, flow_batches):
    flow_model.config.flow_gradient_to_vlm = False
    spectra = gradient_spectra(flow_model, vqa_batches, flow_batches)
    assert {max(values) for values in flat(spectra, "flow").values()} == {0.0}
    assert min(max(values) for values in flat(spectra, "cross_entropy").values()) > 0


def test_missing_batches_and_losses_are_refused(flow_model, vqa_batches, flow_batches):
    with pytest.raises(ValueError, match="flow batches: there are none"):
        gradient_spectra(flow_model, vqa_batches, [])
    del vqa_batches[0]["labels"]
    with pytest.raises(ValueError, match="VQA batches: PaliGemmaFlowForAction gave no loss for a batch of input_ids"):
        gradient_spectra(flow_model, vqa_batches, flow_batches)
