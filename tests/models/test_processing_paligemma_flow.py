import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PaliGemmaProcessor

from hf_aegis.data import PictureSettings
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowProcessor


TEXT = ["pick up the red cup", "pick up the bowl left of the blue cup", "pick bowl"]
# The stock processor makes its labels through np.array, which warns on torch tensors.
ARRAY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def _raw(seed=0):
    rng = np.random.default_rng(seed)
    return {"state": rng.normal(1.0, 2.0, (3, 4)), "actions": rng.uniform(-3.0, 5.0, (3, 5, 3))}


def test_prompt_is_paligemmas_own_form(processor, images):
    batch = processor(images, ["pick_up\nthe  red cup ", "pick bowl", "red"], **_raw())
    tokenizer = processor.tokenizer
    image, bos, newline = processor.image_token_id, tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("\n")
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("pick", "up", "the", "red", "cup")]
    # Two cameras of four patches each.
    assert batch["input_ids"][0].tolist() == [image] * 8 + [bos, *words, newline]
    assert batch["input_ids"][2].tolist() == [image] * 8 + [bos, words[3], newline] + [tokenizer.pad_token_id] * 4
    assert batch["attention_mask"][2].tolist() == [1] * 11 + [0] * 4
    assert torch.count_nonzero(batch["token_type_ids"]) == 0
    assert "labels" not in batch


def test_cameras_keep_their_order_and_numpy_equals_pil(processor, images):
    batch = processor(images, TEXT, **_raw())
    assert batch["pixel_values"].shape == (3, 2, 3, 16, 16)
    for sample in range(3):
        for camera in range(2):
            alone = processor.image_processor(images[sample][camera], return_tensors="pt")["pixel_values"][0]
            assert torch.equal(batch["pixel_values"][sample, camera], alone)
    arrays = [[np.asarray(image) for image in cameras] for cameras in images]
    assert torch.equal(processor(arrays, TEXT, **_raw())["pixel_values"], batch["pixel_values"])


def test_robot_units_in_and_out(processor, images):
    raw = _raw()
    batch = processor(images, TEXT, **raw)
    for name, values in raw.items():
        q01, q99 = (np.asarray(getattr(getattr(processor.statistics, name), key)) for key in ("q01", "q99"))
        expected = np.clip(2 * (values - q01) / (q99 - q01) - 1, -1, 1)
        assert batch[name].dtype == torch.float32
        np.testing.assert_allclose(batch[name].numpy(), expected, atol=1e-5)
    inside = np.abs(batch["actions"].numpy()) < 1
    assert inside.mean() > 0.9
    for actions in (batch["actions"], batch["actions"].numpy()):
        restored = processor.postprocess_actions(actions)
        assert type(restored) is type(actions)
        np.testing.assert_allclose(np.asarray(restored)[inside], raw["actions"][inside], atol=1e-5)
    half = processor.postprocess_actions(torch.zeros(1, 5, 3, dtype=torch.bfloat16))
    assert half.dtype == torch.float32


def test_a_single_observation(processor, images):
    raw = {"state": _raw()["state"][0]}
    single = processor(images[0], TEXT[0], **raw)
    listed = processor([images[0]], [TEXT[0]], state=raw["state"][None])
    assert single.keys() == listed.keys()
    assert all(torch.equal(single[key], listed[key]) for key in single)
    assert single["state"].shape == (1, 4)


@ARRAY
def test_vqa_calls_are_the_stock_processors(processor, vlm_processor, images):
    flat = [cameras[0] for cameras in images]
    prompts = ["<image>answer en what is red"] * 3
    for options in ({}, {"suffix": ["red", "blue cup", "bowl"]}):
        expected, found = (
            p(images=flat, text=prompts, padding=True, return_tensors="pt", **options)
            for p in (vlm_processor, processor)
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_suffix_adds_labels_behind_the_prompt(processor, images):
    batch = processor(images, TEXT, suffix=["red", "blue cup", "bowl"], **_raw())
    labelled = batch["labels"] != -100
    assert torch.equal(labelled, batch["token_type_ids"] == 1)
    answer = batch["labels"][1][labelled[1]]
    assert processor.tokenizer.convert_ids_to_tokens(answer.tolist()) == ["blue", "cup", "<eos>"]


@pytest.mark.parametrize("cameras", [None, ["agentview_rgb", "eye_in_hand_rgb"]])
def test_save_and_load_round_trip(vlm_processor, statistics, images, tmp_path, cameras):
    features = None if cameras is None else ["ee_pos", "gripper_states"]
    pictures = None if cameras is None else PictureSettings(64, 3, "fast")
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        vlm_processor, statistics, cameras, state_features=features, pictures=pictures
    )
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "PaliGemmaFlowProcessor"
    expected = processor(images, TEXT, **_raw())
    for loaded in (PaliGemmaFlowProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is PaliGemmaFlowProcessor
        assert loaded.statistics == statistics
        assert (loaded.cameras, loaded.state_features, loaded.pictures) == (cameras, features, pictures)
        found = loaded(images, TEXT, **_raw())
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_from_a_stock_folder_and_beside_a_model(model, vlm_folder, statistics, images, tmp_path):
    processor = PaliGemmaFlowProcessor.from_vlm_processor(vlm_folder, statistics)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is PaliGemmaFlowProcessor
    without = PaliGemmaFlowProcessor.from_vlm_processor(processor)
    assert without.statistics is None
    without.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).statistics is None
    assert type(PaliGemmaProcessor.from_pretrained(vlm_folder)) is PaliGemmaProcessor


def test_collator_makes_the_batch_of_normalised_items(processor, images, batch, model):
    keys = ("state", "actions", "action_is_pad")
    items = [
        {"images": [np.asarray(image) for image in images[i]], "instruction": TEXT[i]}
        | {key: batch[key][i].numpy() for key in keys}
        for i in range(3)
    ]
    found = PaliGemmaFlowCollator(processor)(items)
    assert found.keys() == batch.keys()
    assert all(torch.equal(found[key], batch[key]) for key in batch)
    assert found["action_is_pad"].dtype == torch.bool
    assert torch.isfinite(model(**found).loss)

    with pytest.raises(ValueError, match="item 1 lacks actions; found images, instruction, state, action_is_pad"):
        PaliGemmaFlowCollator(processor)([items[0], {key: items[1][key] for key in items[1] if key != "actions"}])
    shorter = items[1] | {"actions": items[1]["actions"][:3]}
    with pytest.raises(ValueError, match=r"`actions` of item 1 has shape \(3, 3\), of item 0 \(5, 3\)"):
        PaliGemmaFlowCollator(processor)([items[0], shorter])


def test_wrong_input_is_refused(processor, images):
    raw = _raw()
    grey = [[images[0][0].convert("L"), images[0][1]], *images[1:]]
    floating = [[np.zeros((8, 8, 3), np.float32)] * 2, *images[1:]]
    channels_first = [[np.zeros((3, 8, 8), np.uint8)] * 2, *images[1:]]
    with_nan = raw["state"].copy()
    with_nan[1, 2] = np.nan
    for (pictures, text, values), message in (
        ((grey, TEXT, raw), r"image 0 of sample 0 has mode 'L' and size \(20, 20\): expected an RGB PIL image"),
        ((floating, TEXT, raw), r"image 0 of sample 0 is float32 of shape \(8, 8, 3\)"),
        ((channels_first, TEXT, raw), r"uint8 of shape \(3, 8, 8\): expected"),
        (([[np.zeros((0, 8, 3), np.uint8)] * 2, *images[1:]], TEXT, raw), r"uint8 of shape \(0, 8, 3\): expected"),
        (([[Image.new("RGB", (0, 8))] * 2, *images[1:]], TEXT, raw), r"mode 'RGB' and size \(0, 8\): expected"),
        (([["a.png"] * 2, *images[1:]], TEXT, raw), "image 0 of sample 0 is a str"),
        (([images[0], images[1][:1], images[2]], TEXT, raw), "sample 1 has 1 images, expected 2"),
        (([[], [], []], TEXT, raw), "sample 0 has 0 images, expected 1"),
        ((images[:2], TEXT, raw), "found images of 2 samples for 3 instructions"),
        (([cameras[0] for cameras in images], TEXT, raw), "the list of its cameras' images"),
        ((images, ["", "red", "blue"], raw), "the instruction is empty"),
        ((images, ["\u200b\0", "red", "blue"], raw), "the instruction is empty, or all of it is invisible"),
        ((images, ["red\ud800", "red", "blue"], raw), "the instruction is no valid Unicode"),
        ((images, ["red " * 300, "red", "blue"], raw), "the instruction has 1199 characters, expected at most 1000"),
        ((images, ["<image>red", "red", "blue"], raw), "holds '<image>'"),
        ((images, ["red<eos>", "red", "blue"], raw), "holds '<eos>', which is a token of the model's own"),
        ((images, [None, "red", "blue"], raw), "must be a str, found NoneType"),
        ((images, TEXT, raw | {"state": raw["state"][:, :2]}), r"'state' of shape \(3, 2\) does not fit"),
        ((images, TEXT, raw | {"state": raw["state"][:2]}), r"`state` must have 2 dimensions and 3 samples"),
        ((images, TEXT, raw | {"state": with_nan}), r"'state' holds NaN or infinity, first at index \[1, 2\]"),
        ((images, TEXT, raw | {"actions": raw["actions"][..., :2]}), r"'actions' of shape \(3, 5, 2\)"),
        ((images, TEXT, raw | {"action_is_pad": np.zeros((3, 5))}), "must be boolean of shape"),
        ((images, TEXT, {"state": raw["state"], "action_is_pad": np.zeros((3, 5), bool)}), "without `actions`"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(pictures, text, **values)
    with pytest.raises(ValueError, match=r"the processor's statistics 4"):
        processor.prepare_action_inputs(images, TEXT, state=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"`state` holds NaN or infinity, first at index \[1, 2\]"):
        processor.prepare_action_inputs(images, TEXT, state=with_nan)
    with pytest.raises(ValueError, match="holds NaN"):
        processor.postprocess_actions(torch.full((1, 5, 3), torch.nan))
    with pytest.raises(ValueError, match=r"\(1, 5, 2\) does not fit"):
        processor.postprocess_actions(torch.zeros(1, 5, 2))


def test_missing_statistics_and_cameras_are_named(vlm_processor, statistics, images):
    without = PaliGemmaFlowProcessor.from_vlm_processor(vlm_processor)
    for call in (
        lambda: without(images, TEXT, state=_raw()["state"]),
        lambda: without.postprocess_actions(np.zeros((1, 5, 3), np.float32)),
    ):
        with pytest.raises(ValueError, match="needs the statistics of the training data"):
            call()
    # Values that are normalised already need none.
    assert without.prepare_action_inputs(images, TEXT, state=np.zeros((3, 4)))["state"].shape == (3, 4)
    one = PaliGemmaFlowProcessor.from_vlm_processor(vlm_processor, statistics, cameras=["agentview_rgb"])
    with pytest.raises(ValueError, match=r"sample 0 has 2 images, expected 1 \(agentview_rgb\)"):
        one(images, TEXT, **_raw())
    with pytest.raises(TypeError, match="expected a PaliGemmaProcessor, found TokenizersBackend"):
        PaliGemmaFlowProcessor.from_vlm_processor(vlm_processor.tokenizer)
    with pytest.raises(ValueError, match="missing"):
        PaliGemmaFlowProcessor(
            vlm_processor.image_processor, vlm_processor.tokenizer, statistics={"state": statistics.state.to_dict()}
        )
