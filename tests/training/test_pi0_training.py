"""transformers' π0, plain language models and LoRA adapters through the same trainer."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PI0Config,
    PI0ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.training import AEGISTrainer
from hf_aegis.training.expert_parameters import expert_modules
from hf_aegis.training.json_lines import JSONLines


# PEFT asks the model by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
IMAGE_TOKEN, IMAGE_TOKENS, LENGTH = 60, 4, 10
EXPERT = ["action_out_proj", "embed_action_time", "model.dit"]


class RobotDataset(Dataset):
    """Random samples as π0's processor would make them, with the flow's noise and time fixed per sample."""

    def __init__(self, size, seed=0):
        self.seeds = [seed * 1000 + index for index in range(size)]

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seeds[index])
        input_ids = torch.randint(1, IMAGE_TOKEN, (LENGTH,), generator=generator)
        input_ids[:IMAGE_TOKENS] = IMAGE_TOKEN
        attention_mask = torch.ones(LENGTH, dtype=torch.int64)
        attention_mask[LENGTH - index % 3 :] = 0
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": torch.randn(1, 3, 16, 16, generator=generator),
            "pixel_attention_mask": torch.ones(1, dtype=torch.bool),
            "state": torch.randn(32, generator=generator),
            "actions": torch.randn(4, 32, generator=generator),
            "noise": torch.randn(4, 32, generator=generator),
            "timestep": torch.rand((), generator=generator),
        }


def batches_of(dataset):
    rows = [dataset[index] for index in range(len(dataset))]
    return [{key: torch.stack([row[key] for row in rows]) for key in rows[0]}]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def make_pi0():
    def make():
        torch.manual_seed(0)
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
        }
        vlm = PaliGemmaConfig(
            text_config={"model_type": "gemma", **TEXT, "use_cache": False},
            vision_config=vision,
            image_token_index=IMAGE_TOKEN,
            projection_dim=16,
        )
        expert = {"model_type": "gemma", **TEXT, "hidden_size": 8, "intermediate_size": 12}
        return PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=4))

    return make


def test_pi0s_layers_cannot_run_on_parts_of_a_batch(make_pi0_trainer):
    with pytest.raises(ValueError, match=r"reference_share=0\.5 is not supported with PI0ForConditionalGeneration"):
        make_pi0_trainer(reference_share=0.5)


@pytest.fixture
def make_pi0_trainer(make_pi0, make_args):
    # The layers are found inside π0 itself, so its own batches collect the anchor.
    def make(model=None, **changes):
        model = make_pi0() if model is None else model
        anchor = ActivationAnchor.collect(model, batches_of(RobotDataset(6, seed=1)), progress=False)
        args = make_args(**{"max_steps": 2, "learning_rate": 1e-3, "expert_learning_rate": 2e-3, **changes})
        return AEGISTrainer(model, args, anchor, train_dataset=RobotDataset(8), eval_dataset=RobotDataset(4, seed=2))

    return make


def test_pi0_both_forms_agree(make_pi0_trainer, tmp_path):
    trained = {}
    for form in ("streaming", "two_pass"):
        folder = tmp_path / form
        trainer = make_pi0_trainer(output_dir=str(folder), dual_backward=form, optim="sgd", expert_learning_rate=None)
        before = weights(trainer.model)
        trainer.train()
        trained[form] = {name: value - before[name] for name, value in weights(trainer.model).items()}
        lines = JSONLines(folder / "projection.jsonl").read()
        assert [r["step"] for r in lines] == [1, 2]
        assert "multi_modal_projector" in lines[0]["groups"]
        assert any(d < 0 for r in lines for d in r["dot"])
    for name, change in trained["two_pass"].items():
        assert (trained["streaming"][name] - change).norm() <= 1e-3 * change.norm() + 1e-7, name
    moved = [name for name, change in trained["streaming"].items() if change.any()]
    assert any("vlm.language_model.layers.0" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


def test_pi0s_expert_is_all_but_the_vlm(make_pi0_trainer):
    trainer = make_pi0_trainer(max_steps=3)
    model = trainer.model
    assert expert_modules(model) == EXPERT
    beside = {name for name, _ in model.named_parameters() if not name.startswith("model.vlm.")}
    assert set(trainer.ema.parameters) == beside
    start = {name: value.float() for name, value in weights(model).items() if name in beside}
    trainer.train()
    rates = {
        name: group["initial_lr"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
        for name, other in model.named_parameters()
        if other is parameter
    }
    assert {rates[name] for name in beside if name in rates} == {2e-3}
    assert {rate for name, rate in rates.items() if name not in beside} == {1e-3}
    moved = [name for name in beside if not torch.equal(start[name], trainer.ema.average[name])]
    assert len(moved) > len(beside) / 2
    # Training has put the average into the model.
    assert all(torch.equal(weights(model)[name], trainer.ema.average[name]) for name in beside)
    first = trainer.evaluate()["eval_loss"]
    assert first > 0
    assert trainer.evaluate()["eval_loss"] == first


def test_resuming_pi0_equals_not_stopping(make_pi0_trainer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_pi0_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_pi0_trainer(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differing(weights(whole.model), weights(resumed.model)) == []


@pytest.mark.parametrize("preserve", ["projection", "none"])
def test_pi0_refuses_checkpointing_which_would_cut_the_gradient_off(make_pi0, make_pi0_trainer, preserve):
    message = "activation_checkpointing .* PI0ForConditionalGeneration: .* no gradient"
    with pytest.raises(ValueError, match=message):
        make_pi0_trainer(activation_checkpointing=True, preserve=preserve)
    model = make_pi0()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=message):
        make_pi0_trainer(model, preserve=preserve)


BUILDERS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}


@pytest.fixture(params=BUILDERS)
def causal_model(request):
    torch.manual_seed(0)
    model, config = BUILDERS[request.param]
    return model(config(**TEXT, attn_implementation="eager", use_cache=False))


def test_plain_language_models(causal_model, make_anchor, make_args, token_dataset, tmp_path):
    trainer = AEGISTrainer(
        causal_model, make_args(max_steps=2), make_anchor(causal_model), train_dataset=token_dataset
    )
    before = weights(causal_model)
    trainer.train()
    assert trainer.ema is None
    assert len(differing(before, weights(causal_model))) > 0.9 * len(before)
    lines = JSONLines(tmp_path / "out" / "projection.jsonl").read()
    assert [r["groups"] for r in lines] == [["layers.0", "layers.1", "layers.2", "embeddings"]] * 2


def test_only_adapters_move(causal_model, make_anchor, make_args, token_dataset, tmp_path):
    from peft import LoraConfig, get_peft_model

    anchor = make_anchor(causal_model)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    # Adapters that do something from the start make the anchor's direction differ from zero.
    model = get_peft_model(causal_model, config)
    trainer = AEGISTrainer(model, make_args(max_steps=2), anchor, train_dataset=token_dataset)
    before = weights(model)
    trainer.train()
    changed = differing(before, weights(model))
    assert changed == [name for name in before if "lora_" in name]
    lines = JSONLines(tmp_path / "out" / "projection.jsonl").read()
    assert [r["groups"] for r in lines] == [["layers.0", "layers.1", "layers.2"]] * 2
    assert any(d < 0 for r in lines for d in r["dot"])
