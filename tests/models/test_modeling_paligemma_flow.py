import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    PaliGemmaForConditionalGeneration,
)

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.models import PaliGemmaFlowConfig, PaliGemmaFlowForAction, PaliGemmaFlowProcessor


NO_ACTIONS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


@pytest.fixture
def prompt(batch):
    """The stock inputs: cameras along the batch dimension."""
    inputs = {key: batch[key] for key in NO_ACTIONS}
    return inputs | {"pixel_values": inputs["pixel_values"].flatten(0, 1)}


@pytest.fixture
def flow(batch):
    """Noise and times, so that a loss can be repeated."""
    generator = torch.Generator().manual_seed(5)
    return {"noise": torch.randn(3, 5, 3, generator=generator), "timestep": torch.tensor([0.1, 0.5, 0.9])}


def _observation(batch):
    return {key: batch[key] for key in (*NO_ACTIONS, "state")}


def _aligned(model):
    """Weights read from a file lie at any address, and the last bit of a matrix product depends on it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


# Still the plain vision-language model


def test_forward_and_generate_equal_the_plain_vlm_bit_for_bit(vlm_folder, expert, prompt, batch):
    plain = _aligned(PaliGemmaForConditionalGeneration.from_pretrained(vlm_folder, attn_implementation="eager").eval())
    model = _aligned(PaliGemmaFlowForAction.from_vlm(vlm_folder, **expert).eval())
    labels = prompt["input_ids"].masked_fill(prompt["attention_mask"] == 0, -100)
    expected, found = (m(**prompt, labels=labels) for m in (plain, model))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert set(found) == set(expected)
    for options in ({}, {"num_beams": 2}):
        options |= {"max_new_tokens": 6, "do_sample": False}
        generated = [m.generate(**prompt, **options) for m in (plain, model)]
        assert torch.equal(*generated)
        by_camera = prompt | {"pixel_values": batch["pixel_values"]}
        assert torch.equal(model.generate(**by_camera, **options), generated[0])


def test_embedded_model_still_answers_and_acts():
    vlm = AutoModelForImageTextToText.from_pretrained(EMBEDDED_VLM, attn_implementation="eager", dtype=torch.float32)
    sizes = {"expert_hidden_size": 32, "expert_num_layers": 1, "expert_num_heads": 2, "expert_intermediate_size": 32}
    model = PaliGemmaFlowForAction.from_vlm(vlm, chunk_size=4, **sizes)
    processor = PaliGemmaFlowProcessor.from_vlm_processor(EMBEDDED_VLM)
    red_square = np.full((64, 64, 3), 255, np.uint8)
    red_square[20:44, 20:44] = (255, 0, 0)
    question = processor.prepare_action_inputs([[red_square]], ["answer en what color is the shape?"])
    question["pixel_values"] = question["pixel_values"].flatten(0, 1)
    generated = [m.generate(**question, max_new_tokens=3, do_sample=False) for m in (vlm, model)]
    assert torch.equal(*generated)
    observation = processor.prepare_action_inputs([[red_square] * 2], ["pick up the bowl"], state=np.zeros((1, 9)))
    assert torch.isfinite(model.sample_actions(**observation)).all()


def test_from_vlm_adds_only_the_expert(vlm_folder, vlm, expert):
    model, info = PaliGemmaFlowForAction.from_vlm(vlm_folder, **expert), vlm.state_dict()
    assert {key for key in model.state_dict() if not key.startswith("action_expert.")} == set(info)
    for key, value in info.items():
        assert torch.equal(model.state_dict()[key], value)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.name_or_path == vlm_folder
    # What is saved says nothing about this machine.
    assert model.config.vlm_name_or_path == Path(vlm_folder).name
    assert vlm_folder not in model.config.to_json_string()
    assert model.config.text_config._attn_implementation == "eager"
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.action_expert.norm.weight.dtype == torch.float32
    half = PaliGemmaFlowForAction.from_vlm(vlm_folder, dtype=torch.bfloat16, **expert)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_expert_is_initialised_from_the_seed_and_starts_near_zero_velocity(vlm_folder, expert, batch):
    def build(seed):
        torch.manual_seed(seed)
        return PaliGemmaFlowForAction.from_vlm(vlm_folder, **expert)

    first, again, other = (build(seed).action_expert.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layers.0.up_proj.weight"], other["layers.0.up_proj.weight"])
    # Fan-in initialisation: 1/√32 for the inner layers, damped at the output.
    assert first["layers.0.up_proj.weight"].std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert torch.count_nonzero(first["layers.0.up_proj.bias"]) == 0
    output = build(3)(**batch)
    assert 0 < output.velocity.abs().max() < 0.2
    config = PaliGemmaFlowConfig(**{**json.loads(build(3).config.to_json_string())})
    torch.manual_seed(3)
    direct = PaliGemmaFlowForAction(config).action_expert.state_dict()
    assert direct["layers.0.up_proj.weight"].std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_conversions_keep_the_attention_implementation(vlm_config, expert):
    vlm_config.text_config.attn_logit_softcapping = None
    vlm_config._attn_implementation = {"": "eager", "text_config": "eager", "vision_config": "sdpa"}
    vlm = PaliGemmaForConditionalGeneration(vlm_config)
    model = PaliGemmaFlowForAction.from_vlm(vlm, **expert)
    for candidate in (vlm, model, model.to_vlm()):
        chosen = [part._attn_implementation for part in (candidate.config.vision_config, candidate.model.config)]
        assert chosen == ["sdpa", "eager"]
        assert candidate.model.vision_tower.config._attn_implementation == "sdpa"
        assert candidate.model.language_model.config._attn_implementation == "eager"


def test_to_vlm_shares_the_weights_and_saves_a_stock_checkpoint(model, prompt, tmp_path):
    plain = model.to_vlm()
    assert type(plain) is PaliGemmaForConditionalGeneration
    assert plain.get_input_embeddings().weight is model.lm_head.weight
    assert not any(parameter.is_meta for parameter in plain.parameters())
    with torch.no_grad():
        model.model.multi_modal_projector.linear.weight.add_(0.5)
        expected = model(**prompt).logits
        assert torch.equal(plain(**prompt).logits, expected)
        plain.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model_type"] == "paligemma"
        assert not [key for key in config if key.startswith(("expert_", "flow_", "action_", "time_"))]
        loaded = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert torch.equal(_aligned(loaded)(**prompt).logits, expected)


def test_save_and_load_round_trip(model, batch, flow, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        # Tied: the embeddings are stored once.
        assert sum("embed_tokens" in key or "lm_head" in key for key in file.keys()) == 1  # noqa: SIM118
    loaded, info = PaliGemmaFlowForAction.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for candidate in (
        loaded,
        AutoModel.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        assert type(candidate) is PaliGemmaFlowForAction
        _aligned(candidate)
        assert torch.equal(candidate(**batch, **flow).loss, model(**batch, **flow).loss)
        observation = _observation(batch)
        assert torch.equal(*(m.sample_actions(**observation, noise=flow["noise"]) for m in (candidate, model)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is PaliGemmaFlowConfig
    assert config.expert_hidden_size == 32


# The flow loss


def test_loss_against_a_hand_written_oracle(model, batch, flow):
    output = model(**batch, **flow)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    hidden = model.model(**prompt, pixel_values=batch["pixel_values"].flatten(0, 1)).last_hidden_state
    x = torch.stack(
        [(1 - t) * e + t * a for t, e, a in zip(flow["timestep"], flow["noise"], batch["actions"], strict=True)]
    )
    velocity = model.action_expert(x, flow["timestep"], batch["state"], hidden, batch["attention_mask"])
    torch.testing.assert_close(output.velocity, velocity)
    errors = [
        (velocity[b, h, d] - (batch["actions"] - flow["noise"])[b, h, d]).item() ** 2
        for b in range(3)
        for h in range(5)
        for d in range(3)
        if not batch["action_is_pad"][b, h]
    ]
    assert len(errors) == 12 * 3
    assert output.flow_mse.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert output.loss.item() == pytest.approx(10 * sum(errors) / len(errors), rel=1e-5)
    assert output.logits is None
    assert output.past_key_values is None


def test_action_batch_never_runs_the_head(model, batch):
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the language-model head ran"))
    model(**batch)
    model.sample_actions(**_observation(batch))


def test_missing_token_type_ids_mean_all_prefix(model, batch, flow):
    expected = model(**batch, **flow)
    del batch["token_type_ids"]
    assert torch.equal(model(**batch, **flow).loss, expected.loss)
    # The prompt really is read in both directions: as a causal suffix it gives something else.
    causal = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        token_type_ids=torch.ones_like(batch["input_ids"]),
        pixel_values=batch["pixel_values"].flatten(0, 1),
    )
    assert not torch.allclose(causal.last_hidden_state, expected.last_hidden_state, atol=1e-2)


def test_draws_follow_the_seed_and_the_generator(model, batch):
    def loss(seed, **kwargs):
        torch.manual_seed(seed)
        return model(**batch, **kwargs).loss.item()

    assert loss(0) == loss(0) != loss(1)
    draws = [loss(seed, generator=torch.Generator().manual_seed(7)) for seed in (0, 1)]
    assert draws[0] == draws[1]


def test_labels_add_the_stock_cross_entropy_and_stay_hidden_from_the_expert(model, processor, images, flow):
    arrays = {"state": torch.zeros(3, 4), "actions": torch.zeros(3, 5, 3)}
    instructions = ["pick up the red cup"] * 3
    plain = processor.prepare_action_inputs(images, instructions, **arrays)
    answered = processor.prepare_action_inputs(images, instructions, suffix=["red", "blue cup", "bowl"], **arrays)
    stock = {key: answered[key] for key in (*NO_ACTIONS, "labels")}
    expected = model(**stock).loss
    output = model(**answered, **flow)
    torch.testing.assert_close(output.language_loss, expected)
    torch.testing.assert_close(output.loss, 10 * output.flow_mse + expected)
    # The answer follows the prompt and the expert does not see it: the velocity is that of the prompt alone.
    torch.testing.assert_close(output.velocity, model(**plain, **flow).velocity, atol=2e-5, rtol=1e-4)


def test_stop_gradient(vlm, expert, batch, flow):
    def gradients(**overrides):
        torch.manual_seed(1)
        model = PaliGemmaFlowForAction.from_vlm(copy.deepcopy(vlm), **expert, **overrides)
        model.freeze_vision_tower()
        model(**batch, **flow).loss.backward()
        return {name: p.grad is not None and p.grad.abs().max().item() > 0 for name, p in model.named_parameters()}

    trained = gradients()
    assert trained["model.multi_modal_projector.linear.weight"]
    assert all(trained[name] for name in trained if "language_model.layers" in name or "action_expert" in name)
    assert not any(trained[name] for name in trained if "vision_tower" in name)
    stopped = gradients(flow_gradient_to_vlm=False)
    assert all(reached == name.startswith("action_expert.") for name, reached in stopped.items())


def test_gradient_checkpointing_changes_nothing(model, batch, flow):
    def gradients():
        model.zero_grad()
        model(**batch, **flow).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    model.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.action_expert.layers)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_bfloat16_and_autocast(model, batch, flow):
    exact = model(**batch, **flow)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, **flow)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    model.to(torch.bfloat16)
    half = model(**batch, **flow)
    assert half.velocity.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)
    assert model.sample_actions(**_observation(batch)).dtype == torch.float32


# Sampling


@pytest.mark.parametrize("num_steps", [None, 3])
def test_sampling_equals_encoding_again_at_every_step(model, batch, flow, num_steps):
    found = model.sample_actions(**_observation(batch), noise=flow["noise"], num_steps=num_steps)
    x, n = flow["noise"], num_steps or 10
    with torch.no_grad():
        for step in range(n):
            # With actions = noise = x, x_t is x at any time: the training pass evaluates the field there.
            timestep = torch.full((3,), step / n)
            x = x + model(**_observation(batch), actions=x, noise=x, timestep=timestep).velocity / n
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    assert found.shape == (3, 5, 3)


def test_sampling_encodes_the_prompt_and_its_keys_once(model, batch):
    calls = {"vlm": 0, "keys": 0, "expert": 0}

    def count(module, name):
        module.register_forward_hook(lambda *_: calls.update({name: calls[name] + 1}))

    count(model.model.language_model, "vlm")
    count(model.action_expert.layers[0].cross_attention.k_proj, "keys")
    count(model.action_expert, "expert")
    noise = model.sample_actions(**_observation(batch), num_steps=7, generator=torch.Generator().manual_seed(0))
    assert calls == {"vlm": 1, "keys": 1, "expert": 7}
    again = model.sample_actions(**_observation(batch), num_steps=7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise, again)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_prompt_does_not_matter(model, batch, flow, side):
    def pad(tensor, value):
        extra = torch.full((3, 6), value)
        return torch.cat([extra, tensor] if side == "left" else [tensor, extra], dim=1)

    padded = batch | {key: pad(batch[key], 0) for key in ("input_ids", "attention_mask", "token_type_ids")}
    expected, found = model(**batch, **flow), model(**padded, **flow)
    torch.testing.assert_close(found.velocity, expected.velocity, atol=2e-5, rtol=1e-4)
    # The mask is what does it.
    unmasked = model(**padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}, **flow)
    assert not torch.allclose(unmasked.velocity, expected.velocity, atol=1e-3)


def test_both_cameras_and_the_state_reach_the_velocity(model, batch, flow):
    expected = model(**batch, **flow).velocity
    for camera in (0, 1):
        pixels = batch["pixel_values"].clone()
        pixels[0, camera] = -pixels[0, camera]
        changed = model(**batch | {"pixel_values": pixels}, **flow).velocity
        assert not torch.allclose(changed[0], expected[0], atol=1e-4)
        assert torch.equal(changed[1:], expected[1:])
    assert not torch.allclose(model(**batch | {"state": -batch["state"]}, **flow).velocity, expected, atol=1e-3)
    flat = batch | {"pixel_values": batch["pixel_values"].flatten(0, 1)}
    assert torch.equal(model(**flat, **flow).velocity, expected)


def test_without_state(vlm, expert, batch, flow):
    model = PaliGemmaFlowForAction.from_vlm(vlm, **expert, use_state=False)
    assert not [name for name, _ in model.named_parameters() if "state_proj" in name]
    expected = model(**batch, **flow)
    del batch["state"]
    assert torch.equal(model(**batch, **flow).velocity, expected.velocity)
    assert model.sample_actions(**{key: batch[key] for key in NO_ACTIONS}).shape == (3, 5, 3)


# What is refused


def test_wrong_batches_are_refused(model, batch):
    for change, message in (
        ({"state": None}, "`state` is missing"),
        ({"state": torch.zeros(3, 2)}, r"`state` must have shape \(3, 4\), found \(3, 2\)"),
        ({"actions": torch.zeros(3, 6, 3)}, r"`actions` must have shape \(3, 5, 3\), found \(3, 6, 3\)"),
        ({"timestep": torch.zeros(2)}, r"`timestep` must have shape \(3,\)"),
        ({"noise": torch.zeros(3, 5, 2)}, r"`noise` must have shape"),
        ({"action_is_pad": torch.zeros(3, 5)}, "is_pad must be boolean"),
        ({"use_cache": True}, "no key-value cache"),
        ({"labels": batch["input_ids"], "token_type_ids": None}, "need `token_type_ids`"),
        ({"labels": torch.full_like(batch["input_ids"], -100)}, "label no token"),
        ({"actions": None}, "state, action_is_pad given without `actions`"),
        ({"input_ids": None}, "needs `input_ids`, and no"),
        (
            {key: batch[key][:1] for key in NO_ACTIONS},
            r"`actions` must have shape \(1, 5, 3\), found \(3, 5, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch | change)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        model.sample_actions(**_observation(batch), num_steps=0)
    with pytest.raises(ValueError, match=r"`noise` must have shape \(3, 5, 3\), found \(3, 4, 3\)"):
        model.sample_actions(**_observation(batch), noise=torch.zeros(3, 4, 3))


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 2, 3, 16, 24), (3, 2, 1, 16, 16), (3, 16, 16), (0, 3, 16, 16)])
def test_images_of_a_wrong_shape_are_refused_before_the_vision_tower(model, batch, shape):
    images = {"pixel_values": torch.zeros(shape)}
    prompt = {key: batch[key] for key in NO_ACTIONS} | images
    message = rf"\(batch, \*\(3, 16, 16\)\) or .*, found {re.escape(str(shape))}: let the processor"
    for call in (
        lambda: model(**batch | images),
        lambda: model(**prompt),
        lambda: model.generate(**prompt, max_new_tokens=1),
        lambda: model.sample_actions(**_observation(batch) | images),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_checkpoints_are_refused(model, vlm_folder, expert, tmp_path):
    with pytest.raises(ValueError, match=r"soft-caps its attention scores at 50\.0"):
        PaliGemmaFlowForAction.from_vlm(vlm_folder, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="not a field of the action expert: expert_width"):
        PaliGemmaFlowForAction.from_vlm(vlm_folder, expert_width=3)
    with pytest.raises(ValueError, match="already has an action expert"):
        PaliGemmaFlowForAction.from_vlm(model)
    with pytest.raises(ValueError, match="for a checkpoint, not a loaded model"):
        PaliGemmaFlowForAction.from_vlm(model.to_vlm(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="already has an action expert: load it with"):
        PaliGemmaFlowForAction.from_vlm(tmp_path / "flow")
    with pytest.raises(ValueError, match=r"soft-caps its attention scores at 50\.0"):
        PaliGemmaFlowForAction.from_pretrained(tmp_path / "flow", attn_implementation="sdpa")
    model.config.text_config.save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match="not a PaliGemma: its configuration has model_type 'gemma2'"):
        PaliGemmaFlowForAction.from_vlm(tmp_path / "gemma")
