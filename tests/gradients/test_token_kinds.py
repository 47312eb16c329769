"""Shield and transport loss over image or text tokens alone, against the oracle over explicitly chosen tokens."""

import pytest
import torch

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.gradients import GradientShield, TransportLoss
from hf_aegis.gradients.token_mask import TokenMask


IMAGE_TOKEN = 60
TOKENS = pytest.mark.parametrize("tokens", ["image", "text"])


@pytest.fixture
def make_kind(make_case):
    """A case whose anchor and whose oracle look at one kind of tokens."""

    def make(tokens):
        case = make_case("paligemma2", seed=2, push=4.0)
        collected = ActivationAnchor.collect(case.model.eval(), [case.batch], tokens=tokens, progress=False)
        case.model.train()
        generator = torch.Generator().manual_seed(3)
        case.anchor = ActivationAnchor(
            collected.mean + torch.randn(collected.mean.shape, generator=generator),
            collected.variance,
            collected.fingerprint,
        )
        is_image = case.batch["input_ids"] == IMAGE_TOKEN
        chosen = case.batch["attention_mask"].bool() & (is_image if tokens == "image" else ~is_image)

        def written_out(layer, hidden, eps=1e-6):
            rows = hidden[chosen]
            mean, variance = rows.mean(dim=0), rows.var(dim=0, unbiased=False)
            spread = (variance + eps).sqrt() - (case.anchor.variance[layer].double() + eps).sqrt()
            return (mean - case.anchor.mean[layer].double()).square().mean(), spread.square().mean()

        case.written_out = written_out
        return case

    return make


@TOKENS
def test_the_shield_takes_the_kind_from_the_anchor(tokens, make_kind, assert_same):
    case = make_kind(tokens)
    task, reference, terms = case.differentiate()
    expected, scalars = case.project(task, reference)
    assert any(s.dot < 0 for s in scalars.values())
    for form in ("streaming", "two_pass"):
        for checkpointing in (False, True):
            if checkpointing:
                case.model.activation_checkpointing_enable()
            case.model.zero_grad()
            shield = GradientShield(case.model, case.anchor, dual_backward=form)
            with shield:
                case.loss().backward()
            case.model.activation_checkpointing_disable()
            assert_same(case.gradients(), expected, 1e-8)
            assert shield.report.mean_term.tolist() == pytest.approx([term.item() for term, _ in terms], rel=1e-6)


@TOKENS
def test_the_transport_loss_takes_it_too(tokens, make_kind):
    case = make_kind(tokens)
    _, reference, terms = case.differentiate()
    loss = TransportLoss(case.model, case.anchor)
    case.model.zero_grad()
    with loss.recording():
        case.model(**case.batch)
    value = loss.value()
    assert value.item() == pytest.approx(sum(float(a.detach() + b.detach()) for a, b in terms), rel=1e-6)
    value.backward()
    for name, gradient in case.gradients().items():
        if gradient is not None:
            torch.testing.assert_close(gradient, reference[name], rtol=1e-7, atol=1e-10)


@TOKENS
def test_positional_arguments_and_calls_without_ids(tokens, make_kind):
    case = make_kind(tokens)
    shield = GradientShield(case.model, case.anchor)
    ids = case.batch["input_ids"]
    batch = {name: value for name, value in case.batch.items() if name != "input_ids"}
    case.model.zero_grad()
    with shield:
        case.model(ids, **batch).loss.backward()
    positional = shield.report.mean_term
    with shield:
        case.model(**case.batch).loss.backward()
    assert torch.equal(positional, shield.report.mean_term)
    embeds = case.model.get_input_embeddings()(ids).detach()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match=f"tokens='{tokens}' needs input_ids"), shield:
        case.model(inputs_embeds=embeds, **batch)


def test_a_model_without_image_tokens_is_refused(make_case):
    case = make_case("llama", torch.float32)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no image tokens"):
        TokenMask(case.model, "text")
    with pytest.raises(ValueError, match="tokens must be one of"):
        TokenMask(case.model, "words")
