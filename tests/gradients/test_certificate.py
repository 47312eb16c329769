"""What the certificate reports, against figures worked out from the weights and from a second model."""

import copy
import json
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model

from hf_aegis.anchors import ActivationAnchor, InputSubspace, SubspaceOptions, find_decoder_layers
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.gradients import Certificate, HeldSubspace
from hf_aegis.gradients.certificate import last_of
from hf_aegis.gradients.linear_probes import RowSample
from hf_aegis.gradients.linear_sites import find_linear_sites


def inputs_of(model, batch):
    """The inputs of each linear of the decoder layers at the tokens that count, `(N, in)`."""
    found = {}

    def keep(name):
        def hook(_, args):
            found[name] = args[0][batch["attention_mask"].bool()].detach()

        return hook

    sites = [site for site in find_linear_sites(model) if site.in_decoder_layers]
    hooks = [site.module.register_forward_pre_hook(keep(site.name)) for site in sites]
    model.eval()
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def subspaces_of_inputs(model, batch, rank):
    """The leading directions of each linear's inputs, one subspace for each linear."""
    groups = {}
    for name, inputs in inputs_of(model, batch).items():
        _, singular, basis = torch.linalg.svd(inputs.double(), full_matrices=False)
        energies = singular.square() / len(inputs)
        groups[name] = InputSubspace((name,), basis[:rank].T, energies[:rank], float(energies.sum()))
    return groups


@pytest.fixture
def case(make_case, make_batch):
    case = make_case("llama", torch.float32)
    case.batch = make_batch("llama", torch.float32, seed=11, size=2, length=6)
    return case


def test_an_untouched_model(case):
    groups = subspaces_of_inputs(case.model, case.batch, rank=4)
    case.model.train()
    report = Certificate(case.model, [case.batch], groups).measure()
    assert case.model.training
    assert set(report.layers) == {"layers.0", "layers.1", "layers.2"} and set(report.layers.values()) == {0.0}
    assert report.logits == 0.0 and report.divergence == pytest.approx(0.0, abs=1e-12)
    assert report.tokens == 11
    assert set(report.linears) == set(groups)
    for name, found in report.linears.items():
        assert (found.output, found.inside, found.outside, found.inputs) == (0.0, 0.0, 0.0, 11)
        assert found.outside_energy == pytest.approx(1 - groups[name].energy_share, abs=1e-5)
    assert json.loads(json.dumps(report.to_dict()))["linears"]["layers.0.mlp.up_proj"]["inputs"] == 11


def test_mixed_precision_is_no_change(case):
    certificate = Certificate(case.model, [case.batch], subspaces_of_inputs(case.model, case.batch, rank=4))
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(case.model)
    AcceleratorState._reset_state(reset_partial_state=True)
    with torch.no_grad():
        assert not torch.equal(case.model(**case.batch).logits, case.model._original_forward(**case.batch).logits)
    report = certificate.measure()
    assert report.logits == 0.0 and set(report.layers.values()) == {0.0}


def finetune(case, after=lambda: None):
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    other = {key: value.clone() for key, value in case.batch.items()}
    words = other["input_ids"] < 60  # the rest are images
    other["input_ids"][words] = (other["input_ids"][words] * 7) % 60
    for _ in range(20):
        (case.model(**other).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def test_what_is_held_entirely_stays_through_the_whole_model(case):
    """
    Subspaces that hold all of a batch's inputs hold its function, for any number of steps and through all layers;
    without them the same training changes it.
    """
    groups = subspaces_of_inputs(case.model, case.batch, rank=11)
    case.model.lm_head.requires_grad_(False)
    free = copy.deepcopy(case)
    certificate = Certificate(case.model, [case.batch], groups)
    finetune(case, HeldSubspace(case.model, groups))
    report = certificate.measure()
    assert max(report.layers.values()) < 1e-4 and report.logits < 1e-4 and report.divergence < 1e-6
    assert max(found.output for found in report.linears.values()) < 1e-4
    before = Certificate(free.model, [free.batch], groups)
    finetune(free)
    report = before.measure()
    assert min(report.layers.values()) > 0.1 and report.logits > 0.1 and report.divergence > 0.01
    assert min(found.inside for found in report.linears.values()) > 0.01


def test_figures_from_the_weights(case):
    """Changes of known size: inside and outside of the subspace, in the layers, the logits and the divergence."""
    groups = subspaces_of_inputs(case.model, case.batch, rank=4)
    name = "layers.2.self_attn.o_proj"
    inputs = inputs_of(case.model, case.batch)[name].double()
    module = case.model.model.get_submodule(name)
    start = module.weight.detach().clone()
    held = HeldSubspace(case.model, groups, max_rank=3)
    certificate = Certificate(case.model, [case.batch], groups, held=held, last_tokens=2)
    with torch.no_grad():
        before = case.model.eval()(**case.batch, output_hidden_states=True)
        module.weight += 0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
        after = case.model.eval()(**case.batch, output_hidden_states=True)
    report = certificate.measure()

    change, outputs = (module.weight.detach() - start).double(), inputs @ start.double().T
    basis = groups[name].basis[:, :3]
    inside = inputs @ basis @ basis.T
    found = report.linears[name]
    assert found.output == pytest.approx(float((inputs @ change.T).norm() / outputs.norm()), rel=1e-4)
    assert found.inside == pytest.approx(float((inside @ change.T).norm() / outputs.norm()), rel=1e-4)
    assert found.outside == pytest.approx(float(((inputs - inside) @ change.T).norm() / outputs.norm()), rel=1e-4)
    assert found.outside_energy == pytest.approx(float((inputs - inside).norm() / inputs.norm()) ** 2, rel=1e-4)

    mask = case.batch["attention_mask"].bool()
    there, then = after.hidden_states[2][mask], before.hidden_states[2][mask]
    assert report.layers["layers.1"] == pytest.approx(float((there - then).norm() / then.norm()), abs=1e-9) == 0.0
    assert report.layers["layers.2"] > 0.001
    # The second sample has one token of padding behind.
    rows = [(0, 4), (0, 5), (1, 3), (1, 4)]
    then, there = (torch.stack([o.logits[row] for row in rows]).double() for o in (before, after))
    assert report.logits == pytest.approx(float((there - then).norm() / then.norm()), rel=1e-5)
    expected = torch.nn.functional.kl_div(
        there.log_softmax(-1), then.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert report.divergence == pytest.approx(float(expected), rel=1e-5)


def test_pairs_from_the_weights(case):
    """Of a change of known size, what the held pairs are and what all others."""
    groups = subspaces_of_inputs(case.model, case.batch, rank=4)
    name = "layers.2.mlp.down_proj"
    module = case.model.model.get_submodule(name)
    inputs = inputs_of(case.model, case.batch)[name].double()
    anchor = object.__new__(ActivationAnchor)
    anchor.subspaces, anchor.sensitivities = groups, {}
    generator = torch.Generator().manual_seed(0)
    for linear in groups:
        size = case.model.model.get_submodule(linear).out_features
        outputs, _ = torch.linalg.qr(torch.randn(size, 3, generator=generator, dtype=torch.float64))
        anchor.sensitivities[linear] = PairSensitivity(linear, outputs, torch.rand(3, 4, generator=generator))
    held = HeldSubspace(case.model, anchor, sensitivity=0.5)
    certificate = Certificate(case.model, [case.batch], anchor, held=held)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 0.1 * torch.randn(module.weight.shape, generator=generator)
    change, whole = (module.weight.detach() - start).double(), (inputs @ start.double().T).norm()
    outputs, basis = anchor.sensitivities[name].output_basis, groups[name].basis
    mask = held.pairs[name].mask
    assert 0 < mask.sum() < mask.numel()
    inside = sum(
        (outputs[:, i] @ change @ basis[:, j]) * torch.outer(outputs[:, i], basis[:, j])
        for i, j in mask.nonzero().tolist()
    )
    found = certificate.measure().linears[name]
    assert found.inside == pytest.approx(float((inputs @ inside.T).norm() / whole), rel=1e-4)
    assert found.outside == pytest.approx(float((inputs @ (change - inside).T).norm() / whole), rel=1e-4)
    held()
    found = certificate.measure().linears[name]
    assert found.inside < 1e-6 < 1e-3 < found.outside


def test_a_bias_counts_as_outside(make_case, make_batch):
    case = make_case("paligemma2", torch.float32)
    name = "model.multi_modal_projector.linear"
    group = InputSubspace((name,), torch.eye(16)[:, :3], torch.ones(3), 16.0)
    certificate = Certificate(case.model, [make_batch("paligemma2", torch.float32)], [group])
    with torch.no_grad():
        case.model.get_submodule(name).bias += 1.0
    found = certificate.measure().linears[name]
    assert found.inside < 1e-5 and found.outside == pytest.approx(found.output) and found.output > 0.1


def test_the_head_runs_where_logits_are_compared(case):
    groups = subspaces_of_inputs(case.model, case.batch, rank=2)
    seen = []
    hook = case.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    Certificate(case.model, [case.batch], groups, last_tokens=1)
    # With a token of padding behind the second sample, the last positions are 5 and 4.
    Certificate(case.model, [{"input_ids": case.batch["input_ids"]}], groups, last_tokens=3)
    hook.remove()
    assert seen == [2, 3]


def test_adapters_count(case):
    groups = subspaces_of_inputs(case.model, case.batch, rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_dropout=0.5)
        model = get_peft_model(case.model, config)
    certificate = Certificate(model, [case.batch], groups)
    layer = find_decoder_layers(model)[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    found = certificate.measure().linears
    assert found["layers.0.self_attn.q_proj"].output > 0.01
    assert found["layers.0.self_attn.o_proj"].output == 0.0


def test_images_before_the_projector_all_count(make_case, make_batch):
    case = make_case("paligemma2", torch.float32)
    batch = make_batch("paligemma2", torch.float32)
    name = "model.multi_modal_projector.linear"
    group = InputSubspace((name,), torch.eye(16)[:, :3], torch.ones(3), 16.0)
    report = Certificate(case.model, [batch], [group], tokens_per_linear=1000).measure()
    assert report.linears[name].inputs == 6 * 4


@pytest.mark.parametrize("kind", ["gemma2", "paligemma2"])
def test_an_anchor_has_the_subspaces(make_case, make_batch, kind):
    """What an anchor calls linears is found in the model it is of, and holding by it holds the anchored batch."""
    case = make_case(kind, torch.float32)
    case.batch = make_batch(kind, torch.float32, seed=11, size=1, length=6)
    case.model.lm_head.requires_grad_(False)
    options = SubspaceOptions(energy=1.0, modules=("multi_modal_projector",) if kind == "paligemma2" else ())
    anchor = ActivationAnchor.collect(case.model, [case.batch], subspaces=options, progress=False)
    certificate = Certificate(case.model, [case.batch], anchor)
    finetune(case, HeldSubspace(case.model, anchor))
    report = certificate.measure()
    assert len(report.linears) == 3 * 7 + (kind == "paligemma2")
    assert max(report.layers.values()) < 0.01 and report.divergence < 1e-3
    with pytest.raises(ValueError, match="this anchor was collected without subspaces"):
        HeldSubspace(case.model, case.anchor)


def test_samples_are_uniform():
    counts = torch.zeros(10)
    for seed in range(400):
        sample = RowSample(4, seed)
        for rows in torch.arange(10).split([3, 5, 2]):
            sample.add(rows[:, None])
        taken = sample.rows()[:, 0]
        assert len(set(taken.tolist())) == 4
        counts[taken] += 1
    # 160 each are expected, with a standard deviation of 9.8.
    assert counts.sum() == 1600 and (counts - 160).abs().max() < 40
    assert RowSample(4, 0).rows() is None


def test_last_tokens_by_hand():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
    expected = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(last_of(mask, torch.zeros(3, 4, 9), 2), expected)
    assert last_of(None, torch.zeros(3, 4, 9), 1).tolist() == [[False, False, False, True]] * 3


def test_refusals(case):
    groups = subspaces_of_inputs(case.model, case.batch, rank=2)
    other = HeldSubspace(copy.deepcopy(case.model), [groups["layers.1.mlp.up_proj"]], freeze=False)
    for options, batches, message in (
        ({"tokens_per_linear": 0}, [case.batch], "tokens_per_linear must be at least 1"),
        ({"last_tokens": 0}, [case.batch], "last_tokens must be at least 1"),
        ({"held": other}, [case.batch], "held: of another anchor, without the linear 'layers.0"),
        ({}, [], "no batches to certify on"),
        (
            {},
            [{**case.batch, "attention_mask": torch.zeros(2, 6)}],
            "batch 0: the attention mask leaves no token to compare",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Certificate(case.model, batches, groups, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
