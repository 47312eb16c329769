"""Decoders that are not a plain chain of hidden outputs: refused, or right where they can be."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_aegis.anchors import ActivationAnchor, AnchorMismatchError
from hf_aegis.gradients import GradientShield, LayerLeakError, LostGradientError


WIDTH = 4


class Layer(nn.Module):
    def __init__(self, as_tuple=False):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.as_tuple = as_tuple

    def forward(self, hidden):
        out = hidden + torch.tanh(self.linear(hidden))
        return (out, None) if self.as_tuple else out


class Decoder(nn.Module):
    """Three layers whose wiring a test replaces."""

    def __init__(self, wiring=None, layer=Layer):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.wiring = wiring or self.chain
        self.double()

    @staticmethod
    def chain(model, hidden):
        for layer in model.layers:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden

    def forward(self, input_ids, attention_mask=None):
        return self.wiring(self, self.embed(input_ids))


class FakeAnchor:
    fingerprint = SimpleNamespace(tokens="all")

    def __init__(self, layers=3):
        generator = torch.Generator().manual_seed(2)
        self.mean = torch.randn(layers, WIDTH, generator=generator)
        self.variance = torch.rand(layers, WIDTH, generator=generator)

    def check_compatible(self, *_, **__):
        pass


IDS = torch.arange(12).view(2, 6) % 9
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def task(model):
    return (model(IDS, attention_mask=MASK) * FakeAnchor().mean[-1].double()).sum()


def expected_gradients(model):
    """Explicit oracle for a decoder whose layers are groups 0 to 2 and whose other parameters are a group."""
    outputs = []

    def note(module, args, out):
        outputs.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(note) for layer in model.layers]
    loss = task(model)
    for hook in hooks:
        hook.remove()
    anchor = FakeAnchor()
    penalty = 0.0
    for mean, variance, out in zip(anchor.mean.double(), anchor.variance.double(), outputs, strict=True):
        tokens = out[MASK.bool()]
        spread = (tokens.var(dim=0, unbiased=False) + 1e-6).sqrt() - (variance + 1e-6).sqrt()
        penalty = penalty + (tokens.mean(dim=0) - mean).square().mean() + spread.square().mean()
    parameters = dict(model.named_parameters())
    g, r = (
        dict(zip(parameters, torch.autograd.grad(value, list(parameters.values()), retain_graph=True), strict=True))
        for value in (loss, penalty)
    )
    result = {}
    groups = {name: name.split(".")[1] if name.startswith("layers") else "rest" for name in parameters}
    conflicts = 0
    for group in set(groups.values()):
        names = [name for name in parameters if groups[name] == group]
        dot = sum((g[n] * r[n]).sum() for n in names)
        alpha = dot / (sum(r[n].square().sum() for n in names) + 1e-12) if dot < 0 else 0.0
        conflicts += bool(dot < 0)
        for n in names:
            result[n] = g[n] - alpha * r[n]
    assert conflicts
    return result


def shielded_gradients(model, form):
    model.zero_grad()
    with GradientShield(model, FakeAnchor(), dual_backward=form):
        task(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


FORMS = pytest.mark.parametrize("form", ["streaming", "two_pass"])


@FORMS
@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_plain_chain_with_and_without_tuples(form, as_tuple, assert_same):
    model = Decoder(layer=lambda: Layer(as_tuple))
    assert_same(shielded_gradients(model, form), expected_gradients(model), 1e-8)


def skip_connection(model, hidden):
    first = model.layers[0](hidden)
    second = model.layers[1](first)
    return model.layers[2](second + 0.5 * first)


def test_a_layer_that_reads_further_below(assert_same):
    model = Decoder(skip_connection)
    with pytest.raises(LayerLeakError, match=r"layer 2 reads the output of layers \[0\] directly.*two_pass"):
        shielded_gradients(model, "streaming")
    assert_same(shielded_gradients(model, "two_pass"), expected_gradients(model), 1e-8)


def embeddings_in_every_layer(model, hidden):
    out = hidden
    for layer in model.layers:
        out = layer(out + 0.1 * hidden)
    return out


def test_a_layer_that_reads_the_embeddings(assert_same):
    model = Decoder(embeddings_in_every_layer)
    with pytest.raises(LayerLeakError, match=r"layer 1 depends on embed.weight .*layer 0 .*two_pass"):
        shielded_gradients(model, "streaming")
    assert_same(shielded_gradients(model, "two_pass"), expected_gradients(model), 1e-8)


def test_parameters_shared_between_layers(assert_same):
    model = Decoder()
    model.layers[2].linear = model.layers[1].linear
    with pytest.raises(LayerLeakError, match=r"layer 2 depends on layers.1.linear"):
        shielded_gradients(model, "streaming")
    assert_same(shielded_gradients(model, "two_pass"), expected_gradients(model), 1e-8)


def changed_in_place(model, hidden):
    hidden = model.layers[0](hidden)
    hidden = model.layers[1](hidden)
    hidden.mul_(1.5)
    return model.layers[2](hidden)


@FORMS
def test_an_output_changed_in_place(form):
    with pytest.raises(LayerLeakError, match="output of decoder layer 1 was changed in place"):
        shielded_gradients(Decoder(changed_in_place), form)


def changed_by_a_new_tensor(model, hidden):
    """Adding visual features to an output, say, without touching the output itself."""
    hidden = model.layers[0](hidden)
    hidden = model.layers[1](hidden) * 1.5 + 0.2
    return model.layers[2](hidden)


@FORMS
def test_an_output_changed_by_a_new_tensor(form, assert_same):
    model = Decoder(changed_by_a_new_tensor)
    assert_same(shielded_gradients(model, form), expected_gradients(model), 1e-8)


@FORMS
@pytest.mark.parametrize("twice", [0, 1])
def test_a_layer_called_twice(form, twice):
    def wiring(model, hidden):
        for index, layer in enumerate(model.layers):
            hidden = layer(hidden)
            if index == twice:
                hidden = layer(hidden)
        return hidden

    with pytest.raises(LayerLeakError, match="twice in one forward pass"):
        shielded_gradients(Decoder(wiring), form)


def test_a_layer_listed_twice():
    model = Decoder()
    model.layers[1] = model.layers[0]
    with pytest.raises(ValueError, match="more than once"):
        GradientShield(model, FakeAnchor())


@FORMS
def test_a_skipped_layer(form, assert_same):
    """Layer drop: the layer does not run, and has neither penalty nor gradient."""

    def wiring(model, hidden):
        return model.layers[2](model.layers[0](hidden))

    model = Decoder(wiring)
    found = shielded_gradients(model, form)
    assert found["layers.1.linear.weight"] is None
    assert found["layers.0.linear.weight"] is not None


@FORMS
def test_a_layer_that_does_nothing(form, assert_same):
    """Returns its input itself, so that two layers have one output."""
    model = Decoder()
    model.layers[1].forward = lambda hidden: hidden
    for parameter in model.layers[1].parameters():
        parameter.requires_grad_(False)
    reference = Decoder()
    reference.layers[1].forward = lambda hidden: hidden * 1.0
    for parameter in reference.layers[1].parameters():
        parameter.requires_grad_(False)
    assert_same(shielded_gradients(model, form), shielded_gradients(reference, form), 1e-12)


@FORMS
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_the_model_checkpoints_itself(form, reentrant, assert_same):
    def wiring(model, hidden):
        for layer in model.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
        return hidden

    model = Decoder(wiring)
    if reentrant:
        with pytest.raises(LayerLeakError, match="recomputed within the backward pass"):
            shielded_gradients(model, form)
        return
    assert_same(shielded_gradients(model, form), expected_gradients(Decoder()), 1e-8)


@FORMS
def test_a_loss_that_does_not_reach_the_layers(form):
    model = Decoder()
    head = nn.Linear(WIDTH, 1).double()
    model.head = head
    shield = GradientShield(model, FakeAnchor(), dual_backward=form)

    def losses():
        hidden = model(IDS, attention_mask=MASK)
        return head(hidden.detach()).sum(), hidden.sum()

    with pytest.raises(LostGradientError, match="gradient reached no decoder layer"), shield:
        losses()[0].backward()
    # As long as one backward pass reaches them, the others need not.
    with shield:
        for loss in losses():
            loss.backward()
    with shield:
        for loss in reversed(losses()):
            loss.backward()

    # An exception on the way is not covered up.
    def fail():
        with shield:
            losses()[0].backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@FORMS
def test_a_mask_without_tokens_changes_nothing(form, assert_same):
    model = Decoder()
    model(IDS).sum().backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with GradientShield(model, FakeAnchor(), dual_backward=form) as shield:
        model(IDS, attention_mask=torch.zeros_like(MASK)).sum().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, plain, 0.0)
    assert shield.report.reference_squared_norm.tolist() == [0.0] * 4
    assert shield.report.summary()["throttle_rate"] == 0.0


@FORMS
def test_masks(form):
    model = Decoder()
    shield = GradientShield(model, FakeAnchor(), dual_backward=form)

    def penalty(*args, **kwargs):
        with shield:
            model(*args, **kwargs).sum().backward()
        return shield.report.summary()["penalty"]

    by_keyword = penalty(IDS, attention_mask=MASK)
    assert penalty(IDS, MASK) == by_keyword
    assert penalty(IDS, attention_mask=MASK.bool()) == by_keyword
    assert penalty(IDS) == penalty(IDS, attention_mask=torch.ones_like(MASK)) != by_keyword
    with pytest.raises(ValueError, match=r"attention_mask .* found shape \(2, 1, 6, 6\)"):
        penalty(IDS, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match=r"attention_mask .* found dict"):
        penalty(IDS, {"full_attention": MASK})
    with pytest.raises(ValueError, match=r"attention mask has shape \(2, 5\).*\(2, 6, 4\) need \(2, 6\)"):
        penalty(IDS, MASK[:, :5])
    # None of these errors may leave a mask behind.
    assert penalty(IDS, MASK) == by_keyword


def test_layers_called_outside_of_the_model():
    model = Decoder()
    shield = GradientShield(model, FakeAnchor())
    with pytest.raises(RuntimeError, match=r"ran outside of a call of the Decoder"), shield:
        Decoder.chain(model, model.embed(IDS))
    with shield:
        model(IDS, MASK)
        with pytest.raises(RuntimeError, match=r"ran outside of a call of the Decoder"):
            Decoder.chain(model, model.embed(IDS))


def test_sparse_gradients_are_refused():
    model = Decoder()
    model.embed.sparse = True
    with pytest.raises(NotImplementedError, match=r"embed.weight has a sparse gradient"):
        shielded_gradients(model, "streaming")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_backward": "both"}, "dual_backward must be one of .*'both'"),
        ({"granularity": "head"}, "granularity must be one of .*'head'"),
        ({"penalty_scale": 0.0}, "penalty_scale must be positive"),
        ({"penalty_scale": float("nan")}, "penalty_scale must be positive"),
        ({"projection_eps": 0.0}, "eps must be positive"),
        ({"layers": nn.ModuleList([Layer()])}, "not modules of the Decoder"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        GradientShield(Decoder(), FakeAnchor(), **options).__enter__()


def test_an_anchor_of_another_shape_is_refused(make_case):
    case = make_case("llama")
    mean = torch.zeros(4, case.anchor.width)
    anchor = ActivationAnchor(mean, mean, dataclasses.replace(case.anchor.fingerprint, num_layers=4))
    with pytest.raises(AnchorMismatchError, match="4"):
        GradientShield(case.model, anchor)
