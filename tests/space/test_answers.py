import pytest
import torch
from answers import ask
from loading import Loaded, ModelUnavailableError, load
from settings import ShownModel, shown_models

from hf_aegis.assets import DEMO_CHECKPOINTS, EMBEDDED_VLM
from hf_aegis.data.vqa import VQACollator, VQASample, load_easy_vqa
from hf_aegis.hub import push_folder


@pytest.fixture(scope="module")
def models():
    return {shown.key: shown for shown in shown_models()}


@pytest.fixture(scope="module")
def samples():
    return load_easy_vqa("test", 3, seed=2)


@torch.no_grad()
def forced_probability(loaded: Loaded, sample: VQASample, answer: str) -> float:
    """What the model gives to an answer and its end, teacher-forced."""
    inputs = VQACollator(loaded.processor)([VQASample(sample.image, sample.question, answer)])
    labels = inputs.pop("labels")[:, 1:]
    logits = loaded.model(**inputs).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen[labels != -100].sum().exp().item()


@pytest.mark.parametrize("key", ["base", "naive"])
def test_a_probability_is_that_of_the_answer_and_its_end(models, samples, key):
    loaded = load(models[key])
    for sample in samples:
        answers = ask(loaded, sample.image, sample.question)
        expected = forced_probability(loaded, sample, answers.given.text)
        assert answers.given.probability == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("key", ["base", "naive", "aegis", "held"])
def test_the_likely_answers_are_in_order_and_no_more_than_certain(models, samples, key):
    for sample in samples:
        given, likely = ask(load(models[key]), sample.image, sample.question)
        shares = [answer.probability for answer in likely]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1 + 1e-5
        assert len({answer.text for answer in likely}) == len(likely) <= 5
        assert given in likely


def test_the_model_before_fine_tuning_is_right(models, samples):
    for sample in samples:
        assert ask(load(models["base"]), sample.image, sample.question).given.text == sample.answer


def test_a_model_is_loaded_once(models):
    assert load(models["base"]) is load(models["base"])


def test_what_cannot_be_loaded_is_told_without_a_path(tmp_path, capsys):
    source = str(tmp_path / "nothing")
    with pytest.raises(ModelUnavailableError, match="“Naive” cannot be loaded") as caught:
        load(ShownModel("naive", "Naive", "", source, embedded=False, acts=True))
    assert "nothing" not in str(caught.value)
    assert source in capsys.readouterr().out, "who runs the page learns why"


def test_a_plain_model_is_no_policy():
    with pytest.raises(ModelUnavailableError, match="cannot act"):
        load(ShownModel("naive", "Naive", "", f"{EMBEDDED_VLM}/", embedded=False, acts=True))


def test_models_are_loaded_from_the_hub_by_the_ids_that_variables_name(hub, monkeypatch, capsys, models, samples):
    push_folder(DEMO_CHECKPOINTS["naive"], "org/naive", private=True)
    push_folder(DEMO_CHECKPOINTS["naive"], "org/pickled", ignore_patterns="*.safetensors")
    hub.repo("org/pickled").replace("pytorch_model.bin", b"a pickle")
    for name, source in (("NAIVE", "org/naive"), ("AEGIS", "org/missing"), ("HELD", "org/pickled")):
        monkeypatch.setenv(f"AEGIS_SPACE_{name}", source)
    monkeypatch.setattr("loading._loaded", {})
    chosen = {shown.key: shown for shown in shown_models()}
    loaded, local = load(chosen["naive"]), load(models["naive"])
    assert loaded is not local
    own, other = local.model.state_dict(), loaded.model.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in own.items())
    assert ask(loaded, samples[0].image, samples[0].question) == ask(local, samples[0].image, samples[0].question)
    for key in ("aegis", "held"):
        with pytest.raises(ModelUnavailableError, match="cannot be loaded at the moment"):
            load(chosen[key])
    log = capsys.readouterr().out
    assert "org/missing" in log and "org/pickled" in log and hub.token not in log
    # From the cache.
    monkeypatch.setattr("loading._loaded", {})
    with hub.offline():
        assert load(chosen["naive"]).processor.statistics.to_dict() == local.processor.statistics.to_dict()


def test_models_are_chosen_by_variables(monkeypatch):
    monkeypatch.setenv("AEGIS_SPACE_NAIVE", "org/naive")
    monkeypatch.setenv("AEGIS_SPACE_HELD", " ")
    shown = {model.key: model for model in shown_models()}
    assert list(shown) == ["base", "naive", "aegis"]
    assert (shown["naive"].source, shown["naive"].embedded) == ("org/naive", False)
    assert (shown["aegis"].source, shown["aegis"].embedded) == (str(DEMO_CHECKPOINTS["aegis"]), True)
