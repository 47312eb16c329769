"""Training with held subspaces: what is held, under which ways of training, and what is reported of it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.training import AEGISTrainer
from hf_aegis.training.certificate_callback import CERTIFICATE_FILE


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(dataset, size=8):
    rows = [dataset[index] for index in range(len(dataset))]
    return [
        {key: torch.stack([row[key] for row in rows[start : start + size]]) for key in ("input_ids", "attention_mask")}
        for start in range(0, len(rows), size)
    ]


@pytest.fixture
def other_sequences(token_dataset):
    return batches(type(token_dataset)(16, seed=7))


@pytest.fixture
def make_subspace_anchor(other_sequences):
    def make(model, **changes):
        options = SubspaceOptions(**{"energy": 0.9, **changes})
        return ActivationAnchor.collect(model, other_sequences, subspaces=options, progress=False)

    return make


@pytest.fixture
def trainer(make_language_model, make_subspace_anchor, make_args, token_dataset):
    def make(model=None, certificate_batches=None, **changes):
        model = make_language_model() if model is None else model
        args = make_args(**{"preserve": "subspace", **changes})
        pairs = args.subspace_sensitivity is not None
        return AEGISTrainer(
            model=model,
            args=args,
            anchor=make_subspace_anchor(model, **({"energy": 1.0, "sensitivity": True} if pairs else {})),
            train_dataset=token_dataset,
            certificate_batches=certificate_batches,
        )

    return make


def on_subspaces(model, anchor):
    """What each linear makes of its subspace: W U."""
    layers = dict(model.get_decoder().named_modules())
    return {
        name: layers[name].weight.detach() @ subspace.basis
        for subspace in anchor.subspaces.values()
        for name in subspace.linears
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "adafactor"},
        {"weight_decay": 0.3},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"subspace_steps": 4},
        {"preserve": "both"},
        {"penalties": {"l2sp": 0.1}},
    ],
)
def test_linears_do_on_the_subspaces_what_they_did(trainer, changes):
    ours = trainer(**changes)
    before = on_subspaces(ours.model, ours.anchor)
    weights = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    ours.train()
    after = on_subspaces(ours.model, ours.anchor)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-5, msg=name)
    moved = {name for name, p in ours.model.named_parameters() if not torch.equal(p, weights[name])}
    assert moved == {f"model.{name}.weight" for name in before}
    assert (ours.shield is not None) == (changes.get("preserve") == "both")


def test_the_parameters_that_nothing_holds_train_where_that_is_asked_for(trainer):
    ours = trainer(freeze_unheld=False)
    embeddings = ours.model.get_input_embeddings().weight.detach().clone()
    ours.train()
    assert not torch.equal(ours.model.get_input_embeddings().weight, embeddings)


def test_nothing_held_is_training_without_preservation(trainer, make_language_model, make_args, token_dataset):
    names = {"layers.0.*": 0.0, "layers.1.*": 0.0}
    ours = trainer(subspace_energies={**names, "layers.2.mlp.*": 0.0}, freeze_unheld=False)
    assert set(ours.preservation.held.weights) == {
        f"layers.2.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    almost = trainer(subspace_softness=1e30, freeze_unheld=False)
    almost.train()
    plain = AEGISTrainer(make_language_model(), make_args(preserve="none"), train_dataset=token_dataset)
    plain.train()
    for (name, one), (_, two) in zip(almost.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6, msg=name)


def test_pairs_of_directions_are_held(trainer):
    ours = trainer(subspace_sensitivity=0.9)
    held = ours.preservation.held
    layers = dict(ours.model.get_decoder().named_modules())

    def on_pairs():
        bases = {name: s.basis for s in ours.anchor.subspaces.values() for name in s.linears}
        outputs = {name: pair.sensitivity.output_basis for name, pair in held.pairs.items()}
        return {name: outputs[name].T @ layers[name].weight.detach() @ bases[name] for name in outputs}

    before = on_pairs()
    ours.train()
    total = kept = 0.0
    for name, value in on_pairs().items():
        mask, sensitivities = held.pairs[name].mask, ours.anchor.sensitivities[name].sensitivities
        torch.testing.assert_close(value[mask], before[name][mask], rtol=1e-5, atol=1e-5, msg=name)
        assert (value - before[name])[~mask].abs().max() > 1e-3, name
        total, kept = total + float(sensitivities.sum()), kept + float(sensitivities[mask].sum())
    assert 0.9 <= kept / total < 0.91
    assert sum(int(pair.mask.sum()) for pair in held.pairs.values()) < 0.5 * sum(
        pair.mask.numel() for pair in held.pairs.values()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_do_nothing_on_the_subspaces(make_language_model, trainer):
    torch.manual_seed(1)
    model = get_peft_model(make_language_model(), LoraConfig(r=4, target_modules=PROJECTIONS))
    ours = trainer(model)
    before = on_subspaces(make_language_model(), ours.anchor)
    ours.train()
    assert all(float(p.detach().abs().max()) for n, p in model.named_parameters() if "lora_B" in n)
    merged = ours.model.merge_and_unload()
    for name, value in on_subspaces(merged, ours.anchor).items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_resumed_training_holds_what_an_uninterrupted_one_does(trainer, other_sequences, tmp_path, steps):
    # After step 3 the subspaces are restored because it is saved, and then after steps 4 and 6.
    saved = {"save_strategy": "steps", "save_steps": 3, "subspace_steps": steps}
    saved |= {"certificate_batches": other_sequences[:1], "certificate_steps": 2}
    whole = trainer(output_dir=str(tmp_path / "whole"), **saved)
    whole.train()
    begun = trainer(max_steps=3, output_dir=str(tmp_path / "parts"), **saved)
    begun.train()
    resumed = trainer(output_dir=str(tmp_path / "parts"), **saved)
    resumed.train(resume_from_checkpoint=True)
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    certified = {
        name: [json.loads(line) for line in (tmp_path / name / CERTIFICATE_FILE).read_text().splitlines()]
        for name in ("whole", "parts")
    }
    # The part that came first measured its own end, too.
    assert [line["step"] for line in certified["parts"]] == [2, 3, 4, 6]
    assert [line for line in certified["parts"] if line["step"] != 3] == certified["whole"]


def test_what_is_saved_is_held(trainer, make_language_model, tmp_path):
    ours = trainer(save_strategy="steps", save_steps=3, subspace_steps=4)
    before = on_subspaces(make_language_model(), ours.anchor)
    ours.train()
    saved = make_language_model().from_pretrained(tmp_path / "out" / "checkpoint-3")
    for name, value in on_subspaces(saved, ours.anchor).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_certificate_is_written_and_logged(trainer, other_sequences, tmp_path):
    ours = trainer(certificate_batches=other_sequences[:1], certificate_steps=4)
    ours.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / CERTIFICATE_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    report = lines[-1]
    assert set(report["linears"]) == set(on_subspaces(ours.model, ours.anchor))
    assert max(linear["inside"] for linear in report["linears"].values()) < 1e-5
    assert min(linear["outside"] for linear in report["linears"].values()) > 1e-3
    logged = [log for log in ours.state.log_history if "certificate_logits" in log]
    assert [log["step"] for log in logged] == [4, 6]
    assert logged[-1]["certificate_layers"] == max(report["layers"].values())
    assert logged[-1]["certificate_divergence"] > 0
    # A training that has ended is measured again, and still counts once.
    again = trainer(certificate_batches=other_sequences[:1], certificate_steps=3)
    again.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / CERTIFICATE_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]


def test_less_changes_with_held_subspaces_than_without(trainer, other_sequences):
    divergence = {}
    for name, changes in {
        "none": {"preserve": "none"},
        "subspace": {},
        "pairs": {"subspace_sensitivity": 0.9},
    }.items():
        ours = trainer(certificate_batches=other_sequences, **changes)
        ours.train()
        divergence[name] = ours.state.log_history[-1]["certificate_divergence"]
    assert divergence["subspace"] < divergence["none"] / 3
    assert divergence["pairs"] < divergence["none"] / 3


def test_an_anchor_is_needed_and_has_to_have_subspaces(make_language_model, make_anchor, make_args, token_dataset):
    model = make_language_model()
    with pytest.raises(ValueError, match='preserve="subspace" needs an anchor'):
        AEGISTrainer(model, make_args(preserve="subspace"), train_dataset=token_dataset)
    with pytest.raises(ValueError, match="without subspaces"):
        AEGISTrainer(model, make_args(preserve="subspace"), anchor=make_anchor(model), train_dataset=token_dataset)
    with pytest.raises(ValueError, match="certificate_batches need an anchor"):
        AEGISTrainer(model, make_args(preserve="none"), train_dataset=token_dataset, certificate_batches=[])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subspace_energy": 1.5}, r"subspace_energy must lie in \[0, 1\], found 1.5"),
        ({"subspace_energies": {"layers.0.*": -1}}, r"subspace_energies\['layers.0.\*'\] must lie in"),
        ({"subspace_softness": -1.0}, "subspace_softness must be finite and not negative"),
        ({"subspace_sensitivity": 0.0}, r"subspace_sensitivity must lie in \(0, 1\], found 0.0"),
        ({"subspace_sensitivity": 0.9, "subspace_softness": 1.0}, "cannot be combined with subspace_sensitivity"),
        ({"subspace_steps": 0}, "subspace_steps must be positive"),
        ({"certificate_steps": -1}, "certificate_steps must be finite and not negative"),
        ({"preserve": "projection", "subspace_energy": 0.9}, "subspace_energy=0.9 has no effect with"),
        ({"preserve": "none", "freeze_unheld": False}, "freeze_unheld=False has no effect with"),
        ({"granularity": "global"}, "granularity='global' has no effect with"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)
