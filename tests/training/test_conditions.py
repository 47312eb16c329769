"""The compared conditions as whole runs on the embedded model: the property that defines each."""

import functools
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training.adapters import add_lora
from hf_aegis.training.json_lines import JSONLines
from hf_aegis.training.run import RunArguments, run_training


EXPERT = {"expert_hidden_size": 16, "expert_num_layers": 1, "expert_num_heads": 2, "expert_intermediate_size": 32}


@pytest.fixture
def train(demonstrations, flow_anchor, make_args, tmp_path):
    """Runs a condition for a few steps; gives its result and the trained model."""

    def run(folder="out", anchor=True, steps=2, run_changes=None, **changes):
        defaults = {
            "demonstrations": [demonstrations],
            "anchor": str(flow_anchor.save_pretrained(tmp_path / "anchor")) if anchor else None,
            "chunk_size": 4,
            "expert": EXPERT,
            "vqa_samples": 0,
            "vqa_final_samples": 4,
            "replay_samples": 12,
            "action_samples": 3,
        }
        run = RunArguments(**{**defaults, **(run_changes or {})})
        args = make_args(output_dir=str(tmp_path / folder), max_steps=steps, fisher_samples=4, **changes)
        return run_training(run, args), PaliGemmaFlowForAction.from_pretrained(tmp_path / folder)

    return run


def fresh(**changes):
    torch.manual_seed(3)
    return PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, dtype=torch.float32, chunk_size=4, **{**EXPERT, **changes})


def changed(trained, start):
    before = start.state_dict()
    return {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}


def test_naive_trains_everything_but_the_vision_tower(train):
    result, model = train(preserve="none")
    names = changed(model, fresh())
    assert not any("vision_tower" in name for name in names)
    for part in ("language_model.layers.0.", "language_model.layers.3.", "embed_tokens", "multi_modal_projector"):
        assert any(part in name for name in names), part
    assert result["trainable_parameters"] == sum(
        p.numel() for n, p in fresh().named_parameters() if "vision_tower" not in n
    )
    assert result["action_mse"] > 0
    assert "throttle_rate" not in result


def test_stop_gradient_leaves_the_vision_language_model_as_it_was(train):
    _, model = train(preserve="none", run_changes={"expert": {**EXPERT, "flow_gradient_to_vlm": False}})
    names = changed(model, fresh())
    assert names
    assert all(name.startswith("action_expert.") for name in names)


def test_stop_gradient_fast_learns_from_the_tokens_alone(train, tmp_path, make_libero, monkeypatch):
    changes = {"expert": {**EXPERT, "flow_gradient_to_vlm": False}, "fast": {"vocab_size": 400}, "dtype": "float64"}
    result, model = train(steps=1, preserve="none", run_changes=changes, expert_ema_decay=0.0)
    assert result["fast_decode_failures"] in range(4)
    assert result["fast_action_mse"] is None or result["fast_action_mse"] > 0
    processor = PaliGemmaFlowProcessor.from_pretrained(tmp_path / "out")
    assert processor.action_tokenizer.vocab_size == 400
    names = changed(model, fresh())
    assert any("language_model.layers.0." in name for name in names)

    # Without the flow loss the vision-language model's training would be the same: no gradient comes from the expert.
    class WithoutFlow(PaliGemmaFlowForAction):
        @functools.wraps(PaliGemmaFlowForAction.forward)
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.get("language_loss") is not None:
                output.loss = output.language_loss + 0.0 * output.flow_mse
            return output

    # The clipped norm is over all parameters: without clipping, nothing else connects the two.
    for folder, policy in (("with", PaliGemmaFlowForAction), ("without", WithoutFlow)):
        monkeypatch.setattr("hf_aegis.training.run.PaliGemmaFlowForAction", policy)
        train(folder=folder, preserve="none", run_changes=changes, max_grad_norm=0.0)
    models = [PaliGemmaFlowForAction.from_pretrained(tmp_path / name) for name in ("with", "without")]
    apart = changed(*models)
    assert apart
    assert all(name.startswith("action_expert.") for name in apart)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_adapters_projector_and_expert_alone(train, tmp_path):
    result, merged = train(preserve="none", run_changes={"lora": {"r": 2, "lora_alpha": 4}})
    names = changed(merged, fresh())
    projections = {f"{kind}_proj" for kind in "qkvo"} | {"gate_proj", "up_proj", "down_proj"}
    touched = {name.split(".")[-2] for name in names if "language_model.layers." in name}
    assert touched == projections
    others = {name for name in names if "language_model.layers." not in name}
    assert others
    assert all("multi_modal_projector" in name or name.startswith("action_expert.") for name in others)

    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in adapter)
    assert result["trainable_parameters"] == sum(value.numel() for value in adapter.values())
    adapted = PeftModel.from_pretrained(fresh(), tmp_path / "out" / "adapter").merge_and_unload()
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)

    with pytest.raises(ValueError, match="lora: unknown key 'rank'"):
        add_lora(fresh(), {"rank": 2})


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_alpha": 4}])
def test_aegis_projects_what_trains(train, tmp_path, lora):
    result, _ = train(run_changes={"lora": lora, "analysis_samples": 3}, neuron_cosine_steps=1)
    assert 0 <= result["throttle_rate"] <= 1
    passes = JSONLines(tmp_path / "out" / "projection.jsonl").read()
    groups = {f"layers.{index}" for index in range(4)} | {"multi_modal_projector"}
    assert set(passes[0]["groups"]) == (groups if lora else groups | {"embeddings"})
    cosines = json.loads((tmp_path / "out" / "neuron_cosines.json").read_text())
    assert cosines["steps"] == [1, 2]
    assert set(cosines["counts"]) <= set(passes[0]["groups"])
    assert sum(cosines["counts"]["layers.0"]) > 0
    states = load_file(tmp_path / "out" / "analysis" / "hidden_states.safetensors")
    assert {name: tuple(value.shape) for name, value in states.items()} == {"before": (3, 128), "after": (3, 128)}
    assert not torch.equal(states["before"], states["after"])
    spectra = json.loads((tmp_path / "out" / "analysis" / "gradient_spectra.json").read_text())
    assert len(spectra["layers"]) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"preserve": "none", "penalties": {"ewc": 100.0}},
        {"preserve": "none", "penalties": {"distillation": 1.0, "transport": 1.0}},
        {"preserve": "none", "penalties": {"replay": 1.0}},
        {"preserve": "projection", "reference": "replay"},
        {"preserve": "projection", "reference": "replay", "combiner": "graddrop", "granularity": "global"},
    ],
)
def test_related_methods_run_on_the_policy(train, changes):
    result, model = train(**changes)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert result["skipped_steps"] == 0
    assert result["vqa_cross_entropy"] > 0


def test_weights_are_interpolated_after_naive_training(train):
    _, naive = train(folder="naive", preserve="none")
    _, half = train(folder="half", preserve="none", run_changes={"weight_interpolation": 0.25})
    start = fresh().state_dict()
    for name, value in half.state_dict().items():
        end = naive.state_dict()[name]
        expected = end if name.startswith("action_expert.") else torch.lerp(start[name], end, 0.25)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_update_of_lora_is_scaled(train):
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ".*language_model.*(q|down)_proj"}
    _, whole = train(folder="whole", preserve="none", run_changes={"lora": lora})
    result, quarter = train(
        folder="quarter", preserve="none", run_changes={"lora": lora, "weight_interpolation": 0.25}
    )
    assert result["weight_share"] == 0.25
    start = fresh().state_dict()
    moved = 0
    for name, value in quarter.state_dict().items():
        end = whole.state_dict()[name]
        expected = end if name.startswith("action_expert.") else torch.lerp(start[name], end, 0.25)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=name)
        moved += not torch.equal(value, start[name]) and "q_proj" in name
    assert moved


def test_weights_go_back_until_questions_are_answered_as_well_as_asked_for(train):
    questions = {"replay_samples": 24, "vqa_final_samples": 24, "vqa_final_split": "train"}
    before, _ = train(folder="before", preserve="none", steps=1, learning_rate=0.0, run_changes=questions)
    naive, _ = train(folder="naive", preserve="none", run_changes=questions)
    kept, _ = train(folder="kept", preserve="none", run_changes=questions | {"keep_within": 0.05})
    limit = 1.05 * before["vqa_cross_entropy"]
    assert naive["vqa_cross_entropy"] > limit
    # The questions that are asked in the end are those that were to be kept.
    assert kept["vqa_cross_entropy"] <= limit
    assert 0 <= kept["weight_share"] < 1


def test_expert_settles_alone_on_weights_that_went_back(train):
    _, half = train(folder="half", preserve="none", run_changes={"weight_interpolation": 0.5})
    result, settled = train(
        folder="settled", preserve="none", run_changes={"weight_interpolation": 0.5, "settling_steps": 3}
    )
    assert result["flow_mse"] > 0
    changed = {name for name, value in settled.state_dict().items() if not torch.equal(value, half.state_dict()[name])}
    assert changed and all(name.startswith("action_expert.") for name in changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fast": {"size": 3}}, "fast: unknown key 'size'"),
        ({"weight_interpolation": 2.0}, r"weight_interpolation must lie in \[0, 1\], found 2.0"),
        ({"weight_interpolation": 0.5, "keep_within": 0.1}, "set one of them"),
        ({"settling_steps": 5}, "set keep_within or weight_interpolation too"),
        ({"keep_within": -0.1}, "keep_within must not be negative, found -0.1"),
        ({"keep_within": 0.1, "gse": {}}, "keep_within is of weights"),
        (
            {"weight_interpolation": 0.5, "lora": {"init_lora_weights": False}},
            "only where LoRA starts at zero: .*lora_B.* does not",
        ),
        ({"action_samples": -1}, "action_samples must not be negative, found -1"),
    ],
)
def test_wrong_run_arguments_are_refused(train, changes, message):
    with pytest.raises(ValueError, match=message):
        train(preserve="none", run_changes=changes)


def test_naive_equals_a_plain_trainer(train, make_args, make_libero, tmp_path):
    """The whole run of the condition, against `transformers.Trainer` on the same model and batches."""
    _, ours = train(preserve="none", expert_learning_rate=None, expert_ema_decay=0.0)
    from hf_aegis.models import PaliGemmaFlowCollator

    dataset = make_libero()
    processor = PaliGemmaFlowProcessor.from_vlm_processor(str(EMBEDDED_VLM), statistics=dataset.statistics)
    model = fresh()
    model.freeze_vision_tower()
    args = make_args(output_dir=str(tmp_path / "plain"), max_steps=2, preserve="none")
    Trainer(model, args, data_collator=PaliGemmaFlowCollator(processor), train_dataset=dataset).train()
    assert changed(ours, model) == set()
