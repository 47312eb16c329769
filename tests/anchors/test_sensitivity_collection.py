import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions, find_decoder_layers, sensitivity_collection
from hf_aegis.anchors.linear_layers.names import find_linears
from hf_aegis.anchors.passes import Passes
from hf_aegis.anchors.prediction_gradients import PredictionGradients, noise_seed
from hf_aegis.anchors.sensitivity_collection import PairProducts


# PEFT still asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS = SubspaceOptions(energy=1.0, sensitivity=True, temperature=3.0, seed=5)
PROJECTOR = "model.multi_modal_projector.linear"


def collect(model, batches, options=OPTIONS, **arguments):
    return ActivationAnchor.collect(model, batches, subspaces=options, progress=False, **arguments)


def answered(batches):
    """Labels at the last three tokens, padded or not, and at the second one of the first sample."""
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :-3] = -100
        batch["labels"][0, 1] = 1
    return batches


def in_double(model, batches):
    return model.double(), [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]


def logits_of(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def predictions(batch):
    """Pairs (sample, token) whose next token is labelled, both of them attended; in order."""
    mask, labels = batch["attention_mask"], batch["labels"]
    samples, length = labels.shape
    return [
        (b, t)
        for b in range(samples)
        for t in range(length - 1)
        if labels[b, t + 1] != -100 and mask[b, t] and mask[b, t + 1]
    ]


def projection(logits, where, noise, temperature=3.0):
    """The random projection of one sample's predictions, as it is defined."""
    total = logits.new_zeros(())
    for (b, t), epsilon in zip(where, noise, strict=True):
        q = (logits[b, t] / temperature).softmax(-1).detach()
        total = total + (epsilon * q.sqrt() * (logits[b, t] - (q * logits[b, t]).sum())).sum()
    return total


def turned(anchor, name, gradient):
    """A weight's gradient in the basis of its output and input directions."""
    space = next(space for space in anchor.subspaces.values() if name in space.linears)
    return anchor.sensitivities[name].output_basis.double().mT @ gradient @ space.basis.double()


@pytest.mark.parametrize("kind", ["gemma2", "paligemma2"])
def test_they_are_the_squared_gradients_of_each_sample_in_the_turned_basis(build_model, make_batches, kind):
    model, batches = in_double(build_model(kind), answered(make_batches(kind)))
    modules = ("multi_modal_projector",) if kind == "paligemma2" else ()
    anchor = collect(model, batches, dataclasses.replace(OPTIONS, modules=modules))
    linears = find_linears(model, find_decoder_layers(model), modules)
    assert list(anchor.sensitivities) == list(linears)
    assert (PROJECTOR in linears) == (kind == "paligemma2")

    weights = [module.weight for module in linears.values()]
    outputs, hooks = {}, []
    for name, module in linears.items():
        hooks.append(module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out)))
    moments = dict.fromkeys(linears, 0.0)
    squares = dict.fromkeys(linears, 0.0)
    for name_of_pass in ("output_gradients", "sensitivities"):
        for number, batch in enumerate(batches):
            where, logits = predictions(batch), logits_of(model, batch)
            generator = torch.Generator().manual_seed(noise_seed(5, name_of_pass, number))
            noise = torch.randn(len(where), logits.shape[-1], generator=generator, dtype=torch.float64)
            if name_of_pass == "output_gradients":
                z = projection(logits, where, noise)
                for name, g in zip(linears, torch.autograd.grad(z, [outputs[n] for n in linears]), strict=True):
                    rows = g.flatten(0, 1) if name == PROJECTOR else g[batch["attention_mask"].bool()]
                    moments[name] = moments[name] + rows.mT @ rows
                continue
            for sample in range(len(logits)):
                own = [index for index, (b, _) in enumerate(where) if b == sample]
                z = projection(logits, [where[index] for index in own], noise[own])
                gradients = torch.autograd.grad(z, weights, retain_graph=True)
                for name, gradient in zip(linears, gradients, strict=True):
                    squares[name] = squares[name] + turned(anchor, name, gradient).square() / 5
    for hook in hooks:
        hook.remove()
    for name in linears:
        found = anchor.sensitivities[name]
        largest = float(squares[name].max())
        torch.testing.assert_close(found.sensitivities.double(), squares[name], rtol=1e-4, atol=1e-6 * largest)
        basis = found.output_basis.double()
        in_basis = basis.mT @ moments[name] @ basis
        energies, total = in_basis.diagonal(), float(moments[name].trace())
        assert float(energies.sum()) == pytest.approx(total, rel=1e-5)
        assert float((in_basis - torch.diag(energies)).norm()) < 1e-5 * total
        assert bool((energies.diff() < 1e-6 * total).all())


def test_their_expectation_is_the_gauss_newton_diagonal(build_model, make_batches, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 7}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, pad_token_id=0, attn_implementation="eager"))
    model = model.eval().double()
    batch = {"input_ids": torch.tensor([[2, 3, 4, 5], [6, 1, 3, 3]])}
    batch["labels"] = batch["input_ids"].masked_fill(torch.tensor([True, True, False, False]), -100)
    anchor = collect(model, [batch])
    layers = find_decoder_layers(model)
    names = ("layers.0.mlp.gate_proj", "layers.0.self_attn.k_proj", "layers.1.self_attn.v_proj")
    linears = {name: module for name, module in find_linears(model, layers).items() if name in names}

    # Each unit vector at each of a sample's two predictions, in both samples at once, has the covariance of the noise.
    products = PairProducts(anchor.subspaces, {name: anchor.sensitivities[name].output_basis for name in names})
    gradients = PredictionGradients(model, layers, linears, temperature=3.0, passes=Passes(progress=False))
    for prediction in range(2):
        for token in range(7):
            noise = torch.zeros(2, 2, 7, dtype=torch.float64)
            noise[:, prediction, token] = 1.0
            monkeypatch.setattr(gradients, "_noise", lambda _like, noise=noise: noise.flatten(0, 1))
            gradients.run([batch], products, "sensitivities")
    found = {name: products.sensitivity(name, 2).sensitivities for name in names}

    weights = [module.weight for module in linears.values()]
    logits = logits_of(model, batch)
    expected = dict.fromkeys(names, 0.0)
    for sample, token in ((0, 1), (0, 2), (1, 1), (1, 2)):
        row = logits[sample, token]
        q = (row / 3.0).softmax(-1).detach()
        curvature = torch.diag(q) - torch.outer(q, q)
        jacobians = [torch.autograd.grad(value, weights, retain_graph=True) for value in row]
        for index, name in enumerate(linears):
            jacobian = torch.stack([turned(anchor, name, gradients[index]) for gradients in jacobians])
            expected[name] += torch.einsum("cij,cd,dij->ij", jacobian, curvature, jacobian) / 2
    for name in names:
        largest = float(expected[name].max())
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-6 * largest)


def assert_same(first, second, rtol=1e-4):
    assert set(first) == set(second)
    for name, pairs in first.items():
        scale = float(pairs.sensitivities.max())
        torch.testing.assert_close(
            second[name].sensitivities, pairs.sensitivities, rtol=rtol, atol=1e-5 * scale, msg=lambda m, n=name: n + m
        )


@pytest.fixture(scope="module")
def plain(build_model, make_batches):
    return collect(build_model("gemma2").double(), answered(make_batches("gemma2"))).sensitivities


def test_neither_chunks_nor_a_head_that_sees_all_tokens_matter(build_model, make_batches, plain, monkeypatch):
    monkeypatch.setattr(sensitivity_collection, "_CHUNK_NUMBERS", 1)
    options = dataclasses.replace(OPTIONS, modules=("lm_head",))
    sensitivities = dict(
        collect(build_model("gemma2").double(), answered(make_batches("gemma2")), options).sensitivities
    )
    head = sensitivities.pop("lm_head")
    assert_same(plain, sensitivities)
    assert float(head.sensitivities.max()) > 0


def test_fewer_output_directions_are_the_leading_ones(build_model, make_batches, plain):
    options = dataclasses.replace(OPTIONS, max_output_rank=5)
    fewer = collect(build_model("gemma2").double(), answered(make_batches("gemma2")), options).sensitivities
    for name, pairs in fewer.items():
        assert pairs.output_rank == min(5, plain[name].output_rank)
        assert torch.equal(pairs.sensitivities, plain[name].sensitivities[:5])


def test_sketched_gradients_have_the_same_leading_directions(build_model, make_batches, plain):
    options = dataclasses.replace(OPTIONS, exact_width=0, max_output_rank=15, oversampling=8)
    sketched = collect(build_model("gemma2").double(), answered(make_batches("gemma2")), options).sensitivities
    name = "layers.0.mlp.up_proj"  # 24 wide: more than the sketch's columns
    overlap = sketched[name].output_basis.mT @ plain[name].output_basis
    torch.testing.assert_close(overlap[:3, :3].abs(), torch.eye(3), atol=0.02, rtol=0)


def test_adapters_and_checkpointing_do_not_matter_and_the_model_is_left_as_it_was(build_model, make_batches, plain):
    base = build_model("gemma2").double()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).double()
    base.activation_checkpointing_enable()
    model.train()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    use_cache = base.config.use_cache
    sensitivities = collect(model, answered(make_batches("gemma2"))).sensitivities
    assert_same(plain, sensitivities)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert set(trained.values()) == {True, False}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert base.config.use_cache == use_cache
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("_proj"))


def test_only_whether_a_token_is_labelled_matters(build_model, make_batches, plain):
    batches = answered(make_batches("gemma2"))
    for batch in batches:
        batch["labels"][batch["labels"] != -100] = 3
    relabelled = collect(build_model("gemma2").double(), batches).sensitivities
    assert all(torch.equal(relabelled[name].sensitivities, pairs.sensitivities) for name, pairs in plain.items())


def test_without_labels_all_attended_tokens_predict(build_model, make_batches, monkeypatch):
    rows = []
    cotangent = sensitivity_collection.PredictionGradients._noise
    monkeypatch.setattr(
        PredictionGradients, "_noise", lambda self, like: (rows.append(len(like)), cotangent(self, like))[1]
    )
    batches = make_batches("gemma2")
    collect(build_model("gemma2"), batches)
    attended = [int(batch["attention_mask"].sum()) for batch in batches]
    assert rows == attended * 2
    rows.clear()
    for batch in batches:
        del batch["attention_mask"]
    collect(build_model("gemma2"), batches)
    assert rows == [27, 18] * 2


def test_one_kind_of_tokens(build_model, make_batches):
    batches = answered(make_batches("paligemma2"))
    for batch in batches:
        batch["labels"][0, 1] = -100  # an image token's prediction
    anchor = collect(build_model("paligemma2"), batches, tokens="image")
    last = {
        name: float(pairs.sensitivities.max()) for name, pairs in anchor.sensitivities.items() if "layers.2" in name
    }
    # The predictions read the last layer's image tokens as keys and values only.
    reaching = {name.rpartition(".")[2] for name, value in last.items() if value > 0}
    assert reaching >= {"k_proj", "v_proj"}
    assert not reaching & {"gate_proj", "up_proj", "down_proj"}


def test_what_cannot_be_collected_is_refused(build_model, make_batches):
    model, batches = build_model("gemma2"), answered(make_batches("gemma2"))
    with pytest.raises(ValueError, match="several passes over the batches, found a generator, which ends after one"):
        collect(model, (batch for batch in batches))
    with pytest.raises(ValueError, match=r"Gemma2Model gives no logits"):
        collect(model.model, batches)
    batches[1]["labels"][:] = -100
    with pytest.raises(ValueError, match="batch 1: the labels and the attention mask leave no prediction to count"):
        collect(model, batches)
    with pytest.raises(ValueError, match=r"batch 0: the logits have shape \(3, 4, 32\), expected one row for"):
        collect(build_model("pi0"), make_batches("pi0"))


def test_predictions_that_are_certain_are_refused(build_model, make_batches):
    options = dataclasses.replace(OPTIONS, temperature=1e-9)
    with pytest.raises(ValueError, match=r"of all 21 linear layers are zero: at temperature 1e-09 .* a higher one"):
        collect(build_model("gemma2"), answered(make_batches("gemma2")), options)


def test_layers_that_predictions_do_not_depend_on_are_named(build_model, make_batches):
    model = build_model("gemma2")
    mlp = model.model.layers[1].mlp
    mlp.spare = torch.nn.Linear(16, 4)
    mlp.register_forward_hook(lambda module, args, output: (module.spare(output) is None and None) or None)
    with pytest.raises(ValueError, match=r"do not depend on the linear layers \['layers\.1\.mlp\.spare'\]"):
        collect(model, answered(make_batches("gemma2")))
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("_proj"))
