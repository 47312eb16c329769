import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_aegis.anchors import ActivationAnchor, AnchorMismatchError, SubspaceOptions, find_decoder_layers
from hf_aegis.anchors.linear_layers.names import find_linears


# PEFT still asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXACT = SubspaceOptions(energy=1.0)
GROUPS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def collect(model, batches, options=EXACT, **arguments):
    return ActivationAnchor.collect(model, batches, subspaces=options, progress=False, **arguments)


def seen_inputs(model, batches, module):
    """Inputs of a module in float64, one array per batch: the oracle stores what the anchor may not."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double().numpy()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return seen


def rebuilt(subspace):
    basis = subspace.basis.double().numpy()
    return basis * subspace.energies.double().numpy() @ basis.T


@pytest.fixture(scope="module")
def anchor(build_model, make_batches):
    return collect(build_model("llama"), make_batches("llama"), SubspaceOptions(energy=0.95))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "paligemma2", "pi0"])
def test_second_moments_match_stored_inputs_and_shared_ones_are_found(build_model, make_batches, kind):
    model, batches = build_model(kind), make_batches(kind)
    anchor = collect(model, batches)
    expected = {
        f"layers.{layer}.{key}": tuple(f"layers.{layer}.{name}" for name in names)
        for layer in range(3)
        for key, names in GROUPS.items()
    }
    assert {key: subspace.linears for key, subspace in anchor.subspaces.items()} == expected
    masks = [batch["attention_mask"].bool().numpy() for batch in batches]
    layers = find_decoder_layers(model)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        stored = seen_inputs(model, batches, layers[1].get_submodule(name))
        x = np.concatenate([values[mask] for values, mask in zip(stored, masks, strict=True)])
        subspace = anchor.subspaces[f"layers.1.{name}"]
        np.testing.assert_allclose(rebuilt(subspace), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert subspace.num_inputs == len(x) == anchor.fingerprint.num_tokens
        assert subspace.total_energy == pytest.approx(float((x**2).sum() / len(x)), rel=1e-5)
        basis = subspace.basis.double()
        torch.testing.assert_close(basis.mT @ basis, torch.eye(subspace.rank, dtype=torch.float64), atol=1e-5, rtol=0)


def test_moments_do_not_depend_on_whether_subspaces_are_collected(build_model, make_batches):
    model, batches = build_model("llama"), make_batches("llama")
    plain = ActivationAnchor.collect(model, batches, progress=False)
    assert dict(plain.subspaces) == {}
    anchor = collect(model, batches)
    assert torch.equal(anchor.mean, plain.mean)
    assert torch.equal(anchor.variance, plain.variance)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert not any(space.basis.is_inference() or space.energies.is_inference() for space in anchor.subspaces.values())


def test_padding_does_not_change_the_subspaces(build_model, make_batches):
    model = build_model("llama")
    (batch,) = make_batches("llama", sizes=(3,))
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((3, 5), 7)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(3, 5, dtype=torch.int64)], dim=1),
    }
    plain, longer, unmasked = (
        collect(model, [b]).subspaces for b in (batch, padded, {"input_ids": batch["input_ids"]})
    )
    for key, subspace in plain.items():
        np.testing.assert_allclose(rebuilt(longer[key]), rebuilt(subspace), rtol=1e-3, atol=1e-5)
        assert longer[key].num_inputs == subspace.num_inputs
        assert unmasked[key].num_inputs == 27
    assert not np.allclose(rebuilt(unmasked["layers.0.mlp.gate_proj"]), rebuilt(plain["layers.0.mlp.gate_proj"]), 1e-2)


def test_one_kind_of_tokens(build_model, make_batches):
    model, batches = build_model("paligemma2"), make_batches("paligemma2")
    anchor = collect(model, batches, tokens="image")
    assert {subspace.num_inputs for subspace in anchor.subspaces.values()} == {5 * 4}


def test_modules_outside_count_all_their_inputs(build_model, make_batches):
    model, batches = build_model("paligemma2"), make_batches("paligemma2")
    anchor = collect(model, batches, dataclasses.replace(EXACT, modules=("multi_modal_projector", "lm_head")))
    outside = {key: subspace for key, subspace in anchor.subspaces.items() if not key.startswith("layers.")}
    assert set(outside) == {"model.multi_modal_projector.linear", "lm_head"}
    for name, module in model.named_modules():
        if name in outside:
            stored = seen_inputs(model, batches, module)
            if name == "lm_head":
                stored = [x[batch["attention_mask"].bool().numpy()] for x, batch in zip(stored, batches, strict=True)]
            x = np.concatenate([values.reshape(-1, values.shape[-1]) for values in stored])
            np.testing.assert_allclose(rebuilt(outside[name]), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            assert outside[name].num_inputs == len(x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("projector", "PaliGemmaForConditionalGeneration has no module outside .* ends with 'projector'"),
        ("q_proj.nothing", "has no module outside"),
        ("norm", "'norm' of PaliGemmaForConditionalGeneration holds no linear layers"),
    ],
)
def test_modules_that_are_not_there_are_named(build_model, name, message):
    model = build_model("paligemma2")
    with pytest.raises(ValueError, match=message):
        find_linears(model, find_decoder_layers(model), (name,))


def test_adapters_do_not_change_names_or_subspaces(build_model, make_batches):
    batches, options = make_batches("llama"), dataclasses.replace(EXACT, modules=("lm_head",))
    plain = collect(build_model("llama"), batches, options)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    adapted = collect(get_peft_model(build_model("llama"), config), batches, options)
    assert adapted.fingerprint.weights_sha256 == plain.fingerprint.weights_sha256
    assert {key: s.linears for key, s in adapted.subspaces.items()} == {
        key: s.linears for key, s in plain.subspaces.items()
    }
    for key, subspace in plain.subspaces.items():
        np.testing.assert_allclose(rebuilt(adapted.subspaces[key]), rebuilt(subspace), rtol=1e-4, atol=1e-6)


def test_inputs_must_be_shared_by_the_same_layers_in_each_batch(build_model, make_batches):
    model, batches = build_model("llama"), make_batches("llama")
    calls = []

    def copied(_module, args):
        calls.append(None)
        return (args[0].clone(),) if len(calls) == 2 else args

    hook = model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(copied)
    with pytest.raises(ValueError, match=r"batch 1: linear layer layers\.1\.self_attn\.v_proj shares its input with"):
        collect(model, batches)
    hook.remove()
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_layers_that_run_not_once_or_not_per_token_are_named(build_model, make_batches):
    model, batches = build_model("llama"), make_batches("llama")
    mlp = model.model.layers[2].mlp
    mlp.spare = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"batch 0: the linear layers \['layers\.2\.mlp\.spare'\] did not run"):
        collect(model, batches)
    flat = mlp.register_forward_hook(lambda module, args, output: module.spare(output.flatten(0, 1)).view_as(output))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.spare is given inputs of shape \(27, 16\)"):
        collect(model, batches)
    flat.remove()
    mlp.register_forward_hook(lambda module, args, output: module.spare(module.spare(output)))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.spare ran twice"):
        collect(model, batches)


def test_merging_equals_a_single_collection_where_nothing_was_truncated(build_model, make_batches):
    model, batches = build_model("llama"), make_batches("llama", sizes=(3, 1, 2))
    whole, *parts = (collect(model, part) for part in (batches, batches[:1], batches[1:]))
    merged = ActivationAnchor.merge(parts)
    assert merged.fingerprint == whole.fingerprint
    for key, subspace in whole.subspaces.items():
        np.testing.assert_allclose(rebuilt(merged.subspaces[key]), rebuilt(subspace), rtol=1e-4, atol=1e-6)
    assert ActivationAnchor.merge(parts[:1]) == parts[0]


def test_anchors_with_other_options_do_not_merge(anchor, build_model, make_batches):
    other = collect(build_model("llama"), make_batches("llama"), SubspaceOptions(energy=0.9))
    with pytest.raises(AnchorMismatchError, match=r"subspace_options: first SubspaceOptions\(energy=0\.95"):
        ActivationAnchor.merge([anchor, other])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(build_model, make_batches, tmp_path, dtype):
    anchor = collect(build_model("llama"), make_batches("llama"), SubspaceOptions(energy=0.95, dtype=dtype))
    loaded = ActivationAnchor.from_pretrained(anchor.save_pretrained(tmp_path))
    assert loaded == anchor
    assert list(loaded.subspaces) != []
    assert {str(s.basis.dtype) for s in loaded.subspaces.values()} == {f"torch.{dtype}"}
    assert loaded.fingerprint.subspace_options == SubspaceOptions(energy=0.95, dtype=dtype)
    config = json.loads((tmp_path / "anchor_config.json").read_text())
    assert config["format_version"] == 2
    assert config["subspaces"]["layers.0.mlp.gate_proj"]["linears"] == [
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.up_proj",
    ]


def test_an_anchor_without_subspaces_stays_one_that_older_packages_read(build_model, make_batches, tmp_path):
    anchor = ActivationAnchor.collect(build_model("llama"), make_batches("llama"), progress=False)
    anchor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "anchor_config.json").read_text())
    assert config["format_version"] == 1
    assert not {"subspaces", "subspace_options"} & set(config)
    assert set(load_file(tmp_path / "anchor.safetensors")) == {"mean", "variance"}


def edit(folder, change):
    path = folder / "anchor_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


GATE = "layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config.update(subspaces=[]),
            r"anchor_config\.json: key 'subspaces' is \[\], expected a mapping",
        ),
        (lambda config: config["subspaces"].pop(GATE), r"anchor\.safetensors holds the keys"),
        (
            lambda config: config["subspaces"][GATE].pop("linears"),
            rf"anchor_config\.json: subspace '{GATE}' is .*expected",
        ),
        (lambda config: config["subspaces"][GATE].update(num_inputs=1.5), f"subspace '{GATE}' is"),
        (lambda config: config["subspaces"][GATE].update(total_energy=0.0), "above the total energy"),
        (lambda config: config["subspaces"][GATE].update(linears=["other"]), "expected its first linear"),
        (lambda config: config.pop("subspace_options"), "an anchor without subspaces has format_version 1, found 2"),
        (lambda config: config.update(format_version=1), "an anchor with subspaces has format_version 2, found 1"),
        (lambda config: config["subspace_options"].pop("seed"), r"anchor_config\.json: .*missing keys \['seed'\]"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(anchor, tmp_path, change, message):
    edit(anchor.save_pretrained(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        ActivationAnchor.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_refused(anchor, tmp_path):
    anchor.save_pretrained(tmp_path)
    path = tmp_path / "anchor.safetensors"
    tensors = load_file(path)
    save_file({**tensors, f"subspaces.{GATE}.energies": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"anchor\.safetensors is corrupt"):
        ActivationAnchor.from_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.update(tensors_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match=rf"subspace of {GATE}: basis and energies must have the shapes"):
        ActivationAnchor.from_pretrained(tmp_path)


def test_moving_equality_and_repr_see_the_subspaces(anchor):
    moved = anchor.to("meta")
    assert {subspace.basis.device.type for subspace in moved.subspaces.values()} == {"meta"}
    assert {subspace.basis.device.type for subspace in anchor.subspaces.values()} == {"cpu"}
    changed = {**anchor.subspaces, GATE: anchor.subspaces[GATE].truncated(max_rank=1)}
    assert anchor != ActivationAnchor(anchor.mean, anchor.variance, anchor.fingerprint, changed)
    assert repr(anchor).endswith("subspaces=12)")
    with pytest.raises(ValueError, match="subspaces and their options or neither, found 0 subspaces"):
        ActivationAnchor(anchor.mean, anchor.variance, anchor.fingerprint)
