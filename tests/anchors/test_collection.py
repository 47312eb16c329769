import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_aegis.anchors import ActivationAnchor, find_decoder_layers


# PEFT still asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def layer_tokens(model, batches):
    """Unmasked layer outputs in float64, `(N, D)` per layer and batch: the oracle stores what the anchor may not."""
    layers = find_decoder_layers(model)
    seen = [[] for _ in layers]
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output, index=index: seen[index].append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for index, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return [[h[m].double().numpy() for h, m in zip(per_layer, masks, strict=True)] for per_layer in seen]


def assert_pooled_moments(anchor, tokens):
    for layer, per_batch in enumerate(tokens):
        everything = np.concatenate(per_batch)
        np.testing.assert_allclose(anchor.mean[layer].numpy(), everything.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(anchor.variance[layer].numpy(), everything.var(axis=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "paligemma2", "pi0"])
@pytest.mark.parametrize("moments", ["batch", "pooled"])
def test_moments_match_stored_hidden_states(build_model, make_batches, kind, moments):
    model, batches = build_model(kind), make_batches(kind)
    anchor = ActivationAnchor.collect(model, batches, moments=moments, progress=False)
    tokens = layer_tokens(model, batches)
    assert anchor.mean.dtype == anchor.variance.dtype == torch.float32
    assert (anchor.num_layers, anchor.width) == (3, 16)
    if moments == "pooled":
        assert_pooled_moments(anchor, tokens)
    else:
        for layer, per_batch in enumerate(tokens):
            mean = np.mean([batch.mean(axis=0) for batch in per_batch], axis=0)
            variance = np.mean([batch.var(axis=0) for batch in per_batch], axis=0)
            np.testing.assert_allclose(anchor.mean[layer].numpy(), mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(anchor.variance[layer].numpy(), variance, rtol=1e-5, atol=1e-7)
    assert anchor.fingerprint.num_samples == 5
    assert anchor.fingerprint.num_batches == 2
    assert anchor.fingerprint.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_layer_outputs_are_raw_not_normalised(build_model, make_batches):
    model, batches = build_model("llama"), make_batches("llama")
    anchor = ActivationAnchor.collect(model, batches, moments="pooled", progress=False)
    with torch.no_grad():
        hidden = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    masks = [batch["attention_mask"].bool() for batch in batches]
    for layer, matches in ((0, True), (2, False)):  # the last of the model's own list went through the final norm
        own = torch.cat([states[layer + 1][mask] for states, mask in zip(hidden, masks, strict=True)]).mean(dim=0)
        assert torch.allclose(anchor.mean[layer], own, atol=1e-5) is matches


def test_pooled_moments_do_not_depend_on_the_batching_and_batch_moments_do(build_model, make_batches):
    model = build_model("llama")
    (whole,) = make_batches("llama", sizes=(6,))
    parts = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 2), slice(2, 6))]
    pooled, pooled_parts, batch, batch_parts = (
        ActivationAnchor.collect(model, batches, moments=moments, progress=False)
        for moments in ("pooled", "batch")
        for batches in ([whole], parts)
    )
    torch.testing.assert_close(pooled.mean, pooled_parts.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled.variance, pooled_parts.variance, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(batch.variance, batch_parts.variance, rtol=1e-3)
    torch.testing.assert_close(batch.variance, pooled.variance, rtol=1e-6, atol=0)  # one batch: both are the same


def test_padding_does_not_change_the_anchor(build_model, make_batches):
    model = build_model("llama")
    (batch,) = make_batches("llama", sizes=(3,))
    size = batch["input_ids"].shape[0]
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((size, 5), 7)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(size, 5, dtype=torch.int64)], dim=1),
    }
    plain, longer = (ActivationAnchor.collect(model, [b], progress=False) for b in (batch, padded))
    torch.testing.assert_close(longer.mean, plain.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(longer.variance, plain.variance, rtol=1e-4, atol=1e-7)
    assert longer.fingerprint.num_tokens == plain.fingerprint.num_tokens


def test_without_an_attention_mask_every_token_counts(build_model, make_batches):
    model = build_model("llama")
    (batch,) = make_batches("llama", sizes=(1,))
    plain = ActivationAnchor.collect(model, [{"input_ids": batch["input_ids"]}], progress=False)
    masked = ActivationAnchor.collect(model, [batch], progress=False)
    torch.testing.assert_close(plain.mean, masked.mean)
    assert plain.fingerprint.num_tokens == 9


def test_bfloat16_models_accumulate_in_float32_or_better(build_model, make_batches):
    model = build_model("llama").bfloat16()
    # So far from zero that sums in bfloat16 would lose the variance altogether.
    model.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output + 40.0)
    batches = make_batches("llama", sizes=(4, 4, 4))
    anchor = ActivationAnchor.collect(model, batches, moments="pooled", progress=False)
    assert anchor.fingerprint.dtype == "bfloat16"
    tokens = layer_tokens(model, batches)
    for layer, per_batch in enumerate(tokens):
        everything = np.concatenate(per_batch)
        np.testing.assert_allclose(anchor.mean[layer].numpy(), everything.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(anchor.variance[layer].numpy(), everything.var(axis=0), rtol=1e-3, atol=1e-6)


def test_many_batches_far_from_zero(build_model, make_batches):
    model = build_model("llama")
    model.model.layers[2].register_forward_hook(lambda _module, _inputs, output: output + 500.0)
    batches = make_batches("llama", sizes=(2,) * 40)
    anchor = ActivationAnchor.collect(model, batches, moments="pooled", progress=False)
    everything = np.concatenate(layer_tokens(model, batches)[2])
    np.testing.assert_allclose(anchor.variance[2].numpy(), everything.var(axis=0), rtol=1e-3)


def test_the_model_is_left_as_it_was_found(build_model, make_batches):
    model = build_model("paligemma2").train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    seen = []
    probe = model.model.language_model.register_forward_hook(
        lambda module, _inputs, output: seen.append((module.training, output.past_key_values, torch.is_grad_enabled()))
    )
    anchor = ActivationAnchor.collect(model, make_batches("paligemma2"), progress=False)
    probe.remove()
    assert seen == [(False, None, False)] * 2
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert model.model.language_model.config.use_cache is True
    assert not anchor.mean.is_inference()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_left_as_it_was_found_after_an_error(build_model, make_batches):
    model = build_model("llama").train()

    def batches():
        yield from make_batches("llama", sizes=(2,))
        raise RuntimeError("the data ran dry")

    with pytest.raises(RuntimeError, match="the data ran dry"):
        ActivationAnchor.collect(model, batches(), progress=False)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config.use_cache is True


def test_the_head_computes_no_more_than_one_position(build_model, make_batches):
    model, widths = build_model("paligemma2"), []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, output: widths.append(output.shape[1]))
    ActivationAnchor.collect(model, make_batches("paligemma2"), progress=False)
    hook.remove()
    assert widths == [1, 1]


def test_num_batches_stops_there_and_draws_no_more(build_model, make_batches):
    drawn = []

    def batches():
        for batch in make_batches("llama", sizes=(1, 2, 3)):
            drawn.append(batch)
            yield batch

    anchor = ActivationAnchor.collect(build_model("llama"), batches(), num_batches=2, progress=False)
    assert (len(drawn), anchor.fingerprint.num_batches, anchor.fingerprint.num_samples) == (2, 2, 3)


def test_fingerprint_says_what_was_collected(build_model, make_batches, tmp_path):
    build_model("gemma2").save_pretrained(tmp_path / "tiny-gemma")
    model = type(build_model("gemma2")).from_pretrained(tmp_path / "tiny-gemma", attn_implementation="eager")
    anchor = ActivationAnchor.collect(model, make_batches("gemma2"), dataset_id="org/questions", progress=False)
    fingerprint = anchor.fingerprint
    assert fingerprint.base_model == "tiny-gemma"  # not the folder it happened to lie in
    assert fingerprint.attention_implementation == "eager"
    assert fingerprint.dataset_id == "org/questions"
    assert fingerprint.mask_policy == "attention_mask"
    assert fingerprint.dtype == "float32"
    assert fingerprint.torch_version == torch.__version__


def test_a_lora_model_gives_the_anchor_of_its_base(build_model, make_batches):
    batches = make_batches("llama")
    base = ActivationAnchor.collect(build_model("llama"), batches, progress=False)
    # LoRA starts as the identity, so the moments agree as well.
    wrapped = get_peft_model(build_model("llama"), LoraConfig(target_modules="all-linear"))
    adapted = ActivationAnchor.collect(wrapped, batches, progress=False)
    assert adapted.fingerprint == base.fingerprint
    torch.testing.assert_close(adapted.mean, base.mean)
    base.check_compatible(wrapped)


def test_bad_batches_are_refused(build_model, make_batches):
    model = build_model("llama")
    good, bad = make_batches("llama")

    def collect(batches, **options):
        return ActivationAnchor.collect(model, batches, progress=False, **options)

    with pytest.raises(ValueError, match="no batches to collect"):
        collect([])
    with pytest.raises(ValueError, match="num_batches=3, but the iterable ended after 2"):
        collect([good, bad], num_batches=3)
    with pytest.raises(ValueError, match="num_batches must be at least 1, found 0"):
        collect([good], num_batches=0)
    with pytest.raises(ValueError, match=r"batch 1 is a Tensor, expected a mapping"):
        collect([good, bad["input_ids"]])
    with pytest.raises(ValueError, match="batch 1: the attention mask leaves no token"):
        collect([good, {**bad, "attention_mask": torch.zeros_like(bad["attention_mask"])}])
    with pytest.raises(ValueError, match="moments must be one of"):
        collect([good], moments="exact")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_mask_of_another_length_is_refused(build_model, make_batches):
    model = build_model("llama")
    (batch,) = make_batches("llama", sizes=(2,))
    # A module that drops a token between the mask's owner and the layers.
    model.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output[:, 1:], prepend=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 9\), but decoder layer 0 works on \(2, 8\)"):
        ActivationAnchor.collect(model, [batch], progress=False)


def test_statistics_that_are_not_finite_name_layer_and_batch(build_model, make_batches):
    model = build_model("llama")
    calls = []

    def spoil(_module, _inputs, output):
        calls.append(None)
        return output * float("nan") if len(calls) == 2 else output

    model.model.layers[1].register_forward_hook(spoil)
    with pytest.raises(ValueError, match="batch 1: decoder layer 1 has a mean that is not finite"):
        ActivationAnchor.collect(model, make_batches("llama"), progress=False)


def test_layers_that_do_not_run_are_named(build_model, make_batches):
    model = build_model("llama")
    with pytest.raises(ValueError, match=r"decoder layers \[0, 1, 2\] did not run"):
        ActivationAnchor.collect(
            model, make_batches("llama"), layers=build_model("llama").model.layers, progress=False
        )
