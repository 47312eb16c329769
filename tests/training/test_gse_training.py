"""Training through experts: the balance loss in the trainer, what is logged, and the condition as a whole run."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_aegis import GSEConfig
from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.evaluation.expert_spectra import ExpertSpectra
from hf_aegis.models import PaliGemmaFlowForAction
from hf_aegis.training import AEGISTrainer
from hf_aegis.training.adapters import add_gse
from hf_aegis.training.json_lines import JSONLines
from hf_aegis.training.run import RunArguments, run_training


EXPERT = {"expert_hidden_size": 16, "expert_num_layers": 1, "expert_num_heads": 2, "expert_intermediate_size": 32}


def with_experts(model, **options):
    torch.manual_seed(0)
    config = GSEConfig(target_modules=["q_proj", "down_proj"], r=8, num_experts=4, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_balance_is_part_of_the_task(accumulation, make_language_model, make_args, token_dataset, tmp_path):
    model = with_experts(make_language_model(), router_aux_loss_coef=0.5)
    args = make_args(
        max_steps=1,
        preserve="none",
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer = AEGISTrainer(model, args, train_dataset=token_dataset)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    batches = list(trainer.get_train_dataloader())[:accumulation]
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    gradients = {name: torch.zeros_like(p) for name, p in trained.items()}
    balances = []
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**batch).loss * count / sum(counts)
        balances.append(model.get_auxiliary_loss())
        found = torch.autograd.grad(loss + balances[-1] / accumulation, list(trained.values()))
        for name, gradient in zip(gradients, found, strict=True):
            gradients[name] += gradient
    torch.manual_seed(args.seed)
    trainer.train()
    for name, parameter in trained.items():
        torch.testing.assert_close(before[name] - parameter, 0.1 * gradients[name], rtol=1e-3, atol=1e-6, msg=name)
    logs = [r for r in JSONLines(tmp_path / "out" / "metrics.jsonl").read() if "auxiliary_loss" in r]
    assert logs[0]["auxiliary_loss"] == pytest.approx(
        sum(balance.item() for balance in balances) / accumulation, rel=1e-4
    )


def test_routing_is_logged_and_a_resumed_run_logs_the_same(
    make_language_model, make_anchor, make_args, token_dataset, tmp_path
):
    def train(folder, resume=None):
        base = make_language_model()
        anchor = make_anchor(base)
        args = make_args(output_dir=str(tmp_path / folder), max_steps=4, save_strategy="steps", save_steps=2)
        trainer = AEGISTrainer(with_experts(base), args, anchor=anchor, train_dataset=token_dataset)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train("whole")
    lines = JSONLines(tmp_path / "whole" / "experts.jsonl").read()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len(lines[0]["layers"]) == 3 * 2
    for figures in lines[0]["layers"].values():
        assert sum(figures["load"]) == pytest.approx(2.0, rel=1e-5)
        assert sum(figures["probability"]) == pytest.approx(1.0, rel=1e-5)
        assert 0 < figures["entropy"] <= torch.tensor(3.0).log().item() + 1e-6
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert JSONLines(tmp_path / "resumed" / "experts.jsonl").read() == lines[2:]
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_another_model_logs_no_routing(make_language_model, make_args, token_dataset, tmp_path):
    args = make_args(max_steps=1, preserve="none")
    AEGISTrainer(make_language_model(), args, train_dataset=token_dataset).train()
    assert not (tmp_path / "out" / "experts.jsonl").exists()
    assert not any("auxiliary_loss" in r for r in JSONLines(tmp_path / "out" / "metrics.jsonl").read())


def test_spectra_of_experts(make_language_model):
    model = with_experts(make_language_model().double())
    spectra = ExpertSpectra(model)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    start = torch.linalg.svdvals(layer.base_weight())[:8] / 10
    with torch.no_grad():
        layer.gse_B["default"][:, 0] += 1.0
        before = layer.gse_scaling["default"][0] * torch.outer(
            torch.ones(layer.out_features, dtype=torch.float64), layer.gse_A["default"][0]
        )
    found = {entry["name"]: entry for entry in spectra.compare(model.get_base_model())["layers"]}
    assert len(found) == 6
    entry = found["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(torch.tensor(entry["before"], dtype=torch.float64), start)
    assert entry["update"][0] == pytest.approx(before.norm().item())
    assert max(entry["update"][1:]) < 1e-6 * entry["update"][0]
    assert entry["after"] != entry["before"]
    assert max(found["model.layers.0.mlp.down_proj"]["update"]) < 1e-6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("preserve", ["none", "projection"])
def test_a_run_through_experts(preserve, demonstrations, flow_anchor, make_args, tmp_path):
    run = RunArguments(
        demonstrations=[demonstrations],
        anchor=str(flow_anchor.save_pretrained(tmp_path / "anchor")) if preserve == "projection" else None,
        chunk_size=4,
        expert=EXPERT,
        gse={"r": 8, "num_experts": 4},
        vqa_samples=0,
        vqa_final_samples=4,
        action_samples=3,
    )
    result = run_training(run, make_args(output_dir=str(tmp_path / "out"), max_steps=2, preserve=preserve))
    assert result["vqa_cross_entropy"] > 0 and result["action_mse"] > 0
    assert ("throttle_rate" in result) == (preserve == "projection")
    # What is saved is the model as it was, projector and expert apart, and the adapter.
    policy = PaliGemmaFlowForAction.from_pretrained(tmp_path / "out")
    torch.manual_seed(3)
    start = PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, dtype=torch.float32, chunk_size=4, **EXPERT).state_dict()
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, start[name])}
    assert {name.split(".")[0] for name in changed} == {"action_expert", "model"}
    assert all("action_expert" in name or "multi_modal_projector" in name for name in changed)
    whole = PeftModel.from_pretrained(policy, tmp_path / "out" / "adapter")
    adapted = whole.base_model.targeted_module_names
    assert len(adapted) == 4 * 7 and all("language_model.layers." in name for name in adapted)
    trained = sum(p.numel() for name, p in whole.named_parameters() if any(s in name for s in ("gse_A", "gse_B")))
    assert 0 < trained < result["trainable_parameters"]
    spectra = json.loads((tmp_path / "out" / "analysis" / "expert_spectra.json").read_text())
    assert len(spectra["layers"]) == 28
    assert all(sum(entry["update"]) > 0 for entry in spectra["layers"])
    assert [line["step"] for line in JSONLines(tmp_path / "out" / "experts.jsonl").read()] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gse": {"rank": 3}}, "gse: unknown key 'rank', expected some of .*'num_experts'"),
        ({"gse": {"r": 3}}, "gse: r must be an integer of at least num_experts"),
        ({"gse": {}, "lora": {}}, "lora and gse are adapters of the same layers"),
        ({"gse": {}, "weight_interpolation": 0.5}, "weight_interpolation is of weights.* it excludes gse"),
    ],
)
def test_wrong_arguments_are_refused_early(changes, message):
    with pytest.raises(ValueError, match=message):
        RunArguments(**changes).check()


def test_held_subspaces_are_refused_early(make_args, tmp_path):
    run = RunArguments(anchor="anchor", gse={})
    with pytest.raises(ValueError, match='preserve="subspace" holds LoRA\'s adapters alone'):
        run_training(run, make_args(preserve="subspace"))


def test_unknown_options_are_refused(make_flow_model):
    with pytest.raises(ValueError, match="gse: unknown key 'rank', expected fields of GSEConfig such as r, num_exp"):
        add_gse(make_flow_model(), {"rank": 2})
