"""Policies, processors and plain vision-language models on the Hub."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PaliGemmaForConditionalGeneration,
)

from hf_aegis.data import FASTTokenizer
from hf_aegis.hub import HubUploadError
from hf_aegis.models import PaliGemmaFlowConfig, PaliGemmaFlowForAction, PaliGemmaFlowProcessor


REPO = "org/policy"


@pytest.fixture
def model(vlm, expert):
    torch.manual_seed(0)
    return PaliGemmaFlowForAction.from_vlm(vlm, **expert).eval()


def assert_equal_weights(first, second):
    own, other = first.state_dict(), second.state_dict()
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert torch.equal(value, other[name]), name
    assert second.lm_head.weight is second.get_input_embeddings().weight


@pytest.mark.parametrize("shards", [None, "60KB"])
def test_a_policy_comes_back_bit_equal_by_every_class(hub, model, batch, shards):
    model.push_to_hub(REPO, private=True, **({} if shards is None else {"max_shard_size": shards}))
    repository = hub.repo(REPO)
    assert repository.private
    weights = [name for name in repository.files() if name.endswith(".safetensors")]
    assert (len(weights) > 1) == (shards is not None)
    assert not [name for name in repository.files() if name.endswith(".bin")]
    for loader in (PaliGemmaFlowForAction, AutoModel, AutoModelForImageTextToText):
        loaded = loader.from_pretrained(REPO).eval()
        assert type(loaded) is PaliGemmaFlowForAction
        assert_equal_weights(model, loaded)
    config = AutoConfig.from_pretrained(REPO)
    assert all(getattr(config, name) == getattr(model.config, name) for name in PaliGemmaFlowConfig.__annotations__)
    noise, timestep = torch.zeros(3, 5, 3), torch.full((3,), 0.5)
    assert torch.equal(
        model(**batch, noise=noise, timestep=timestep).velocity,
        loaded(**batch, noise=noise, timestep=timestep).velocity,
    )
    # From the cache, without the Hub.
    with hub.offline():
        assert_equal_weights(model, PaliGemmaFlowForAction.from_pretrained(REPO))
        with pytest.raises(OSError, match="couldn't find them in the cached files"):
            PaliGemmaFlowForAction.from_pretrained("org/other")


def test_its_card_is_the_package_s_own_unless_somebody_wrote_one(hub, model, processor, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Transformers leaves a card to be filled in.
    processor.push_to_hub(REPO)
    model.push_to_hub(REPO, tags="mine")
    card = ModelCard(hub.repo(REPO).files()["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("hf_aegis", "robotics")
    assert "mine" in card.data.tags and "More Information Needed" not in card.content
    assert f'from_pretrained("{REPO}")' in card.text
    hub.repo(REPO).replace("README.md", b"# Mine\n")
    model.push_to_hub(REPO)
    assert hub.repo(REPO).files()["README.md"] == b"# Mine\n"
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_should_be_private_is_not_published(hub, model):
    HfApi().create_repo(REPO)
    with pytest.raises(HubUploadError, match="exists and is public"):
        model.push_to_hub(REPO, private=True)
    assert hub.repo(REPO).files() == {}


def test_a_private_policy_needs_a_token_that_may_see_it(hub, model, monkeypatch):
    model.push_to_hub(REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    with pytest.raises(OSError, match=REPO) as raised:
        PaliGemmaFlowForAction.from_pretrained(REPO)
    assert hub.stranger_token not in str(raised.value)
    assert_equal_weights(model, PaliGemmaFlowForAction.from_pretrained(REPO, token=hub.read_only_token))


def test_revisions(hub, model):
    model.push_to_hub(REPO)
    with torch.no_grad():
        model.action_expert.norm.weight.add_(1)
    model.push_to_hub(REPO, revision="longer")
    new, old = (PaliGemmaFlowForAction.from_pretrained(REPO, revision=name) for name in ("longer", "main"))
    assert_equal_weights(model, new)
    assert torch.equal(old.action_expert.norm.weight + 1, new.action_expert.norm.weight)
    with pytest.raises(OSError, match="v9"):
        PaliGemmaFlowForAction.from_pretrained(REPO, revision="v9")


def test_a_policy_is_made_of_a_model_on_the_hub(hub, vlm, vlm_processor, expert):
    vlm.push_to_hub("org/vlm", private=True)
    vlm_processor.push_to_hub("org/vlm")
    commit = hub.repo("org/vlm").branches["main"]
    hub.repo("org/vlm").replace("config.json", b"{}")
    loaded = PaliGemmaFlowForAction.from_vlm("org/vlm", revision=commit, token=hub.read_only_token, **expert)
    assert torch.equal(loaded.lm_head.weight, vlm.lm_head.weight)
    assert (loaded.config.vlm_name_or_path, loaded.config.vlm_revision) == ("org/vlm", commit)
    processor = PaliGemmaFlowProcessor.from_vlm_processor("org/vlm", revision=commit, token=hub.read_only_token)
    assert processor.tokenizer.get_vocab() == vlm_processor.tokenizer.get_vocab()


def test_pickled_weights_are_not_read(hub, model, vlm, monkeypatch):
    # Transformers would ask a Space to convert them.
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
    model.push_to_hub(REPO)
    vlm.push_to_hub("org/vlm")
    for name in (REPO, "org/vlm"):
        HfApi().delete_file("model.safetensors", name)
        hub.repo(name).replace("pytorch_model.bin", b"a pickle")
    for load in (PaliGemmaFlowForAction.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load(REPO)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        PaliGemmaFlowForAction.from_vlm("org/vlm")


def test_a_processor_comes_back_whole(hub, fast_processor, images):
    fast_processor.push_to_hub(REPO, private=True)
    for loader in (PaliGemmaFlowProcessor, AutoProcessor):
        loaded = loader.from_pretrained(REPO)
        assert type(loaded) is PaliGemmaFlowProcessor
        assert loaded.statistics.to_dict() == fast_processor.statistics.to_dict()
        assert loaded.to_dict() == fast_processor.to_dict()
        chunk = torch.linspace(-1, 1, 15).reshape(5, 3).numpy()
        assert loaded.action_tokenizer(chunk) == fast_processor.action_tokenizer(chunk)
        prompt = {"images": images, "text": ["pick up the red cup"] * 3, "state": torch.zeros(3, 4).numpy()}
        for name, value in fast_processor(**prompt).items():
            assert torch.equal(loaded(**prompt)[name], value), name
    with hub.offline():
        assert PaliGemmaFlowProcessor.from_pretrained(REPO).to_dict() == fast_processor.to_dict()


def test_a_fast_tokenizer_of_its_own(hub, action_tokenizer):
    action_tokenizer.push_to_hub("org/fast")
    loaded = FASTTokenizer.from_pretrained("org/fast")
    chunk = torch.linspace(-1, 1, 15).reshape(5, 3).numpy()
    assert loaded(chunk) == action_tokenizer(chunk)
    assert {"tokenizer.json", "processor_config.json"} <= hub.repo("org/fast").files().keys()


def test_model_and_processor_share_a_repository(hub, model, processor):
    model.push_to_hub(REPO)
    processor.push_to_hub(REPO)
    assert_equal_weights(model, PaliGemmaFlowForAction.from_pretrained(REPO))
    assert AutoProcessor.from_pretrained(REPO).to_dict() == processor.to_dict()


def test_the_plain_model_is_one_that_stock_transformers_loads(hub, model, vlm):
    model.to_vlm().push_to_hub("org/vlm")
    config = json.loads(hub.repo("org/vlm").files()["config.json"])
    assert (config["model_type"], config["architectures"]) == ("paligemma", ["PaliGemmaForConditionalGeneration"])
    assert_equal_weights(vlm, PaliGemmaForConditionalGeneration.from_pretrained("org/vlm"))
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as A; m = A.from_pretrained('org/vlm');"
        "assert not [n for n in sys.modules if n.startswith('hf_aegis')];"
        "print(type(m).__name__, m.lm_head.weight.sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=hub.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PaliGemmaForConditionalGeneration", str(vlm.lm_head.weight.sum().item())]
