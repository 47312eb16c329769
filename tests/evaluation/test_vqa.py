import json

import pytest
import torch
from PIL import Image
from torch import nn

from hf_aegis.data.vqa import VQASample, VQASamples
from hf_aegis.evaluation import VQAHoldout
from hf_aegis.evaluation.vqa_scores import VQARecord
from hf_aegis.functional.bootstrap import bootstrap_interval
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
    samples = [VQASample(image, "?", "red", answers=("red",) * 9 + (long,))]
    assert VQAHoldout(samples, tiny_processor)._max_new_tokens == len(tokenizer(long)["input_ids"]) + 1


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
