"""The embedded PaliGemma 2 with a tiny action expert, on two tiny LIBERO tasks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.gradients import GradientShield
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training import AEGISConfig, AEGISTrainer, last_complete_checkpoint
from hf_aegis.training.checkpoints import load_weights
from hf_aegis.training.json_lines import JSONLines


# PEFT asks the model by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def make_trainer(make_flow_model, make_libero, make_args, flow_anchor):
    """A trainer of the embedded model in float32; keywords of `AEGISConfig` and of the trainer's own."""
    own = ("anchor", "vqa_holdout", "eval_dataset", "callbacks", "model", "processing_class", "data_collator")

    def make(**options):
        arguments = {name: options.pop(name) for name in own if name in options}
        arguments.setdefault("anchor", flow_anchor)
        model = arguments.pop("model", None) or make_flow_model()
        args = make_args(**{"max_steps": 2, "learning_rate": 1e-3, **options})
        return AEGISTrainer(model, args, train_dataset=make_libero(), **arguments)

    return make


# Torch's word on a machine without an accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_what_a_user_types(flow_anchor, make_libero, vqa_holdout, tmp_path):
    set_seed(0)
    model = PaliGemmaFlowForAction.from_vlm(
        EMBEDDED_VLM,
        chunk_size=4,
        expert_hidden_size=16,
        expert_num_layers=1,
        expert_num_heads=2,
        expert_intermediate_size=32,
    )
    dataset = make_libero()
    trainer = AEGISTrainer(
        model=model,
        args=AEGISConfig(output_dir=str(tmp_path), max_steps=2, disable_tqdm=True, save_strategy="no"),
        anchor=flow_anchor,
        train_dataset=dataset,
    )
    trainer.train()

    # It still answers questions ...
    assert len(vqa_holdout.evaluate_accuracy(trainer.model).predictions) == 6
    # ... and acts, before and after it went to disk.
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PaliGemmaFlowForAction.from_pretrained(tmp_path / "saved")
    processor = PaliGemmaFlowProcessor.from_pretrained(tmp_path / "saved")
    assert processor.statistics == dataset.statistics
    assert processor.cameras == ["agentview_rgb", "eye_in_hand_rgb"]
    noise = torch.randn(2, 4, 7)
    sampled = []
    for policy, prepare in ((trainer.model.eval(), trainer.processing_class), (loaded.eval(), processor)):
        inputs = prepare(
            images=[dataset[i]["images"] for i in (0, 3)],
            text=["pick up the red circle", "pick up the blue triangle"],
            state=torch.linspace(-1, 1, 18).view(2, 9),
        )
        actions = prepare.postprocess_actions(policy.sample_actions(**inputs, noise=noise))
        assert actions.shape == (2, 4, 7)
        assert torch.isfinite(actions).all()
        sampled.append(actions)
    assert torch.equal(*sampled)


@pytest.mark.parametrize("frozen", [None, []])
def test_what_trains_and_what_does_not(make_trainer, frozen, tmp_path):
    trainer = make_trainer(frozen_modules=frozen, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    changed = differing(before, weights(trainer.model))
    for part in ("multi_modal_projector", "language_model.layers.0", "language_model.layers.3", "embed_tokens"):
        assert any(part in name for name in changed), part
    assert any(name.startswith("action_expert.") for name in changed)
    assert any("vision_tower" in name for name in changed) == (frozen == [])
    groups = JSONLines(tmp_path / "out" / "projection.jsonl").read()[0]["groups"]
    expected = ["embeddings", *(f"layers.{i}" for i in range(4)), "multi_modal_projector"]
    assert sorted(groups) == expected + (["vision_tower"] if frozen == [] else [])


def test_the_expert_gets_its_naive_gradient(make_trainer, make_flow_model, flow_anchor):
    trainer = make_trainer(max_steps=1, optim="sgd", max_grad_norm=0, expert_learning_rate=0.5, expert_ema_decay=0.0)
    trainer.model.zero_grad()
    batch = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(5)
    trainer.model.train()(**batch).loss.backward()
    naive = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    shield = GradientShield(trainer.model, flow_anchor)
    torch.manual_seed(5)
    with shield:
        trainer.model(**batch).loss.backward()
    assert shield.report.summary()["throttle_rate"] > 0
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    bent = differing(naive, gradients)
    assert bent
    assert not any(name.startswith("action_expert.") for name in bent)
    assert sum(name.startswith("action_expert.") for name in naive) > 10


def test_rates_per_group(make_trainer):
    trainer = make_trainer(learning_rate=1e-3, expert_learning_rate=3e-4, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {
        (name.startswith("action_expert."), group["lr"], group["weight_decay"]): 0
        for group in groups
        for name in (names[id(p)] for p in group["params"])
    }
    assert sorted(found) == [(False, 1e-3, 0.0), (False, 1e-3, 0.1), (True, 3e-4, 0.0), (True, 3e-4, 0.1)]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)

    alike = make_trainer(learning_rate=1e-3, expert_learning_rate=None, weight_decay=0.1).create_optimizer()
    assert [(group["lr"], group["weight_decay"]) for group in alike.param_groups] == [(1e-3, 0.1), (1e-3, 0.0)]


def test_a_rate_of_zero_leaves_the_expert_alone(make_trainer):
    trainer = make_trainer(expert_learning_rate=0.0, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    changed = differing(before, weights(trainer.model))
    assert changed
    assert not any(name.startswith("action_expert.") for name in changed)


# bitsandbytes' own bookkeeping.
@pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes")
def test_eight_bit_adam_with_both_rates(make_trainer):
    from bitsandbytes.optim import GlobalOptimManager

    # As an earlier training in this process leaves it, of other weights in the same places.
    GlobalOptimManager.get_instance().index2config.update({(0, place): {"optim_bits": 32} for place in range(60)})
    trainer = make_trainer(optim="adamw_bnb_8bit", expert_learning_rate=2e-3, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert sorted({group["initial_lr"] for group in optimizer.param_groups}) == [1e-3, 2e-3]
    embeddings = trainer.model.get_input_embeddings().weight
    for name, parameter in trainer.model.named_parameters():
        if parameter in optimizer.state:
            large = parameter.numel() >= 4096 and parameter is not embeddings
            assert optimizer.state[parameter]["state1"].dtype == (torch.uint8 if large else torch.float32), name
    changed = differing(before, weights(trainer.model))
    assert any(name.startswith("action_expert.") for name in changed)
    assert any("language_model.layers" in name for name in changed)


def test_evaluation_is_repeatable_and_leaves_no_trace(make_trainer, make_libero, tmp_path):
    trainer = make_trainer(eval_dataset=make_libero("held_out"))
    random_state, before = torch.get_rng_state(), weights(trainer.model)
    first = trainer.evaluate()["eval_loss"]
    assert 0 < first < 1e3
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.manual_seed(99)
    assert trainer.evaluate()["eval_loss"] == first
    assert differing(before, weights(trainer.model)) == []
    assert [r["eval_loss"] for r in JSONLines(tmp_path / "out" / "metrics.jsonl").read()] == [first, first]
    # The same by hand, in one batch.
    trainer.args.per_device_eval_batch_size = 64
    torch.manual_seed(trainer.args.seed)
    (batch,) = trainer.get_eval_dataloader()
    assert len(batch["actions"]) == len(trainer.eval_dataset)
    by_hand = trainer.model.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand, rel=1e-5)


def test_evaluation_uses_the_average_and_training_ends_with_it(make_trainer, make_libero, tmp_path):
    class Look(TrainerCallback):
        def __init__(self):
            self.trained, self.evaluated = [], []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.trained.append(weights(model.action_expert))

        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            self.evaluated.append(weights(model.action_expert))

    look = Look()
    trainer = make_trainer(
        max_steps=3,
        expert_learning_rate=1e-2,
        eval_dataset=make_libero("held_out"),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=64,
        save_strategy="steps",
        save_steps=2,
        callbacks=[look],
    )
    average = weights(trainer.model.action_expert)
    trainer.train()
    averages = []
    for step, trained in enumerate(look.trained):
        decay = (1 + step) / (10 + step)
        average = {name: decay * average[name] + (1 - decay) * trained[name] for name in average}
        averages.append(average)
    # The Trainer evaluates at the end, too.
    assert len(look.evaluated) == 2
    for name in average:
        torch.testing.assert_close(look.evaluated[0][name], averages[1][name], msg=name)
        torch.testing.assert_close(look.evaluated[1][name], averages[2][name], msg=name)
        torch.testing.assert_close(weights(trainer.model.action_expert)[name], averages[2][name], msg=name)
    checkpoint = last_complete_checkpoint(tmp_path / "out")
    assert checkpoint.name == "checkpoint-3"
    stored = load_file(checkpoint.parent / "checkpoint-2" / "model.safetensors")
    stored_average = load_file(checkpoint.parent / "checkpoint-2" / "expert_ema.safetensors")
    for name, trained in look.trained[1].items():
        # Restored after the evaluation at the same step, to the last bit.
        assert torch.equal(stored[f"action_expert.{name}"], trained), name
        torch.testing.assert_close(stored_average[f"action_expert.{name}"], averages[1][name], msg=name)
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(stored[f"action_expert.{name}"], t) for name, t in look.trained[2].items())


def test_the_best_checkpoint_comes_back_with_its_own_average(make_trainer, make_libero, tmp_path):
    class Pretend(TrainerCallback):
        """Makes the first evaluation the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    options = {
        "max_steps": 4,
        "expert_learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    trainer = make_trainer(eval_dataset=make_libero("held_out"), callbacks=[Pretend()], **options)
    trainer.train()
    best = tmp_path / "out" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    stored = weights(PaliGemmaFlowForAction.from_pretrained(best))
    average = load_file(best / "expert_ema.safetensors")
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, average.get(name, stored[name])), name
    with pytest.raises(ValueError, match=r"load_best_model_at_end.*save_only_model"):
        make_trainer(eval_dataset=make_libero("held_out"), save_only_model=True, **options)


def test_resuming_with_evaluations_in_between_equals_not_stopping(make_trainer, make_libero, vqa_holdout, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    watched = {
        "eval_dataset": make_libero("held_out"),
        "vqa_holdout": vqa_holdout,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "vqa_steps": 2,
        "vqa_accuracy": False,
        "per_device_eval_batch_size": 64,
    }
    options = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "expert_learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "cut"), callbacks=[Stop()], **options, **watched).train()
    resumed = make_trainer(output_dir=str(tmp_path / "cut"), **options, **watched)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert resumed.state.epoch > 1
    assert differing(weights(whole.model), weights(resumed.model)) == []
    assert differing(whole.ema.average, resumed.ema.average) == []
    assert resumed.ema.step == 8
    losses = [
        [r["loss"] for r in JSONLines(tmp_path / name / "metrics.jsonl").read() if "loss" in r]
        for name in ("whole", "cut")
    ]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
    steps = [r["step"] for r in JSONLines(tmp_path / "cut" / "projection.jsonl").read()]
    # Thirteen batches are an epoch, so its seventh step has but one.
    assert steps == [step for step in range(1, 9) for _ in range(1 if step == 7 else 2)]


def test_a_checkpoint_of_another_model_is_an_error(make_flow_model, make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2).train()
    larger = make_flow_model(expert_num_layers=2)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 does not fit PaliGemmaFlowForAction: missing_keys \['action_e"
    ):
        load_weights(larger, tmp_path / "out" / "checkpoint-2")


def test_resuming_without_an_average_is_an_error(make_trainer):
    make_trainer(expert_ema_decay=0.0, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"checkpoint-2/expert_ema\.safetensors is missing"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=True)


def test_resuming_a_finished_run_trains_no_further(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 2}
    first = make_trainer(**options)
    first.train()
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert differing(weights(first.model), weights(again.model)) == []


def test_vqa_during_training(make_trainer, vqa_holdout, tmp_path):
    class Ask(TrainerCallback):
        figures = []  # noqa: RUF012

        def on_step_end(self, args, state, control, model=None, **kwargs):
            result = vqa_holdout.evaluate(model)
            self.figures.append((state.global_step, result.cross_entropy, result.accuracy))

    before = vqa_holdout.evaluate(make_trainer().model)
    trainer = make_trainer(max_steps=5, vqa_steps=2, logging_steps=2, vqa_holdout=vqa_holdout, callbacks=[Ask()])
    trainer.train()
    records = JSONLines(tmp_path / "out" / "metrics.jsonl").read()
    logged = [(r["step"], r["vqa_cross_entropy"], r["vqa_accuracy"]) for r in records if "vqa_cross_entropy" in r]
    expected = [(0, before.cross_entropy, before.accuracy)] + [Ask.figures[i] for i in (1, 3, 4)]
    assert logged == expected
    assert len({figures[1] for figures in logged}) == 4
    # Its records take no other's place.
    assert [r["step"] for r in records if "loss" in r] == [2, 4]
    after = VQAHoldout(vqa_holdout.samples, trainer.processing_class).evaluate(trainer.model)
    assert (after.cross_entropy, after.accuracy) == logged[-1][1:]


def test_vqa_at_the_end_of_a_run_that_stops_early(make_trainer, vqa_holdout, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 1

    make_trainer(max_steps=5, vqa_steps=3, vqa_accuracy=False, vqa_holdout=vqa_holdout, callbacks=[Stop()]).train()
    records = JSONLines(tmp_path / "out" / "metrics.jsonl").read()
    assert [(r["step"], "vqa_accuracy" in r) for r in records if "vqa_cross_entropy" in r] == [(0, False), (1, False)]


def test_lora_on_the_language_model(make_flow_model, make_trainer, tmp_path):
    from peft import LoraConfig, get_peft_model

    def trainer(folder):
        config = LoraConfig(
            r=2, target_modules=r".*language_model.*\.(q_proj|down_proj)", modules_to_save=["action_expert"]
        )
        model = get_peft_model(make_flow_model(), config)
        return make_trainer(
            model=model, max_steps=3, output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=2
        )

    whole = trainer("whole")
    before = weights(whole.model)
    whole.train()
    changed = differing(before, weights(whole.model))
    assert any("lora_A" in name for name in changed)
    assert any("action_expert.modules_to_save" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert isinstance(whole.processing_class, PaliGemmaFlowProcessor)
    groups = JSONLines(tmp_path / "whole" / "projection.jsonl").read()[0]["groups"]
    assert groups == [f"layers.{i}" for i in range(4)]

    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differing(weights(whole.model), weights(resumed.model)) == []
    assert differing(whole.ema.average, resumed.ema.average) == []


def test_half_precision_weights(make_flow_model, make_trainer, tmp_path):
    trainer = make_trainer(model=make_flow_model(torch.bfloat16), save_strategy="steps", save_steps=2)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert {a.dtype for a in trainer.ema.average.values()} == {torch.float32}
    again = make_trainer(model=make_flow_model(torch.bfloat16), max_steps=3, save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.ema.step == 3


def test_predictions(make_trainer, make_libero):
    trainer = make_trainer()
    output = trainer.predict(make_libero("held_out"))
    assert output.label_ids.shape[1:] == (4, 7)
    assert json.dumps(output.metrics["test_loss"])
