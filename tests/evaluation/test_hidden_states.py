import pytest
import torch

from hf_aegis.evaluation.hidden_states import mean_hidden_states
from hf_aegis.models import PaliGemmaFlowForAction


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def expected(model, processor, samples):
    """One sample at a time, without padding, as the model itself reports its hidden states."""
    rows = []
    for sample in samples:
        inputs = processor(images=sample.image, text=f"<image>answer en {sample.question}", return_tensors="pt")
        del inputs["labels"]
        with torch.no_grad():
            rows.append(model(**inputs, output_hidden_states=True).hidden_states[-1][0].mean(0))
    return torch.stack(rows)


def test_means_are_over_the_prompts_tokens_alone(tiny_model, tiny_processor, samples):
    assert len({len(sample.question) for sample in samples}) > 1
    reference = expected(tiny_model.eval(), tiny_processor, samples)
    for batch_size in (1, 5, 64):
        found = mean_hidden_states(tiny_model, tiny_processor, samples, batch_size=batch_size)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
    assert found.std(0).max() > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_models_with_an_expert_and_with_adapters_are_read_alike(tiny_model, tiny_processor, samples):
    from peft import LoraConfig, get_peft_model

    reference = mean_hidden_states(tiny_model, tiny_processor, samples)
    expert = {"expert_hidden_size": 32, "expert_num_layers": 1, "expert_num_heads": 4, "expert_intermediate_size": 32}
    model = PaliGemmaFlowForAction.from_vlm(tiny_model, **expert)
    assert torch.equal(mean_hidden_states(model, tiny_processor, samples), reference)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(mean_hidden_states(wrapped, tiny_processor, samples), reference)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    assert not torch.allclose(mean_hidden_states(wrapped, tiny_processor, samples), reference, atol=1e-3)


def test_mode_and_random_state_are_restored(tiny_model, tiny_processor, samples):
    tiny_model.register_forward_pre_hook(lambda *_: torch.rand(3))
    tiny_model.train()
    tiny_model.model.vision_tower.eval()
    modes = [module.training for module in tiny_model.modules()]
    state = torch.get_rng_state()
    assert not mean_hidden_states(tiny_model, tiny_processor, samples).requires_grad
    assert [module.training for module in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_average_is_refused(tiny_model, tiny_processor, samples):
    with pytest.raises(ValueError, match="at least one sample"):
        mean_hidden_states(tiny_model, tiny_processor, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1; found 0"):
        mean_hidden_states(tiny_model, tiny_processor, samples, batch_size=0)
