import json

import pytest
import torch
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.data.vqa import VQASample, load_easy_vqa
from hf_aegis.evaluation import VQAHoldout


LIBERO_INSTRUCTIONS = [
    "pick up the alphabet soup and place it in the basket",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "put both moka pots on the stove",
    "put the black bowl in the bottom drawer of the cabinet and close it",
    "Öffne die Schublade № 3 – 引き出し",
]


@pytest.fixture(scope="module")
def model():
    return PaliGemmaForConditionalGeneration.from_pretrained(
        EMBEDDED_VLM, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(EMBEDDED_VLM)


@pytest.fixture(scope="module")
def evaluation():
    return json.loads((EMBEDDED_VLM / "evaluation.json").read_text())


def test_it_answers_nine_in_ten_of_the_first_500_test_questions(model, processor):
    assert VQAHoldout(load_easy_vqa("test", 500), processor).evaluate_accuracy(model).accuracy >= 0.90


def test_its_cross_entropy_is_low(model, processor):
    assert VQAHoldout(load_easy_vqa("test", 200, seed=0), processor).evaluate_cross_entropy(model).cross_entropy < 0.15


def test_answers_that_teacher_forcing_settles_are_those_that_are_generated(model, processor, monkeypatch):
    # Noise that makes a part of the answers wrong, some of them by a late token only.
    generator = torch.Generator().manual_seed(0)
    kept = model.state_dict()
    noisy = {
        name: t + 1.5 * t.std() * torch.randn(t.shape, generator=generator)
        for name, t in kept.items()
        if "layers.0." in name
    }
    holdout = VQAHoldout(load_easy_vqa("test", 200, seed=1), processor)
    kept = {name: kept[name].clone() for name in noisy}
    model.load_state_dict(noisy, strict=False)
    try:
        generated = holdout.evaluate_accuracy(model)
        asked = []
        monkeypatch.setattr(
            model,
            "generate",
            lambda **inputs: asked.append(len(inputs["input_ids"])) or type(model).generate(model, **inputs),
        )
        settled = holdout.evaluate(model)
    finally:
        model.load_state_dict(kept, strict=False)
    assert settled.predictions == generated.predictions
    assert 0.2 < generated.accuracy < 0.95
    # Only what is not settled is generated.
    assert sum(asked) == round(200 * (1 - generated.accuracy))


def test_nothing_is_settled_where_generation_is_bent(model, processor, monkeypatch):
    holdout = VQAHoldout(load_easy_vqa("test", 24, seed=2), processor)
    [token] = processor.tokenizer("yes", add_special_tokens=False)["input_ids"][:1]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [token])
    generated = holdout.evaluate_accuracy(model).predictions
    assert "yes" not in generated
    assert holdout.evaluate(model).predictions == generated


@pytest.mark.slow
def test_it_scores_on_the_whole_test_split_what_its_card_says(model, processor, evaluation):
    result = VQAHoldout(load_easy_vqa("test"), processor).evaluate(model)
    assert result.accuracy >= 0.92
    assert result.accuracy == pytest.approx(evaluation["accuracy"], abs=1e-3)
    assert result.cross_entropy == pytest.approx(evaluation["cross_entropy"], abs=1e-3)
    assert result.by_type.keys() == evaluation["by_type"].keys()


def test_it_looks_at_the_image(model, processor):
    samples = load_easy_vqa("test", 150, seed=0)
    shifted = [
        VQASample(other.image, sample.question, sample.answer)
        for sample, other in zip(samples, samples[1:] + samples[:1], strict=True)
    ]
    assert VQAHoldout(shifted, processor).evaluate_accuracy(model).accuracy < 0.75


def test_it_fits_into_ten_megabytes():
    assert sum(path.stat().st_size for path in EMBEDDED_VLM.rglob("*") if path.is_file()) <= 10e6


def test_the_vocabulary_is_exactly_the_processors(model, processor):
    assert isinstance(processor, PaliGemmaProcessor)
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == model.lm_head.out_features == 1_856
    # Discrete action tokens count down from below the segmentation tokens.
    assert processor.tokenizer.convert_ids_to_tokens(1_856 - 1 - 128) == "<loc1023>"
    assert processor.image_token_id == model.config.image_token_id


@pytest.mark.parametrize("instruction", LIBERO_INSTRUCTIONS)
def test_no_text_is_unknown_to_the_tokenizer(processor, instruction):
    tokens = processor.tokenizer(instruction)["input_ids"]
    assert processor.tokenizer.unk_token_id not in tokens
    assert processor.tokenizer.decode(tokens) == instruction
    if instruction.isascii():
        assert len(tokens) <= 2 * len(instruction.split())


def test_tied_embeddings_survive_saving(model, tmp_path):
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_the_weights_are_stored_in_bfloat16_and_nothing_is_missing():
    loaded, report = PaliGemmaForConditionalGeneration.from_pretrained(EMBEDDED_VLM, output_loading_info=True)
    assert loaded.dtype == torch.bfloat16
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_card_quotes_the_evaluation(recipe, evaluation):
    card = (EMBEDDED_VLM / "README.md").read_text()
    assert card == recipe.model_card(evaluation)
    for name, row in {**evaluation["by_type"], "all": evaluation}.items():
        accuracy, cross_entropy = f"{100 * row['accuracy']:.1f} %", f"{row['cross_entropy']:.4f}"
        assert f"| {name} | {row['count']:,} | {accuracy} | {cross_entropy} |" in card
    assert evaluation["accuracy"] >= 0.92
    assert evaluation["count"] == 9_673
    assert evaluation["question_only_accuracy"] == pytest.approx(0.670, abs=5e-4)
