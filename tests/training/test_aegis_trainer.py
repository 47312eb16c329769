import json
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.gradients import GradientShield
from hf_aegis.training import AEGISTrainer, last_complete_checkpoint
from hf_aegis.training.json_lines import JSONLines
from hf_aegis.training.non_finite_guard import NonFiniteGuard
from hf_aegis.training.resources import ResourceCallback


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def train(make_language_model, make_anchor, make_args, token_dataset):
    """Trains a tiny language model and returns the trainer."""

    def run(resume=None, callbacks=None, eval_dataset=None, **changes):
        model = make_language_model()
        args = make_args(**changes)
        anchor = make_anchor(model) if args.preserve != "none" else None
        data = {"train_dataset": token_dataset, "eval_dataset": eval_dataset}
        trainer = AEGISTrainer(model, args, anchor=anchor, callbacks=callbacks, **data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_without_preservation_it_is_a_plain_trainer(train, make_language_model, make_args, token_dataset):
    ours = train(preserve="none")
    model = make_language_model()
    plain = Trainer(model, make_args(preserve="none"), train_dataset=token_dataset)
    plain.train()
    assert differing(weights(ours.model), weights(model)) == []


def test_a_training_step_applies_the_shields_gradient(make_language_model, make_anchor, make_args, token_dataset):
    model = make_language_model()
    anchor = make_anchor(model)
    trainer = AEGISTrainer(
        model,
        make_args(max_steps=1, optim="sgd", max_grad_norm=0, learning_rate=0.1),
        anchor,
        train_dataset=token_dataset,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    before = weights(model)
    with GradientShield(model, anchor) as shield:
        model.train()
        model(**batch).loss.backward()
    assert 0 < shield.report.summary()["throttle_rate"] <= 1
    expected = {name: before[name] - 0.1 * p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    trainer.train()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_same_seed_gives_equal_runs_and_another_form_agrees(train, tmp_path):
    first = train(output_dir=str(tmp_path / "a"))
    again = train(output_dir=str(tmp_path / "b"))
    assert differing(weights(first.model), weights(again.model)) == []
    timeless = [[r for r in JSONLines(tmp_path / n / "metrics.jsonl").read() if "loss" in r] for n in "ab"]
    assert len(timeless[0]) == 6
    assert timeless[0] == timeless[1]
    two_pass = train(output_dir=str(tmp_path / "c"), dual_backward="two_pass", activation_checkpointing=True)
    for name, value in weights(two_pass.model).items():
        torch.testing.assert_close(value, weights(first.model)[name], rtol=1e-3, atol=1e-4, msg=name)


def test_projection_changes_the_run(train, tmp_path):
    shielded = train(output_dir=str(tmp_path / "a"))
    naive = train(output_dir=str(tmp_path / "b"), preserve="none")
    assert differing(weights(shielded.model), weights(naive.model))


def test_logs_carry_the_diagnostics(train, tmp_path):
    trainer = train()
    out = tmp_path / "out"
    steps = [r for r in JSONLines(out / "metrics.jsonl").read() if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 7))
    for record in steps:
        assert 0 <= record["throttle_rate"] <= 1
        assert -1 <= record["cosine"] <= 1
        assert record["vlm_grad_norm_projected"] <= record["vlm_grad_norm"] * (1 + 1e-6)
        assert record["penalty"] == pytest.approx(record["penalty_mean_term"] + record["penalty_std_term"], rel=1e-5)
        # On a plain language model all trainable parameters are protected, so the clipped norm is the projected one.
        assert record["grad_norm"] == pytest.approx(record["vlm_grad_norm_projected"], rel=1e-4)
    lines = JSONLines(out / "projection.jsonl").read()
    assert [r["step"] for r in lines] == list(range(1, 7))
    assert lines[0]["groups"] == ["layers.0", "layers.1", "layers.2", "embeddings"]
    assert steps[0]["throttle_rate"] == sum(d < 0 for d in lines[0]["dot"]) / 4
    assert trainer.state.log_history[0]["throttle_rate"] == steps[0]["throttle_rate"]


def test_accumulation_projects_each_micro_batch(train, tmp_path):
    train(gradient_accumulation_steps=2, max_steps=3)
    lines = JSONLines(tmp_path / "out" / "projection.jsonl").read()
    assert [r["step"] for r in lines] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("preserve", ["projection", "none"])
def test_resuming_equals_not_stopping(train, tmp_path, preserve):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    options = {"preserve": preserve, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "max_steps": 8}
    whole = train(output_dir=str(tmp_path / "whole"), **options)
    train(output_dir=str(tmp_path / "cut"), callbacks=[Stop()], **options)
    resumed = train(output_dir=str(tmp_path / "cut"), resume=True, **options)
    assert resumed.state.global_step == 8
    assert differing(weights(whole.model), weights(resumed.model)) == []
    for name in ["metrics.jsonl"] + (["projection.jsonl"] if preserve == "projection" else []):
        records = [
            [r for r in JSONLines(tmp_path / folder / name).read() if "train_runtime" not in r]
            for folder in ("whole", "cut")
        ]
        assert records[0] == records[1]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_counting(train, tmp_path, restore):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step in (1, 4):
                next(model.parameters()).grad.fill_(math.nan)

    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = train(callbacks=[Poison(), ResourceCallback()], **options)
    assert whole.non_finite_guard.skipped_steps == 2

    def measured(trainer):
        return next(c for c in trainer.callback_handler.callbacks if isinstance(c, ResourceCallback))

    resumed = train(resume=str(tmp_path / "out" / "checkpoint-3"), callbacks=[ResourceCallback()], **options)
    assert resumed.non_finite_guard.skipped_steps == 1
    assert measured(resumed).seconds[:3] == measured(whole).seconds[:3]
    assert len(measured(resumed).seconds) == 6
    assert resumed.state.log_history[-2]["skipped_steps"] == 1

    state = tmp_path / "out" / "checkpoint-3" / "trainer_state.json"
    # As before there was such a figure.
    state.write_text(state.read_text().replace('"processor_seconds"', '"other"'))
    with pytest.raises(ValueError, match=r"a state of ResourceCallback without \['processor_seconds'\], found \["):
        train(resume=str(state.parent), callbacks=[ResourceCallback()], **options)
    state.write_text(state.read_text().replace("NonFiniteGuard", "SomethingElse"))
    with pytest.raises(ValueError, match="step 3 holds no state of NonFiniteGuard"):
        train(resume=str(state.parent), **options)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_with_its_neuron_cosines(train, tmp_path, restore):
    options = {
        "neuron_cosine_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restore,
    }
    train(**options)
    file = tmp_path / "out" / "neuron_cosines.json"
    whole = json.loads(file.read_text())
    assert whole["steps"] == [1, 3, 5]
    train(resume=str(tmp_path / "out" / "checkpoint-3"), **options)
    assert json.loads(file.read_text()) == whole


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_no_checkpoint_is_saved_before_its_log(train, token_dataset, tmp_path, strategy):
    class Watch(TrainerCallback):
        def __init__(self):
            self.saved = []

        def on_save(self, args, state, control, **kwargs):
            logged = [r["step"] for r in JSONLines(tmp_path / "out" / "metrics.jsonl").read() if "loss" in r]
            self.saved.append((state.global_step, logged[-1]))

    watch = Watch()
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    train(
        callbacks=[watch],
        save_strategy=strategy,
        save_steps=2,
        logging_steps=50,
        max_steps=6,
        eval_dataset=token_dataset,
        **(evaluation if strategy == "best" else {}),
    )
    assert len(watch.saved) >= 1
    assert all(step == logged for step, logged in watch.saved)


KILLED_RUN = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from conftest import TokenDataset, make_anchor, make_language_model
    from transformers import TrainerCallback
    from hf_aegis.training import AEGISConfig, AEGISTrainer

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    model = make_language_model.__wrapped__()()
    anchor = make_anchor.__wrapped__()(model)
    AEGISTrainer(
        model, AEGISConfig(**{arguments!r}), anchor=anchor, train_dataset=TokenDataset(24), callbacks=[Kill()]
    ).train()
"""


def test_a_killed_run_ends_like_an_uninterrupted_one(train, make_args, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = train(output_dir=str(tmp_path / "whole"), **options)

    folder = tmp_path / "killed"
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **options,
    }
    script = textwrap.dedent(KILLED_RUN).format(tests=str(Path(__file__).parent), arguments=arguments)
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL
    assert len(JSONLines(folder / "metrics.jsonl").read()) == 3
    # What a kill in the middle of saving leaves behind is passed over.
    broken = folder / "checkpoint-4"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"epoch": 0.')
    assert last_complete_checkpoint(folder).name == "checkpoint-2"
    resumed = train(output_dir=str(folder), resume=True, **options)
    assert differing(weights(whole.model), weights(resumed.model)) == []
    lines = [JSONLines(tmp_path / name / "projection.jsonl").read() for name in ("whole", "killed")]
    assert len(lines[0]) == 6
    assert lines[0] == lines[1]


def test_non_finite_gradients_never_reach_a_parameter(make_language_model, make_anchor, make_args, token_dataset):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).grad.view(-1)[0] = math.nan

    model = make_language_model()
    trainer = AEGISTrainer(model, make_args(max_steps=3), make_anchor(model), train_dataset=token_dataset)
    trainer.callback_handler.callbacks.insert(0, Poison())
    trainer.train()
    assert trainer.non_finite_guard.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert trainer.state.log_history[-2]["skipped_steps"] == 1


@pytest.mark.parametrize("where", ["loss", "loss alone", "layer"])
@pytest.mark.parametrize("preserve", ["projection", "none"])
def test_a_step_that_is_not_finite_is_dropped_as_a_whole(
    make_language_model, make_anchor, make_args, token_dataset, preserve, where
):
    class Watch(TrainerCallback):
        def __init__(self):
            self.weights = []

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.weights.append(weights(model))

    model = make_language_model()
    expert = {"expert_modules": ["model.layers.2.mlp"], "expert_ema_decay": 0.5}
    args = make_args(max_steps=4, preserve=preserve, weight_decay=0.1, **expert)
    trainer = AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset, callbacks=[watch := Watch()])
    compute_loss = trainer.compute_loss

    def poisoned(model, inputs, *rest, **options):
        loss = compute_loss(model, inputs, *rest, **options)
        if trainer.state.global_step != 1:
            return loss
        if where == "loss":
            return loss * math.nan
        if where == "loss alone":
            return loss + math.inf
        # Infinite slope at zero: the loss is finite, and only this gradient is not.
        return loss + (model.model.layers[1].mlp.up_proj.weight * 0).abs().sqrt().sum()

    trainer.compute_loss = poisoned
    trainer.train()
    after = [*watch.weights[1:], weights(model)]
    assert [bool(differing(a, b)) for a, b in zip(watch.weights, after, strict=True)] == [True, False, True, True]
    assert trainer.non_finite_guard.skipped_steps == 1
    # The average takes in nothing, the schedule goes on.
    assert trainer.ema.step == 3
    assert trainer.lr_scheduler.last_epoch == 4
    assert all(torch.isfinite(value).all() for value in after[-1].values())


def test_a_pass_that_is_not_finite_stays_out_of_the_means(
    make_language_model, make_anchor, make_args, token_dataset, tmp_path
):
    model = make_language_model()
    args = make_args(max_steps=4, logging_steps=2)
    trainer = AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset)
    compute_loss = trainer.compute_loss

    def poisoned(*arguments, **options):
        return compute_loss(*arguments, **options) * (math.nan if trainer.state.global_step in (1, 2, 3) else 1.0)

    trainer.compute_loss = poisoned
    trainer.train()
    lines = [(tmp_path / "out" / name).read_text().splitlines() for name in ("projection.jsonl", "metrics.jsonl")]
    passes, metrics = ([json.loads(line, parse_constant=pytest.fail) for line in text] for text in lines)
    assert [record["summary"]["energy_shed"] is None for record in passes] == [False, True, True, True]
    assert passes[1]["cosine"] == [None] * 4
    assert metrics[0]["energy_shed"] == passes[0]["summary"]["energy_shed"]
    assert metrics[0]["cosine"] == pytest.approx(sum(passes[0]["cosine"]) / 4)
    # A window without a single finite pass has no means.
    assert metrics[1]["step"] == 4
    assert "cosine" not in metrics[1]
    assert (metrics[0]["skipped_steps"], metrics[1]["skipped_steps"]) == (1, 3)


def test_a_failed_training_leaves_no_figures_to_the_next(
    make_language_model, make_anchor, make_args, token_dataset, tmp_path
):
    class Fail(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = make_language_model()
    args = make_args(max_steps=2, gradient_accumulation_steps=2)
    trainer = AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset)
    trainer.add_callback(fail := Fail())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(fail)
    model.zero_grad()
    trainer.train()
    steps = [r["step"] for r in JSONLines(tmp_path / "out" / "projection.jsonl").read()]
    assert steps == [1, 1, 2, 2]


def test_a_step_without_gradients_is_counted():
    guard = NonFiniteGuard()
    args = SimpleNamespace(fp16=False, max_skipped_steps=20, world_size=1, device="cpu")
    guard.on_pre_optimizer_step(args, None, None, model=torch.nn.Linear(1, 1))
    assert guard.skipped_steps == 1


def test_frozen_decoder_is_an_error(make_language_model, make_anchor, make_args, token_dataset):
    model = make_language_model()
    anchor = make_anchor(model)
    model.model.requires_grad_(False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="reached no decoder layer"):
        AEGISTrainer(model, make_args(), anchor, train_dataset=token_dataset).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preserve": "hope"}, "preserve must be one of"),
        ({"dual_backward": "sideways"}, "dual_backward must be one of"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"penalty_scale": 0.0}, "penalty_scale must be positive, found 0.0"),
        ({"expert_ema_decay": 1.0}, r"expert_ema_decay must lie in \[0, 1\), found 1.0"),
        ({"frozen_modules": ["layers.0", "visoin_tower"]}, "no module whose path ends with 'visoin_tower'"),
        ({"expert_modules": ["expert"]}, "no module 'expert'"),
        ({"projection_scope": "node"}, "projection_scope must be one of"),
        ({"projection_scope": "rank", "projection_target": "update"}, "cannot be combined with projection_target"),
        ({"torch_compile": True}, "not supported with torch.compile"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
            r"offload.* in the streaming form, .*dual_backward=\"two_pass\"",
        ),
        ({"optim": "lomo"}, "not supported with the optimiser .*lomo"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]}, "steps inside the backward pass"),
        ({"optim": "apollo_adamw_layerwise", "optim_target_modules": ["mlp"]}, "steps inside the backward pass"),
        ({"fp16": True, "use_cpu": False}, "not supported with float16"),
    ],
)
def test_wrong_arguments_are_refused(make_language_model, make_anchor, make_args, token_dataset, changes, message):
    model = make_language_model()
    anchor = make_anchor(model)
    changes = {"frozen_modules": ["layers.0"], **changes}
    with pytest.raises(ValueError, match=message):
        AEGISTrainer(model, make_args(**changes), anchor, train_dataset=token_dataset)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepspeed", {"zero_optimization": {"stage": 1}}, "DeepSpeed, which takes gradients over.*use fsdp=True"),
        ("deepspeed", {"zero_optimization": {"stage": 3}}, "DeepSpeed, which takes gradients over.*use fsdp=True"),
        # As `accelerate launch` asks for it.
        ("deepspeed_plugin", SimpleNamespace(zero_stage=2), "DeepSpeed, which takes gradients over.*torchrun alone"),
        ("parallelism_config", SimpleNamespace(tp_size=2), "tensor, context or sequence parallelism"),
        ("ddp_static_graph", True, "ddp_static_graph"),
    ],
)
def test_engines_that_would_not_be_right_are_refused(
    make_language_model, make_anchor, make_args, token_dataset, name, value, message
):
    model, args = make_language_model(), make_args()
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"not supported with {message}"):
        AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset)


def test_approximate_references_reach_the_shield(make_language_model, make_anchor, make_args, token_dataset):
    model = make_language_model()
    args = make_args(max_steps=4, reference_interval=2, reference_share=0.5)
    trainer = AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset)
    layer = find_decoder_layers(model)[1]
    rows, gradients, counts = [], [], []
    layer.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    layer.mlp.down_proj.weight.register_hook(lambda _: gradients.append(1))

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            counts.append(len(gradients))
            gradients.clear()

    trainer.add_callback(Count())
    trainer.train()
    assert rows == [2, 2] * 4
    # The reference's gradient and the task's, or the task's alone.
    assert counts == [2, 1, 2, 1]


def test_routed_experts_are_not_run_on_parts_of_a_batch(make_language_model, make_anchor, make_args, token_dataset):
    model = make_language_model()
    model.get_auxiliary_loss = lambda: torch.zeros(())
    with pytest.raises(ValueError, match=r"reference_share=0\.5 is not supported with routed experts"):
        AEGISTrainer(model, make_args(reference_share=0.5), make_anchor(model), train_dataset=token_dataset)


def test_half_precision_with_the_projection(make_language_model, make_anchor, make_args, token_dataset):
    anchor = make_anchor(make_language_model())
    with pytest.raises(ValueError, match="not supported with float16"):
        AEGISTrainer(make_language_model().half(), make_args(), anchor, train_dataset=token_dataset)
    AEGISTrainer(make_language_model().half(), make_args(preserve="none"), train_dataset=token_dataset)
    trainer = AEGISTrainer(
        make_language_model(), make_args(max_steps=1, bf16=True), anchor, train_dataset=token_dataset
    )
    trainer.train()
    assert trainer.state.log_history[0]["energy_shed"] > 0


def test_missing_and_foreign_anchors_are_refused(make_language_model, make_anchor, make_args, token_dataset):
    model = make_language_model()
    with pytest.raises(ValueError, match="needs an anchor"):
        AEGISTrainer(model, make_args(), train_dataset=token_dataset)
    anchor = make_anchor(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="weight"):
        AEGISTrainer(model, make_args(frozen_modules=["layers.0"]), anchor, train_dataset=token_dataset)
    assert all(p.requires_grad for p in model.parameters())


def test_checkpoint_state_is_json(train, tmp_path):
    train(save_strategy="steps", save_steps=3)
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
