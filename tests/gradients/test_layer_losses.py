"""Losses on layer outputs against hand-computed ones over plain hooks."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.gradients import DistillationLoss, TransportLoss
from hf_aegis.gradients.layer_losses import masked_mean_square


# PEFT asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
KINDS = pytest.mark.parametrize("kind", ["llama", "gemma2", "paligemma2"])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])


def layer_outputs(model, batch):
    """By hooks of the test's own."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: found.append(out if torch.is_tensor(out) else out[0]))
        for layer in find_decoder_layers(model)
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def move(model, by=0.05):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter)


def distance(hidden, targets, mask):
    """Token by token and layer by layer."""
    terms = []
    for states, target in zip(hidden, targets, strict=True):
        rows = [(states[b, t] - target[b, t]) ** 2 for b, t in mask.nonzero().tolist()]
        terms.append(torch.stack(rows).mean())
    return torch.stack(terms).mean()


def compare_gradients(case, expected, found):
    parameters = list(case.parameters().values())
    one = torch.autograd.grad(expected, parameters, allow_unused=True)
    case.model.zero_grad()
    found.backward()
    assert any(g is not None and g.any() for g in one)
    for gradient, parameter in zip(one, parameters, strict=True):
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10)


@KINDS
@CHECKPOINTING
def test_transport_loss_equals_the_definition(kind, checkpointing, make_case):
    case = make_case(kind)
    terms = [case.written_out(index, states) for index, states in enumerate(layer_outputs(case.model, case.batch))]
    expected = sum(mean_term + std_term for mean_term, std_term in terms)
    loss = TransportLoss(case.model, case.anchor)
    if checkpointing is not None:
        case.model.activation_checkpointing_enable(checkpointing)
    with loss.recording():
        case.model(**case.batch)
    found = loss.value()
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-6, atol=0)
    compare_gradients(case, expected, found)


@KINDS
@CHECKPOINTING
def test_distillation_loss_equals_the_definition(kind, checkpointing, make_case):
    case = make_case(kind)
    loss = DistillationLoss(case.model)
    with torch.no_grad():
        targets = layer_outputs(case.model, case.batch)
    weights = copy.deepcopy(loss.teacher.state_dict())
    move(case.model)
    expected = distance(layer_outputs(case.model, case.batch), targets, case.batch["attention_mask"])
    if checkpointing is not None:
        case.model.activation_checkpointing_enable(checkpointing)
    state = torch.get_rng_state()
    with loss.recording():
        case.model(**case.batch)
    found = loss.value()
    assert torch.equal(torch.get_rng_state(), state)
    assert found.item() > 1e-4
    torch.testing.assert_close(found, expected)
    compare_gradients(case, expected, found)
    torch.optim.SGD(case.model.parameters(), lr=0.1).step()
    assert all(torch.equal(value, weights[name]) for name, value in loss.teacher.state_dict().items())


@KINDS
def test_distillation_starts_at_zero_in_training_mode(kind, make_case):
    case = make_case(kind, torch.float32)
    loss = DistillationLoss(case.model)
    for enabled in (False, True):
        with loss.recording(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            case.model(**case.batch)
        # Outside of the autocast, as a trainer would call it.
        value = loss.value()
        assert value.item() == 0.0
        value.backward()
    assert all(not p.grad.any() for p in case.model.parameters() if p.grad is not None)


def test_the_teacher_is_no_part_of_the_model(make_case):
    case = make_case("paligemma2")
    keys, modules = set(case.model.state_dict()), len(list(case.model.modules()))
    loss = DistillationLoss(case.model)
    assert set(case.model.state_dict()) == keys
    assert len(list(case.model.modules())) == modules
    assert type(loss.teacher) is type(case.model.model)
    assert not any(p.requires_grad for p in loss.teacher.parameters())
    assert not any(module.training for module in loss.teacher.modules())
    assert case.model.training
    shared = {p.data_ptr() for p in loss.teacher.parameters()} & {p.data_ptr() for p in case.model.parameters()}
    assert not shared


@pytest.mark.parametrize("make_loss", [lambda case: DistillationLoss(case.model),
                                       lambda case: TransportLoss(case.model, case.anchor)])  # fmt: skip
def test_padding_is_ignored(make_loss, make_case):
    case = make_case("llama")
    loss = make_loss(case)
    move(case.model)
    values = []
    for pad in (0, 17):
        ids = case.batch["input_ids"].masked_fill(case.batch["attention_mask"] == 0, pad)
        with loss.recording():
            case.model(**{**case.batch, "input_ids": ids})
        values.append(loss.value().item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    with loss.recording():
        case.model(**{**case.batch, "attention_mask": torch.ones_like(case.batch["attention_mask"])})
    assert loss.value().item() != pytest.approx(values[0], rel=1e-6)


def test_lora(make_case):
    """The teacher keeps the adapters' start, which is that of the plain model."""
    case = make_case("gemma2")
    with torch.no_grad():
        targets = layer_outputs(case.model, case.batch)
    case.model = get_peft_model(case.model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).double().train()
    loss = DistillationLoss(case.model)
    move(case.model, by=0.5)
    expected = distance(layer_outputs(case.model, case.batch), targets, case.batch["attention_mask"])
    with loss.recording():
        case.model(**case.batch)
    found = loss.value()
    assert found.item() > 1e-4
    compare_gradients(case, expected, found)


def test_pi0_is_distilled_through_its_own_base_model(make_case):
    case = make_case("pi0")
    with torch.no_grad():
        targets = layer_outputs(case.model, case.batch)
    loss = DistillationLoss(case.model)
    move(case.model)
    expected = distance(layer_outputs(case.model, case.batch), targets, case.batch["attention_mask"])
    with loss.recording():
        case.model(**case.batch)
    torch.testing.assert_close(loss.value(), expected)


def test_one_recording_one_value(make_case):
    case = make_case("llama", torch.float32)
    for loss in (DistillationLoss(case.model), TransportLoss(case.model, case.anchor)):
        with pytest.raises(RuntimeError, match=r"no output of decoder layers \[0, 1, 2\] was recorded"):
            loss.value()
        with loss.recording():
            with torch.no_grad():
                case.model(**case.batch)
            case.model(**case.batch)
        case.model(**case.batch)
        loss.value()
        with pytest.raises(RuntimeError, match="for each call of"):
            loss.value()
        with pytest.raises(ValueError, match="layer 0 ran twice"), loss.recording():
            (case.model(**case.batch), case.model(**case.batch))
        assert not case.model._forward_hooks and not case.model.model._forward_pre_hooks
        assert not any(layer._forward_hooks for layer in case.model.model.layers)


def test_refusals(make_case):
    case, other = make_case("llama", torch.float32), make_case("llama", torch.float32)
    with pytest.raises(ValueError, match="not in the base model of LlamaForCausalLM, a LlamaModel"):
        DistillationLoss(case.model, other.model.model.layers)
    loss = DistillationLoss(case.model)
    cache = case.model(**case.batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="called with past_key_values"), loss.recording():
        case.model(**case.batch, past_key_values=cache)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and their target \(1, 2, 4\) differ"):
        masked_mean_square(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), None)


def test_hand_computed_mean_square():
    hidden = torch.tensor([[[1.0, 2.0], [float("nan"), 9.0]]])
    assert masked_mean_square(hidden, torch.zeros(1, 2, 2), torch.tensor([[1, 0]])).item() == 2.5
    assert masked_mean_square(hidden, torch.zeros(1, 2, 2), torch.tensor([[0, 0]])).item() == 0.0
    assert masked_mean_square(hidden[:, :1], torch.zeros(1, 1, 2), None).item() == 2.5
