"""transformers' π0: its vision-language model, its processor with a dataset's statistics, its batches."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoProcessor,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0ForConditionalGeneration,
    PI0Processor,
)

from hf_aegis.anchors import ActivationAnchor, AnchorMismatchError, find_decoder_layers
from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM
from hf_aegis.data import LiberoDataset, VQACollator, load_easy_vqa
from hf_aegis.functional.normalization import MINIMUM_HALF_RANGE, DatasetStatistics, FeatureStatistics
from hf_aegis.gradients.groups import ParameterGroups
from hf_aegis.models import PI0Collator, pi0_processor, pi0_vlm


@pytest.fixture
def pi0(pi0_checkpoint):
    return PI0ForConditionalGeneration.from_pretrained(pi0_checkpoint).eval()


@pytest.fixture(scope="module")
def questions():
    return VQACollator(AutoProcessor.from_pretrained(EMBEDDED_VLM))(load_easy_vqa("train", 6, seed=0))


@pytest.fixture(scope="module")
def dataset():
    return LiberoDataset(DEMONSTRATIONS, chunk_size=8, normalize=False)


@pytest.fixture(scope="module")
def processor(dataset):
    return pi0_processor(EMBEDDED_VLM, dataset.statistics, chunk_size=8)


@torch.no_grad()
def logits(model, batch):
    return model(**batch, use_cache=False).logits


def test_the_vlm_is_a_stock_paligemma_with_the_weights_of_pi0(pi0, questions):
    stock = PaliGemmaForConditionalGeneration(copy.deepcopy(pi0.config.vlm_config)).eval()
    stock.model.load_state_dict(pi0.model.vlm.state_dict())
    stock.tie_weights()
    vlm = pi0_vlm(pi0)
    assert torch.equal(logits(vlm, questions), logits(stock, questions))
    assert all(p is q for p, q in zip(vlm.model.parameters(), pi0.model.vlm.parameters(), strict=True))
    with torch.no_grad():
        pi0.model.vlm.language_model.layers[1].mlp.up_proj.weight.zero_()
    assert not torch.equal(logits(vlm, questions), logits(stock, questions))


def test_the_vlm_is_saved_as_a_plain_checkpoint(pi0, questions, tmp_path):
    pi0_vlm(pi0).save_pretrained(tmp_path)
    found, info = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(found.eval(), questions), logits(pi0_vlm(pi0), questions))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["PaliGemmaForConditionalGeneration"]
    assert pi0.name_or_path not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_asking_for_the_vlm_changes_nothing(pi0_checkpoint, implementation):
    pi0 = PI0ForConditionalGeneration.from_pretrained(pi0_checkpoint, attn_implementation=implementation).train()
    pi0.model.vlm.vision_tower.eval()
    before, modes = pi0.config.to_dict(), [module.training for module in pi0.modules()]
    vlm = pi0_vlm(pi0)
    assert vlm.config.get_text_config()._attn_implementation == implementation
    assert pi0.model.vlm.language_model.config._attn_implementation == implementation
    assert pi0.config.to_dict() == before
    assert [module.training for module in pi0.modules()] == modes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_on_pi0_are_in_the_vlm(pi0, questions):
    vlm = pi0_vlm(pi0)
    plain = logits(vlm, questions)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    adapted = get_peft_model(pi0, config)
    with_adapters = logits(vlm, questions)
    assert not torch.equal(with_adapters, plain)
    assert torch.equal(logits(pi0_vlm(adapted), questions), with_adapters)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(pi0_vlm(merged), questions), with_adapters)


def test_what_has_no_vlm_is_refused(pi0):
    with pytest.raises(TypeError, match="expected a PI0ForConditionalGeneration, found PaliGemmaForConditionalGene"):
        pi0_vlm(pi0_vlm(pi0))
    pi0.model.vlm.config.text_config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="tie_word_embeddings=False: π0 has no output head"):
        pi0_vlm(pi0)


def test_an_anchor_of_questions_fits_pi0(pi0, questions):
    seen = []
    layer = find_decoder_layers(pi0)[1]
    anchor = ActivationAnchor.collect(pi0_vlm(pi0), [questions], progress=False)
    anchor.check_compatible(pi0)
    assert anchor.fingerprint.base_model == "pi0_tiny"
    # Its moments are those of π0's own layers on the questions.
    layer.register_forward_hook(lambda _, __, output: seen.append(output))
    logits(pi0_vlm(pi0), questions)
    tokens = seen[0][questions["attention_mask"].bool()].double()
    torch.testing.assert_close(anchor.mean[1].double(), tokens.mean(0), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.mlp.up_proj.weight.add_(1.0)
    with pytest.raises(AnchorMismatchError, match="weights_sha256"):
        anchor.check_compatible(pi0)


def test_batches_are_in_pi0s_own_units(dataset, processor, pi0):
    items = [dataset[5], dataset[len(dataset) - 2]]
    items[0]["instruction"] = "pick_up the  red\nbowl"
    batch = PI0Collator(processor)(items)
    statistics = dataset.statistics.actions
    for row, item in enumerate(items):
        expected = (item["actions"].numpy() - np.array(statistics.mean)) / np.array(statistics.std)
        np.testing.assert_allclose(batch["actions"][row, :, :7], expected, rtol=1e-4, atol=1e-5)
    assert not batch["actions"][..., 7:].any() and not batch["state"][:, 9:].any()
    assert batch["pixel_values"].shape == (2, 2, 3, 64, 64) and batch["pixel_attention_mask"].all()
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    text = processor.tokenizer.decode(ids[ids != processor.image_token_id], skip_special_tokens=True)
    assert text == "pick up the red bowl\n"
    # Steps past the end of an episode are the last action again, and count as any other; so does what pads them.
    assert items[1]["action_is_pad"].tolist() == [False] * 2 + [True] * 6
    assert torch.equal(batch["actions"][1, 2:], batch["actions"][1, 1].expand(6, -1))
    noise, timestep = torch.randn(batch["actions"].shape), torch.tensor([0.2, 0.7])
    output = pi0(**batch, noise=noise, timestep=timestep)
    whole = (output.logits - (noise - batch["actions"])).square().mean()
    torch.testing.assert_close(output.loss, whole)


def test_the_processor_comes_back_with_its_statistics(processor, dataset, tmp_path):
    processor.save_pretrained(tmp_path)
    found = PI0Processor.from_pretrained(tmp_path)
    assert found.actions_mean == list(dataset.statistics.actions.mean) and found.chunk_size == 8
    items = [dataset[3]]
    for key, value in PI0Collator(processor)(items).items():
        assert torch.equal(PI0Collator(found)(items)[key], value), key


def test_what_hardly_moves_is_not_stretched():
    still = np.stack([np.linspace(-1, 1, 100), 0.3 + 1e-6 * np.arange(100)], axis=1)
    features = {name: FeatureStatistics.from_samples(name, still) for name in ("state", "actions")}
    processor = pi0_processor(EMBEDDED_VLM, DatasetStatistics(**features))
    assert processor.state_std[0] == pytest.approx(still[:, 0].std()) and processor.state_std[1] == MINIMUM_HALF_RANGE
    wide = FeatureStatistics.from_samples("state", np.zeros((2, 33)))
    with pytest.raises(ValueError, match="'state' has 33 dimensions, more than the 32 of π0's inputs"):
        pi0_processor(EMBEDDED_VLM, DatasetStatistics(wide, features["actions"]))


def test_batches_that_would_be_mixed_up_are_refused(dataset, processor):
    item = dataset[0]
    collator = PI0Collator(processor)
    with pytest.raises(ValueError, match=r"item 1 lacks state; found "):
        collator([item, {key: value for key, value in item.items() if key != "state"}])
    halves = [{**item, "actions": item["actions"][:4]}] * 2
    with pytest.raises(ValueError, match=r"`actions` must have shape \(2, 8, 7\), found \(2, 4, 7\)"):
        collator(halves)
    with pytest.raises(ValueError, match=r"`state` must have shape \(1, 9\), found \(1, 8\)"):
        collator([{**item, "state": item["state"][:8]}])
    with pytest.raises(ValueError, match="no state_mean, state_std, actions_mean, actions_std to normalise with"):
        PI0Collator(PI0Processor.from_pretrained(EMBEDDED_VLM))


def test_the_published_shapes_are_transformers_defaults():
    """`lerobot/pi0_base`, without its weights: a Gemma of 2 billion and an expert of 300 million, counted by hand."""
    with torch.device("meta"):
        model = PI0ForConditionalGeneration(PI0Config())

    def gemma(width, mlp, vocabulary, layers=18, queries=8 * 256, keys=256):
        attention = 2 * width * queries + 2 * width * keys
        return layers * (attention + 3 * width * mlp + 2 * width) + width + vocabulary * width

    def siglip(width=1152, mlp=4304, layers=27, patch=14 * 14 * 3, patches=256):
        attention, feed = 4 * (width * width + width), 2 * width * mlp + mlp + width
        return patch * width + width + patches * width + layers * (attention + feed + 4 * width) + 2 * width

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    vlm = gemma(2048, 16384, 257152) + siglip() + linear(1152, 2048)
    expert = gemma(1024, 4096, 257152)
    actions = 2 * linear(32, 1024) + linear(2048, 1024) + linear(1024, 1024) + linear(1024, 32)
    assert model.num_parameters() == vlm + expert + actions == 3_501_372_176
    assert pi0_vlm(model).num_parameters() == vlm
    # What AEGIS projects as one vector each: the layers, the projector, and embeddings with the final norm.
    model.model.vlm.vision_tower.requires_grad_(False)
    groups = ParameterGroups(model, find_decoder_layers(model))
    protected = {groups.group_of(name) for name in groups.parameters if ".vlm." in name}
    assert len(protected) == 18 + 2
