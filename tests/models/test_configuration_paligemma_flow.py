import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_aegis.models import PaliGemmaFlowConfig


def test_round_trip(vlm_config, expert, tmp_path):
    parts = {"text_config": vlm_config.text_config, "vision_config": vlm_config.vision_config}
    config = PaliGemmaFlowConfig(**parts, **expert, time_sampling="uniform", flow_loss_scale=3, vlm_name_or_path="a/b")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PaliGemmaFlowConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.time_sampling, loaded.flow_loss_scale, loaded.vlm_name_or_path) == ("uniform", 3, "a/b")
    assert loaded.text_config.model_type == "gemma2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_dim": 0}, "action_dim must be at least 1, found 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"expert_hidden_size": 33, "expert_num_heads": 3}, "expert_hidden_size must be even, found 33"),
        ({"expert_hidden_size": 32, "expert_num_heads": 3}, "must divide expert_hidden_size, found 3 and 32"),
        ({"flow_loss_scale": 0.0}, r"flow_loss_scale must be positive, found 0\.0"),
        ({"min_period": 5.0}, "min_period < max_period"),
        ({"time_sampling_beta_alpha": -1.0}, "alpha > 0"),
        ({"time_sampling_offset": 0.5}, r"stay in \[0, 1\]"),
        ({"time_sampling": "normal"}, "time_sampling"),
        ({"chunk_size": "50"}, "chunk_size"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        PaliGemmaFlowConfig(**change)
