"""Models of which only a part trains: frozen layers, adapters, tied and untied embeddings."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from hf_aegis.gradients import GradientShield


# PEFT asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FORMS = pytest.mark.parametrize("form", ["streaming", "two_pass"])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True])


def freeze_lower_layers(model):
    for module in (model.model.embed_tokens, *model.model.layers[:2]):
        module.requires_grad_(False)


def freeze_embeddings(model):
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)


def freeze_all_but_layer_one(model):
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)


def freeze_all_but_norms(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layernorm" in name)


def freeze_layer_one(model):
    model.model.layers[1].requires_grad_(False)


def freeze_layers(model):
    model.model.layers.requires_grad_(False)


@FORMS
@CHECKPOINTING
@pytest.mark.parametrize(
    "freeze",
    [
        freeze_lower_layers,
        freeze_embeddings,
        freeze_all_but_layer_one,
        freeze_all_but_norms,
        freeze_layer_one,
        freeze_layers,
    ],
)
def test_frozen_parts(freeze, checkpointing, form, make_case, assert_same):
    case = make_case("gemma2", seed=1, checkpointing=checkpointing)
    freeze(case.model)
    expected, scalars = case.project(*case.differentiate()[:2])
    assert any(s.dot < 0 for s in scalars.values())
    case.model.zero_grad()
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    with shield:
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert sorted(shield.report.groups) == sorted(scalars)
    assert all(p.grad is None for p in case.model.parameters() if not p.requires_grad)


@FORMS
def test_only_the_projector_trains(form, make_case, assert_same):
    case = make_case("paligemma2", checkpointing=True)
    case.model.requires_grad_(False)
    case.model.model.multi_modal_projector.requires_grad_(True)
    expected, scalars = case.project(*case.differentiate()[:2])
    assert list(scalars) == ["multi_modal_projector"]
    assert scalars["multi_modal_projector"].dot < 0
    case.model.zero_grad()
    with GradientShield(case.model, case.anchor, dual_backward=form):
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)


@FORMS
@CHECKPOINTING
def test_a_training_vision_tower_is_a_group(form, checkpointing, make_case, assert_same):
    case = make_case("paligemma2", checkpointing=checkpointing)
    case.model.model.vision_tower.requires_grad_(True)
    original = case.group_of
    case.group_of = lambda name: "vision_tower" if "vision_tower" in name else original(name)
    expected, scalars = case.project(*case.differentiate()[:2])
    assert scalars["vision_tower"].dot < 0
    case.model.zero_grad()
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    with shield:
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert shield.report.groups[-1] == "vision_tower"


@FORMS
def test_freezing_between_steps_is_noticed(form, make_case, assert_same):
    case = make_case("gemma2")
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    for freeze in (freeze_lower_layers, lambda model: model.requires_grad_(True)):
        with shield:
            case.loss().backward()
        freeze(case.model)
        expected, _ = case.project(*case.differentiate()[:2])
        case.model.zero_grad()
        with shield:
            case.loss().backward()
        assert_same(case.gradients(), expected, 1e-8)
        case.model.zero_grad()


@FORMS
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(form, tied, make_case, assert_same):
    case = make_case("gemma2", tie_word_embeddings=tied)
    assert ("lm_head.weight" in case.parameters()) != tied
    task, reference, _ = case.differentiate()
    assert (reference.get("lm_head.weight") is None) or tied
    expected, scalars = case.project(task, reference)
    assert scalars["embeddings"].dot < 0
    case.model.zero_grad()
    with GradientShield(case.model, case.anchor, dual_backward=form):
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)


@pytest.fixture
def lora_case(make_case):
    def make(checkpointing=False, **options):
        case = make_case("gemma2")
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options)
        torch.manual_seed(1)
        case.model = get_peft_model(case.model, config).double().train()
        if checkpointing:
            case.model.activation_checkpointing_enable()
            case.model.enable_input_require_grads()
        return case

    return make


@FORMS
@CHECKPOINTING
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["norm"]}, {"layers_to_transform": [1, 2]}])
def test_lora(form, checkpointing, options, lora_case, assert_same):
    case = lora_case(checkpointing, **options)
    expected, scalars = case.project(*case.differentiate()[:2])
    assert any(s.dot < 0 for s in scalars.values())
    first = 1 if "layers_to_transform" in options else 0
    assert {f"layers.{index}" for index in range(first, 3)} <= scalars.keys()
    case.model.zero_grad()
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    with shield:
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert sorted(shield.report.groups) == sorted(scalars)


def test_lora_sees_the_attention_mask(lora_case):
    case = lora_case()
    shield = GradientShield(case.model, case.anchor)
    penalties = []
    for mask in (case.batch["attention_mask"], torch.ones_like(case.batch["attention_mask"])):
        case.batch["attention_mask"] = mask
        _, _, terms = case.differentiate()
        case.model.zero_grad()
        with shield:
            case.loss().backward()
        expected = sum(float((mean_term + std_term).detach()) for mean_term, std_term in terms)
        assert shield.report.summary()["penalty"] == pytest.approx(expected, rel=1e-6)
        penalties.append(expected)
    assert penalties[0] != pytest.approx(penalties[1], rel=1e-3)


@FORMS
def test_prompt_tuning_lengthens_the_mask(form, make_case):
    case = make_case("gemma2")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    case.model = get_peft_model(case.model, config).double().train()
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    with shield:
        case.model(**case.batch).loss.backward()
    assert shield.report.groups == ["prompt_encoder"]
    assert shield.report.reference_squared_norm.item() > 0
