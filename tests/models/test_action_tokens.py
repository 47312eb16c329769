import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from hf_aegis.data import FASTTokenizer
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowProcessor
from hf_aegis.models.action_tokens import bind_to_vlm


TEXT = ["pick up the red cup", "pick up the bowl left of the blue cup", "pick bowl"]


def _arrays():
    rng = np.random.default_rng(2)
    return {"state": rng.uniform(-1, 1, (3, 4)), "actions": rng.uniform(-1, 1, (3, 5, 3))}


def test_suffix_equals_that_of_the_same_tokens_as_text(fast_processor, images, action_tokenizer):
    arrays = _arrays()
    batch = fast_processor.prepare_action_inputs(images, TEXT, **arrays, action_tokens=True)
    # Action token t is <loc1023 - t>: PaliGemma's own tokenizer can write them.
    tokens = action_tokenizer(arrays["actions"].astype(np.float32))
    written = ["".join(f"<loc{1023 - token:04d}>" for token in row) for row in tokens]
    expected = fast_processor.prepare_action_inputs(images, TEXT, **arrays, suffix=written)
    assert batch.keys() == expected.keys()
    for key in batch:
        assert torch.equal(batch[key], expected[key]), key
        assert batch[key].dtype == expected[key].dtype
    answer = batch["labels"][1][batch["labels"][1] != -100].tolist()
    assert answer == [*action_tokenizer.to_vlm_ids(tokens[1]), fast_processor.tokenizer.eos_token_id]


def test_actions_in_robot_units_are_tokenised_normalised(fast_processor, images, action_tokenizer):
    raw = {"state": np.ones((3, 4)), "actions": np.random.default_rng(0).uniform(-3, 5, (3, 5, 3))}
    batch = fast_processor(images, TEXT, **raw, action_tokens=True)
    for row in range(3):
        answer = batch["labels"][row][batch["labels"][row] != -100][:-1].tolist()
        (chunk,) = action_tokenizer.decode([action_tokenizer.from_vlm_ids(answer)], on_error="raise")
        assert np.linalg.norm(chunk - batch["actions"][row].numpy(), axis=0).max() <= 0.05 * 5**0.5 + 1e-6
    single = fast_processor(images[0], TEXT[0], state=np.ones(4), actions=raw["actions"][0], action_tokens=True)
    length = int(batch["attention_mask"][0].sum())
    assert torch.equal(single["input_ids"][0], batch["input_ids"][0, :length])


def test_collator_adds_the_tokens_on_request(fast_processor, images, fast_batch):
    items = [
        {"images": images[i], "instruction": TEXT[i], "action_is_pad": np.zeros(5, dtype=bool)}
        | {key: fast_batch[key][i].numpy() for key in ("state", "actions")}
        for i in range(3)
    ]
    found = PaliGemmaFlowCollator(fast_processor, action_tokens=True)(items)
    assert all(torch.equal(found[key], fast_batch[key]) for key in fast_batch)
    assert "labels" not in PaliGemmaFlowCollator(fast_processor)(items)


def test_save_and_load_with_the_action_tokenizer(fast_processor, vlm_processor, images, tmp_path):
    fast_processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["action_tokenizer"] == "action_tokenizer"
    expected = fast_processor.prepare_action_inputs(images, TEXT, **_arrays(), action_tokens=True)
    for loaded in (PaliGemmaFlowProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is PaliGemmaFlowProcessor
        assert loaded.statistics == fast_processor.statistics
        assert loaded.action_tokenizer.to_dict() == fast_processor.action_tokenizer.to_dict()
        found = loaded.prepare_action_inputs(images, TEXT, **_arrays(), action_tokens=True)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    alone = FASTTokenizer.from_pretrained(tmp_path / "action_tokenizer")
    assert alone.to_dict() == fast_processor.action_tokenizer.to_dict()
    # A processor without one, saved over it, has none.
    PaliGemmaFlowProcessor.from_vlm_processor(vlm_processor).save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).action_tokenizer is None


def test_prompts_with_an_action_token_are_refused(fast_processor, processor, images):
    state = np.zeros((3, 4))
    texts = [TEXT[0], "pick <loc1000> up", TEXT[2]]
    message = r"'pick <loc1000> up' holds '<loc1000>' \(id \d+\), which stands for an action: .* ids \d+ to \d+"
    with pytest.raises(ValueError, match=message):
        fast_processor.prepare_action_inputs(images, texts, state=state)
    # Below the hundred action tokens, and without an action tokenizer, locations are words like others.
    below = fast_processor.prepare_action_inputs(images, [TEXT[0], "pick <loc0923> up", TEXT[2]], state=state)
    assert "<loc0923>" in fast_processor.tokenizer.convert_ids_to_tokens(below["input_ids"][1].tolist())
    processor.prepare_action_inputs(images, texts, state=state)
    processor.prepare_action_inputs(images, ["pick <loc0001> up", *texts[1:]], state=state)


class _Sized(FASTTokenizer):
    """One that claims to have a given number of tokens."""

    num_tokens = 0


def test_the_vocabulary_has_to_have_room(vlm_processor, action_tokenizer):
    tokenizer = vlm_processor.tokenizer
    seg, image = tokenizer.convert_tokens_to_ids(["<seg000>", "<image>"])
    fast = _Sized(action_tokenizer.bpe_tokenizer)
    # 1,024 tokens lie exactly on the <loc> tokens; the next would be <image>.
    fast.num_tokens = 1024
    bind_to_vlm(fast, tokenizer)
    assert fast.vlm_ids() == range(image + 1, seg)
    fast.num_tokens, fast.vlm_vocab_size = 1025, None
    with pytest.raises(ValueError, match=r"1025 FAST tokens do not fit .* would reach '<image>'.* is room for 1024"):
        bind_to_vlm(fast, tokenizer)
    assert fast.vlm_vocab_size is None
    action_tokenizer.vlm_vocab_size = 257_152
    with pytest.raises(ValueError, match=rf"a vocabulary of 257152 tokens, .* has {seg + 128}"):
        PaliGemmaFlowProcessor.from_vlm_processor(vlm_processor, action_tokenizer=action_tokenizer)


class _PaliGemma2Words:
    """
    The ids of Google's PaliGemma 2 tokenizer that matter here: 256,000 Gemma words, then <loc>, <seg>, and <image>
    behind them (its configuration has `image_token_index` 257,152).
    """

    all_special_ids = (0, 1, 2, 3, 106, 107, 257_152)

    def get_vocab(self):
        return {"<loc0000>": 256_000, "<seg000>": 257_024, "<seg127>": 257_151, "<image>": 257_152}

    def __call__(self, text, add_special_tokens):
        return {"input_ids": {"\n": [108]}[text]}


def test_in_paligemma_2_the_ids_are_openpis(action_tokenizer):
    fast = _Sized(action_tokenizer.bpe_tokenizer)
    fast.num_tokens = 2048
    bind_to_vlm(fast, _PaliGemma2Words())
    # openpi: 257,152 - 1 - 128 - t. Token 0 is <loc1023>; the published 2,048 reach 1,024 words past <loc0000>.
    assert fast.to_vlm_ids([0, 1023, 2047]) == [257_023, 256_000, 254_976]


def test_wrong_requests_are_refused(fast_processor, processor, images):
    arrays = _arrays()
    for chosen, arguments, message in (
        (processor, arrays, "needs a FAST tokenizer, and this processor has none"),
        (fast_processor, {"state": arrays["state"]}, "action_tokens=True was given without `actions`"),
        (fast_processor, arrays | {"suffix": ["red"] * 3}, "give `suffix` or action_tokens=True, not both"),
        (fast_processor, arrays | {"padding_side": "left"}, "padded on the right; drop padding_side"),
        (fast_processor, arrays | {"actions": arrays["actions"][:, :4]}, "do not fit this tokenizer's time_horizon 5"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen.prepare_action_inputs(images, TEXT, **arguments, action_tokens=True)
