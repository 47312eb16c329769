"""Anchors over image or text tokens alone, against moments of explicitly chosen rows."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from hf_aegis.anchors import ActivationAnchor, AnchorMismatchError, find_decoder_layers
from hf_aegis.anchors.token_kinds import find_image_token_id, select_tokens


IMAGE_TOKEN = 60  # of the tiny models


def layer_outputs(model, batch):
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: found.append(out if torch.is_tensor(out) else out[0]))
        for layer in find_decoder_layers(model)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", ["paligemma2", "pi0"])
@pytest.mark.parametrize("tokens", ["all", "image", "text"])
def test_only_the_chosen_tokens_count(kind, tokens, build_model, make_batches):
    model, (batch,) = build_model(kind), make_batches(kind, sizes=(3,))
    rows = [
        (b, t)
        for b, t in batch["attention_mask"].nonzero().tolist()
        if tokens == "all" or (batch["input_ids"][b, t] == IMAGE_TOKEN) == (tokens == "image")
    ]
    anchor = ActivationAnchor.collect(model, [batch], tokens=tokens, progress=False)
    assert anchor.fingerprint.num_tokens == len(rows)
    assert anchor.fingerprint.tokens == tokens
    for layer, hidden in enumerate(layer_outputs(model, batch)):
        chosen = torch.stack([hidden[b, t] for b, t in rows]).double()
        torch.testing.assert_close(anchor.mean[layer].double(), chosen.mean(dim=0), rtol=1e-5, atol=1e-6)
        variance = chosen.var(dim=0, unbiased=False)
        torch.testing.assert_close(anchor.variance[layer].double(), variance, rtol=1e-5, atol=1e-6)


def test_pooled_moments_of_both_kinds_merge_to_those_of_all(build_model, make_batches):
    model, batches = build_model("paligemma2"), make_batches("paligemma2")
    anchors = {
        tokens: ActivationAnchor.collect(model, batches, moments="pooled", tokens=tokens, progress=False)
        for tokens in ("all", "image", "text")
    }
    with pytest.raises(AnchorMismatchError, match="mask_policy: first 'image_tokens', second 'text_tokens'"):
        ActivationAnchor.merge([anchors["image"], anchors["text"]])
    relabelled = [
        ActivationAnchor(a.mean, a.variance, dataclasses.replace(a.fingerprint, mask_policy="attention_mask"))
        for a in (anchors["image"], anchors["text"])
    ]
    merged = ActivationAnchor.merge(relabelled)
    torch.testing.assert_close(merged.mean, anchors["all"].mean)
    torch.testing.assert_close(merged.variance, anchors["all"].variance)
    assert merged.fingerprint.num_tokens == anchors["all"].fingerprint.num_tokens


def test_the_kind_is_saved_and_anchors_without_one_are_of_all_tokens(build_model, make_batches, tmp_path):
    model, batches = build_model("paligemma2"), make_batches("paligemma2")
    anchor = ActivationAnchor.collect(model, batches, tokens="text", progress=False)
    anchor.save_pretrained(tmp_path)
    assert ActivationAnchor.from_pretrained(tmp_path) == anchor
    config = json.loads((tmp_path / "anchor_config.json").read_text())
    assert config["mask_policy"] == "text_tokens"
    # What every anchor said before there was a choice.
    config["mask_policy"] = "attention_mask"
    (tmp_path / "anchor_config.json").write_text(json.dumps(config))
    assert ActivationAnchor.from_pretrained(tmp_path).fingerprint.tokens == "all"
    config["mask_policy"] = "every_second"
    (tmp_path / "anchor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"anchor_config.json: mask_policy must be one of .*, found 'every_second'"):
        ActivationAnchor.from_pretrained(tmp_path)


def test_refusals(build_model, make_batches):
    model, (batch,) = build_model("paligemma2"), make_batches("paligemma2", sizes=(2,))

    def collect(changes=None, tokens="image", of=model):
        return ActivationAnchor.collect(of, [{**batch, **(changes or {})}], tokens=tokens, progress=False)

    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no image tokens: .* use tokens='all'"):
        collect(of=build_model("llama"))
    with pytest.raises(ValueError, match=r"tokens must be one of \('all', 'image', 'text'\), found 'images'"):
        collect(tokens="images")
    with pytest.raises(
        ValueError, match="batch 0: the attention mask leaves no token to count, or none of the chosen"
    ):
        collect({"input_ids": torch.ones_like(batch["input_ids"]), "pixel_values": None})
    with pytest.raises(ValueError, match="tokens='image' needs input_ids, to tell image from text tokens"):
        collect({"input_ids": None})
    with pytest.raises(ValueError, match=r"found \(1, 2\) and \(1, 3\)"):
        select_tokens(torch.ones(1, 3), torch.ones(1, 2), "text", 1)


def test_selection_by_hand():
    ids, mask = torch.tensor([[7, 7, 1, 2]]), torch.tensor([[0, 1, 1, 0]])
    assert select_tokens(mask, ids, "all", None) is mask
    assert select_tokens(mask, ids, "image", 7).tolist() == [[False, True, False, False]]
    assert select_tokens(mask, ids, "text", 7).tolist() == [[False, False, True, False]]
    assert select_tokens(None, ids, "text", 7).tolist() == [[False, False, True, True]]


def test_the_image_token_of_wrapped_models(build_model):
    for kind in ("paligemma2", "pi0"):
        model = build_model(kind)
        assert find_image_token_id(model) == IMAGE_TOKEN
        assert find_image_token_id(nn.DataParallel(model)) == IMAGE_TOKEN
