import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from hf_aegis.data.vqa import VQASample, VQASamples
from hf_aegis.evaluation import VQAHoldout, VQAResult, survey, vqa_scores
from hf_aegis.evaluation.vqa import answer_length
from hf_aegis.evaluation.vqa_scores import VQARecord
from hf_aegis.functional.bootstrap import bootstrap_interval
from hf_aegis.functional.vqa_answers import vqa_accuracy
from hf_aegis.models import PaliGemmaFlowForAction


# The processor itself warns when it is asked for tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PROMPT = "<image>answer en "


def ask(model, processor, sample, max_new_tokens):
    inputs = processor(images=sample.image, text=PROMPT + sample.question, return_tensors="pt")
    del inputs["labels"]
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_cross_entropy_is_the_mean_over_samples_of_the_models_own_loss(tiny_model, tiny_processor, samples):
    # Answers of different lengths: a mean over all tokens of the set would differ.
    samples = [*samples, VQASample(samples[0].image, "what is it?", "a long unusual answer")]
    tiny_model.eval()
    losses = []
    for sample in samples:
        inputs = tiny_processor(
            images=sample.image, text=PROMPT + sample.question, suffix=sample.answer, return_tensors="pt"
        )
        losses.append(tiny_model(**inputs).loss.item())
    assert max(losses) - min(losses) > 0.1
    result = VQAHoldout(samples, tiny_processor, batch_size=5).evaluate_cross_entropy(tiny_model)
    assert result.cross_entropy == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result.accuracy is None
    assert result.count == 13


def test_predictions_are_those_of_asking_one_by_one(tiny_model, tiny_processor, samples):
    holdout = VQAHoldout(samples, tiny_processor, batch_size=5)
    result = holdout.evaluate_accuracy(tiny_model)
    # Generation stops where the longest ground truth and its end of the sequence would.
    longest = max(len(tiny_processor.tokenizer(sample.answer)["input_ids"]) for sample in samples) + 1
    expected = [ask(tiny_model.eval(), tiny_processor, sample, longest) for sample in samples]
    assert result.predictions == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_results_do_not_depend_on_the_batch_size(tiny_model, tiny_processor, samples, batch_size):
    reference = VQAHoldout(samples, tiny_processor, batch_size=7)
    holdout = VQAHoldout(samples, tiny_processor, batch_size=batch_size)
    expected, found = reference.evaluate(tiny_model), holdout.evaluate(tiny_model)
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, abs=1e-5)
    assert found.predictions == expected.predictions
    assert holdout.fingerprint == reference.fingerprint


def test_the_model_and_the_random_state_are_left_as_they_were(tiny_model, tiny_processor, samples):
    draws = []
    tiny_model.register_forward_pre_hook(lambda *_: draws.append(torch.rand(3)))
    tiny_model.train()
    tiny_model.model.vision_tower.eval()
    tiny_model.config.use_cache = False
    tiny_model.activation_checkpointing_enable()
    modes = [module.training for module in tiny_model.modules()]
    generation_config = tiny_model.generation_config.to_dict()
    state = torch.get_rng_state()
    VQAHoldout(samples, tiny_processor).evaluate(tiny_model)
    assert draws
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in tiny_model.modules()] == modes
    assert tiny_model.config.use_cache is False
    assert tiny_model.is_activation_checkpointing
    assert tiny_model.generation_config.to_dict() == generation_config
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_the_mode_is_restored_when_the_model_fails(tiny_model, tiny_processor, samples):
    tiny_model.train()
    tiny_model.lm_head = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        VQAHoldout(samples, tiny_processor).evaluate_cross_entropy(tiny_model)
    assert tiny_model.training


def test_generation_uses_the_cache_even_where_training_turned_it_off(tiny_model, tiny_processor, samples):
    lengths = []
    hook = lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1])  # noqa: E731
    tiny_model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    tiny_model.config.use_cache = False
    tiny_model.generation_config.eos_token_id = None
    tiny_model.generation_config.use_cache = False
    VQAHoldout(samples[:2], tiny_processor).evaluate_accuracy(tiny_model)
    assert lengths[0] > 1
    assert lengths[1:] == [1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_evaluated_with_its_weights(tiny_model, tiny_processor, samples):
    from peft import LoraConfig, get_peft_model

    holdout = VQAHoldout(samples, tiny_processor)
    expected = holdout.evaluate(tiny_model)
    wrapped = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    found = holdout.evaluate(wrapped)
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, abs=1e-6)
    assert found.predictions == expected.predictions
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    assert holdout.evaluate_cross_entropy(wrapped).cross_entropy != pytest.approx(expected.cross_entropy, abs=1e-3)


def test_a_model_with_an_action_expert_scores_as_its_vision_language_model(tiny_model, tiny_processor, samples):
    holdout = VQAHoldout(samples, tiny_processor)
    expected = holdout.evaluate(tiny_model)
    expert = {"expert_hidden_size": 32, "expert_num_layers": 1, "expert_num_heads": 4, "expert_intermediate_size": 32}
    assert holdout.evaluate(PaliGemmaFlowForAction.from_vlm(tiny_model, **expert)) == expected


def test_cached_inputs_are_those_the_collator_makes(tiny_processor, samples):
    from hf_aegis.data.vqa import VQACollator

    holdout = VQAHoldout(samples, tiny_processor, batch_size=4)
    collator = VQACollator(tiny_processor)
    indices = [2, 7, 5]
    for cached, made in (
        (holdout._teacher_forced(indices, torch.device("cpu")), collator([samples[i] for i in indices])),
        (holdout._prompts(indices, torch.device("cpu")), collator.prompts([samples[i] for i in indices])),
    ):
        assert cached.keys() == made.keys()
        for key in made:
            assert torch.equal(cached[key], made[key]), key


class Answering(nn.Module):
    """Generates the given answers in turn, whatever it is asked."""

    def __init__(self, processor, answers):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.processor, self.answers = processor, answers

    def generate(self, input_ids, **kwargs):
        tokens = [self.processor.tokenizer(answer)["input_ids"] for answer in self.answers]
        longest = max(map(len, tokens))
        rows = [[*row, *[self.processor.tokenizer.pad_token_id] * (longest - len(row))] for row in tokens]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_accuracy_of_hand_counted_answers(tiny_processor):
    image = Image.new("RGB", (8, 8))
    types = ["yes/no", "yes/no", "color", "color", "color", None]
    answers = ["yes", "no", "red", "teal", "gray", "circle"]
    samples = [VQASample(image, "?", answer, kind) for answer, kind in zip(answers, types, strict=True)]
    model = Answering(tiny_processor, ["Yes ", "yes", "red", "blue", "graygray", "circle"])
    result = VQAHoldout(samples, tiny_processor).evaluate_accuracy(model)
    assert result.accuracy == pytest.approx(3 / 6)
    assert {name: (score.count, score.accuracy) for name, score in result.by_type.items()} == {
        "color": (3, pytest.approx(1 / 3)),
        "yes/no": (2, 0.5),
    }
    assert [(record.prediction, record.accuracy) for record in result.records][:3] == [
        ("Yes ", 1),
        ("yes", 0),
        ("red", 1),
    ]
    color = {"count": 3, "accuracy": pytest.approx(1 / 3), "accuracy_interval": [0, 1]}
    assert json.loads(json.dumps(result.to_dict())) == {
        "count": 6,
        "accuracy": 0.5,
        "accuracy_interval": list(bootstrap_interval([1, 0, 1, 0, 0, 1])),
        "by_type": {"color": color, "yes/no": {"count": 2, "accuracy": 0.5, "accuracy_interval": [0, 1]}},
    }


def test_answers_of_all_annotators_are_scored_as_published(tiny_processor):
    image = Image.new("RGB", (8, 8))
    ten = ("teal", "teal", "blue", "blue", "blue", "a blue", *["gray"] * 4)
    samples = [
        VQASample(image, "?", "gray", "color", answers=ten, answer_type="other"),
        VQASample(image, "?", "yes", "yes/no", answers=("yes",) * 10, answer_type="yes/no"),
    ]
    holdout = VQAHoldout(samples, tiny_processor)
    assert [record.accuracy for record in holdout.ask(Answering(tiny_processor, ["blue", "yes"]), False)] == [1, 1]
    result = holdout.evaluate_accuracy(Answering(tiny_processor, ["teal", "no"]))
    assert result.accuracy == pytest.approx((0.6 + 0) / 2)
    assert (result.any_match, result.any_match_interval) == (0.5, (0, 1))
    assert result.by_answer_type["other"].accuracy == pytest.approx(0.6)
    assert result.by_answer_type["yes/no"].any_match == 0
    # One ground truth among them: any-match is not defined of it.
    mixed = VQAHoldout([*samples, VQASample(image, "?", "red", "color")], tiny_processor)
    result = mixed.evaluate_accuracy(Answering(tiny_processor, ["teal", "no", "red"]))
    assert result.accuracy == pytest.approx((0.6 + 0 + 1) / 3)
    assert result.any_match is None
    assert result.by_type["yes/no"].any_match == 0


def test_a_lazy_set_is_the_same_holdout_and_stays_encoded(tiny_model, tiny_processor, samples):
    opened = []

    def open_image(row):
        opened.append(row)
        return samples[row].image.copy()

    lazy = VQASamples(range(len(samples)), lambda row: samples[row].annotation, open_image)
    holdout, expected = (
        VQAHoldout(lazy, tiny_processor, batch_size=5),
        VQAHoldout(samples, tiny_processor, batch_size=5),
    )
    assert opened == list(range(12))
    assert holdout.samples is lazy
    assert holdout.fingerprint == expected.fingerprint
    assert holdout.evaluate(tiny_model) == expected.evaluate(tiny_model)
    assert len(opened) == 12


def test_generation_reaches_the_longest_answer_of_any_annotator(tiny_processor):
    image, tokenizer = Image.new("RGB", (8, 8)), tiny_processor.tokenizer
    long = "a dark red triangle"
    needed = len(tokenizer(long)["input_ids"]) + 1
    one = VQASample(image, "?", long)
    assert VQAHoldout([one, VQASample(image, "?", "red")], tiny_processor)._max_new_tokens == needed
    # What vanishes in VQA accuracy may follow a right answer, or a wrong one.
    several = VQASample(image, "?", "red", answers=("red",) * 9 + (long,))
    assert VQAHoldout([several], tiny_processor)._max_new_tokens == needed + 8
    short = VQASample(image, "?", "red", answers=("red",) * 10)
    limit = max(needed, len(tokenizer("red")["input_ids"]) + 1 + 8)
    assert VQAHoldout([one, short], tiny_processor)._max_new_tokens == limit


def test_an_answer_goes_on_where_one_that_scores_would_have_ended(tiny_processor):
    answers = ("red",) * 9 + ("Red",)
    assert [vqa_accuracy(text, answers) for text in ("red, the", "red, the blue")] == [1, 0]
    annotations = [VQASample(Image.new("RGB", (8, 8)), "?", "red", answers=answers).annotation]
    assert answer_length(tiny_processor.tokenizer, annotations) >= len(
        tiny_processor.tokenizer("red, the blue")["input_ids"]
    )


def test_scores_that_are_not_finite_are_reported_without_an_interval(tiny_processor, samples):
    records = VQAHoldout(samples[:4], tiny_processor).ask(Answering(tiny_processor, ["yes"] * 4), cross_entropy=False)
    kind = records[1].annotation.question_type
    for worst in (math.nan, math.inf):
        values = [1.0, worst, 2.0, 3.0]
        result = VQAResult.of([replace(record, cross_entropy=v) for record, v in zip(records, values, strict=True)])
        assert not math.isfinite(result.cross_entropy)
        assert result.cross_entropy_interval is None
        assert result.by_type[kind].cross_entropy_interval is None
        assert result.accuracy_interval is not None
        found = result.to_dict()
        assert not math.isfinite(found["cross_entropy"])
        assert "cross_entropy_interval" not in found


def test_a_diverged_model_is_evaluated(tiny_model, tiny_processor, samples):
    with torch.no_grad():
        tiny_model.model.language_model.norm.weight.fill_(math.nan)
    assert math.isnan(VQAHoldout(samples[:2], tiny_processor).evaluate_cross_entropy(tiny_model).cross_entropy)


def test_intervals_are_computed_when_they_are_asked_for(tiny_model, tiny_processor, samples, monkeypatch):
    calls = []
    monkeypatch.setattr(vqa_scores, "bootstrap_interval", lambda values: calls.append(len(values)) or (0.0, 1.0))
    result = VQAHoldout(samples, tiny_processor).evaluate_cross_entropy(tiny_model)
    assert not calls
    assert result.cross_entropy_interval == result.cross_entropy_interval == (0.0, 1.0)
    assert calls == [12]
    assert "accuracy_interval" not in result.to_dict()
    assert len(calls) == 1 + len(result.by_type)


def test_a_survey_scores_as_the_holdout_does_in_bounded_memory(tiny_model, tiny_processor, samples, monkeypatch):
    holdout = VQAHoldout(samples, tiny_processor, batch_size=5)
    expected = holdout.evaluate(tiny_model)
    sizes, make = [], VQAHoldout.__init__
    monkeypatch.setattr(
        VQAHoldout, "__init__", lambda self, *args, **kw: sizes.append(len(args[0])) or make(self, *args, **kw)
    )
    result, fingerprint = survey(lambda: tiny_model, samples, tiny_processor, batch_size=5)
    assert sizes == [5, 5, 2]
    assert fingerprint == holdout.fingerprint
    assert result == expected
    assert result.to_dict() == expected.to_dict()
    with pytest.raises(ValueError, match="at least one question"):
        survey(lambda: tiny_model, [], tiny_processor)


def test_a_record_survives_json(tiny_processor):
    sample = VQASample(Image.new("RGB", (8, 8)), "?", "red", answers=("red",) * 10, question_id="7", name="set/3")
    (record,) = VQAHoldout([sample], tiny_processor).ask(Answering(tiny_processor, ["red"]), False)
    values = json.loads(json.dumps(record.to_dict()))
    assert values.keys() == {
        *("question", "answer", "answers", "question_id", "name"),
        *("digest", "prediction", "accuracy", "any_match"),
    }
    assert VQARecord.from_dict(values) == record


def test_the_fingerprint_tells_holdouts_apart(tiny_processor, samples):
    def fingerprint(samples, **kwargs):
        return VQAHoldout(samples, tiny_processor, **kwargs).fingerprint

    first = samples[0]
    inverted = Image.eval(first.image, lambda value: 255 - value)
    variants = [
        samples,
        samples[:-1],
        samples[::-1],
        [VQASample(inverted, first.question, first.answer), *samples[1:]],
        [VQASample(first.image, first.question, "maybe"), *samples[1:]],
        [VQASample(first.image, "what?", first.answer), *samples[1:]],
        [VQASample(first.image, first.question, first.answer, answers=(first.answer,) * 10), *samples[1:]],
    ]
    found = {fingerprint(variant) for variant in variants} | {fingerprint(samples, prompt="{question}")}
    assert len(found) == len(variants) + 1
    assert fingerprint(list(samples)) == fingerprint(samples)


def test_invalid_holdouts_are_refused(tiny_processor, samples):
    with pytest.raises(ValueError, match="at least one sample"):
        VQAHoldout([], tiny_processor)
    with pytest.raises(ValueError, match="batch_size must be at least 1; found 0"):
        VQAHoldout(samples, tiny_processor, batch_size=0)
