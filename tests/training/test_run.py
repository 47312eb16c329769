"""Whole runs from arguments alone."""

import dataclasses
import gc
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainerCallback

import hf_aegis.training.resources as resources_module
import hf_aegis.training.run as run_module
from hf_aegis.cli.recipe import parse_recipe
from hf_aegis.data import PictureSettings
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training import AEGISConfig, AEGISTrainer, NonFiniteTrainingError
from hf_aegis.training.json_lines import JSONLines
from hf_aegis.training.non_finite_guard import NonFiniteGuard
from hf_aegis.training.resources import ResourceCallback
from hf_aegis.training.run import RunArguments, run_training
from hf_aegis.training.run_lock import locked_folder


RECIPE = Path(__file__).parents[2] / "recipes" / "embedded_aegis.yaml"
EXPERT = {"expert_hidden_size": 16, "expert_num_layers": 1, "expert_num_heads": 2, "expert_intermediate_size": 32}


@pytest.fixture
def anchor_folder(flow_anchor, tmp_path):
    return str(flow_anchor.save_pretrained(tmp_path / "anchor"))


@pytest.fixture
def make_run(demonstrations, anchor_folder):
    def make(**changes):
        defaults = {
            "demonstrations": [demonstrations],
            "anchor": anchor_folder,
            "chunk_size": 4,
            "expert": EXPERT,
            "vqa_samples": 4,
            "vqa_final_samples": 5,
        }
        return RunArguments(**{**defaults, **changes})

    return make


@pytest.mark.parametrize("preserve", ["none", "projection"])
def test_a_run_and_what_it_leaves(make_run, make_args, flow_anchor, tmp_path, preserve):
    out = tmp_path / "out"
    run, args = make_run(), make_args(max_steps=2, preserve=preserve, save_strategy="steps", save_steps=2)
    result = run_training(run, args)
    assert json.loads((out / "result.json").read_text()) == {"format_version": 1, **result}
    assert {"none": 0, "projection": 5}[preserve] == len(
        {"throttle_rate", "energy_shed", "cosine", "alpha", "penalty"} & result.keys()
    )
    assert result["step_ms"] > 0
    assert result["peak_memory_mb"] > 0
    assert set(result["phase_memory_mb"]) == {"load", "forward", "backward", "optimizer", "evaluation"}
    steps = max(result["phase_memory_mb"][name] for name in ("forward", "backward", "optimizer"))
    assert result["peak_memory_mb"] == pytest.approx(steps, rel=0.01)
    assert result["skipped_steps"] == 0
    anchor = result["fingerprints"].pop("anchor")
    assert (anchor is None) if preserve == "none" else (anchor == flow_anchor.fingerprint.to_dict())
    assert set(result["fingerprints"]) == {"train", "held_out", "vqa", "vqa_final"}
    assert len(set(result["fingerprints"].values())) == 4
    result["fingerprints"]["anchor"] = anchor
    assert {"torch", "transformers", "hf-aegis", "python"} <= result["versions"].keys()
    assert set(result["vqa_accuracy_by_type"]) <= {"yes/no", "color", "shape"}

    # The figures are those of what was saved.
    model = PaliGemmaFlowForAction.from_pretrained(out).eval()
    processor = PaliGemmaFlowProcessor.from_pretrained(out)
    # Whoever lets it act has to know.
    assert processor.pictures == PictureSettings(64, 2, "fast")
    assert processor.state_features == ["joint_states", "gripper_states"]
    scores = VQAHoldout(load_easy_vqa("test", 5, seed=0), processor).evaluate(model)
    assert result["vqa_cross_entropy"] == pytest.approx(scores.cross_entropy, rel=1e-6)
    assert result["vqa_accuracy"] == scores.accuracy
    records = JSONLines(out / "metrics.jsonl").read()
    last = [r["eval_loss"] for r in records if "eval_loss" in r][-1]
    assert result["flow_mse"] == pytest.approx(last / model.config.flow_loss_scale)
    assert {"vqa_cross_entropy", "eval_loss", "loss"} <= {key for r in records for key in r}

    if preserve == "projection":
        passes = JSONLines(out / "projection.jsonl").read()
        assert [r["step"] for r in passes] == [1, 2]
        for name in ("throttle_rate", "energy_shed", "cosine", "alpha", "penalty"):
            assert result[name] == pytest.approx(sum(r["summary"][name] for r in passes) / 2), name
        assert result["cosine"] == pytest.approx(sum(sum(r["cosine"]) / len(r["cosine"]) for r in passes) / 2)

    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["preserve"] == preserve if preserve != "projection" else "preserve" not in recipe
    assert recipe["expert"] == EXPERT
    assert recipe["max_steps"] == 2

    # A second call, with the same arguments or equal ones, finds it finished.
    def forbidden(*args, **kwargs):
        raise AssertionError("trained again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AEGISTrainer, "train", forbidden)
        assert run_training(run, args) == result
        assert run_training(make_run(), dataclasses.replace(args)) == result
        for changed_run, changed_args, message in (
            (make_run(vqa_seed=1), {}, "vqa_seed is 0 there and 1 here"),
            (make_run(), {"learning_rate": 0.5}, "learning_rate is 0.01 there and 0.5 here"),
            (make_run(expert={**EXPERT, "expert_num_layers": 2}), {}, "expert is "),
        ):
            with pytest.raises(ValueError, match=f"out holds a run with another recipe: {message}"):
                run_training(changed_run, dataclasses.replace(args, **changed_args))


def test_a_run_whose_last_step_breaks_a_weight_saves_no_model(make_run, make_args, tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(model.parameters()).data.view(-1)[0] = math.nan

    args = make_args(max_steps=2, preserve="none", save_strategy="no", eval_strategy="no")
    with pytest.raises(NonFiniteTrainingError, match=r"not finite any more after step 2, first "):
        run_training(make_run(vqa_samples=0), args, callbacks=[Break()])
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("preserve", ["none", "projection"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(make_run, make_args, tmp_path, preserve):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def arguments(folder):
        # Unaligned: the interruption falls between two logging steps.
        saving = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 5}
        watching = {"vqa_steps": 2, "vqa_accuracy": False}
        return make_run(), make_args(output_dir=str(tmp_path / folder), preserve=preserve, **saving, **watching)

    def figures(result):
        costs = ("step_ms", "step_processor_ms", "peak_memory_mb", "phase_memory_mb")
        return {k: v for k, v in result.items() if k not in costs}

    def records(folder):
        timed = ("train_runtime", "eval_runtime")
        return [r for r in JSONLines(tmp_path / folder / "metrics.jsonl").read() if not set(timed) & r.keys()]

    whole = run_training(*arguments("whole"))

    with pytest.raises(KeyboardInterrupt):
        run_training(*arguments("cut"), callbacks=[Interrupt()])
    assert not (tmp_path / "cut" / "result.json").exists()
    assert [r["step"] for r in records("cut") if "loss" in r] == [2]
    # What a kill in the middle of saving leaves behind is passed over.
    (tmp_path / "cut" / "checkpoint-3").mkdir()
    resumed = run_training(*arguments("cut"))
    assert figures(resumed) == figures(whole)
    assert records("cut") == records("whole")
    assert [r["step"] for r in records("whole") if "loss" in r] == [2, 4, 5]
    if preserve == "projection":
        passes = [JSONLines(tmp_path / folder / "projection.jsonl").read() for folder in ("cut", "whole")]
        assert [r["step"] for r in passes[0]] == [1, 2, 3, 4, 5]
        assert passes[0] == passes[1]

    # Killed between the last checkpoint and the result.
    (tmp_path / "cut" / "result.json").unlink()
    again = run_training(*arguments("cut"))
    assert figures(again) == figures(whole)
    # What trains did not run again; loading and evaluating did.
    for phase in ("forward", "backward", "optimizer"):
        assert again["phase_memory_mb"][phase] == resumed["phase_memory_mb"][phase]
    assert {**again, "phase_memory_mb": None} == {**resumed, "phase_memory_mb": None}
    assert again["step_ms"] > 0
    assert again["peak_memory_mb"] > 0
    json.loads((tmp_path / "cut" / "result.json").read_text(), parse_constant=pytest.fail)


def test_the_embedded_recipe(demonstrations, anchor_folder, tmp_path):
    overrides = {
        "output_dir": str(tmp_path / "out"),
        "anchor": anchor_folder,
        "demonstrations": demonstrations,
        "short_demonstrations": "pad",
        "max_steps": "2",
        "logging_steps": "1",
        "per_device_train_batch_size": "2",
        "vqa_samples": "4",
        "vqa_final_samples": "4",
        "analysis_samples": "2",
        "disable_tqdm": "True",
        "use_cpu": "True",
    }
    words = [word for name, value in overrides.items() for word in (f"--{name}", value)]
    run, args = parse_recipe([RunArguments, AEGISConfig], ["--config", str(RECIPE), *words])
    recipe = yaml.safe_load(RECIPE.read_text())
    for name in recipe.keys() - overrides.keys():
        assert getattr(run if hasattr(run, name) else args, name) == recipe[name], name
    assert (run.anchor, args.max_steps, run.vqa_samples) == (anchor_folder, 2, 4)
    assert args.lr_scheduler_type == "constant_with_warmup"
    assert run_training(run, args)["throttle_rate"] >= 0
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["chunk_size"] == recipe["chunk_size"]
    assert written["eval_steps"] == recipe["eval_steps"]

    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPE.read_text() + "pennalty_scale: 2\n")
    with pytest.raises(ValueError, match="pennalty_scale"):
        parse_recipe([RunArguments, AEGISConfig], ["--config", str(broken)])
    for words, message in (
        (["--dtype", "float33"], "float33"),
        (["--short_demonstrations", "drop"], "drop"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_recipe([RunArguments, AEGISConfig], ["--config", str(RECIPE), *words])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor": None}, "needs an anchor"),
        ({"dtype": "int8"}, "dtype must be one of .*'bfloat16'.*, found 'int8'"),
        ({"dtype": "float16"}, "not supported with float16"),
        ({"short_demonstrations": "drop"}, "short_demonstrations must be one of .*, found 'drop'"),
        ({"vqa_final_samples": -1}, "vqa_final_samples must not be negative, found -1"),
        ({"expert": {"expert_widht": 3}}, "expert_widht"),
        ({"chunk_size": 50}, "short"),
    ],
)
def test_wrong_arguments_are_refused(make_run, make_args, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run_training(make_run(**changes), make_args())


def test_a_run_has_its_folder_to_itself(make_run, make_args, tmp_path):
    out = tmp_path / "out"
    run, args = make_run(vqa_samples=0, vqa_final_samples=0), make_args(max_steps=1, preserve="none")
    with locked_folder(out), pytest.raises(ValueError, match=f"another process is running in {out}"):
        run_training(run, args)
    assert [path.name for path in out.iterdir()] == [".lock"]
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({str(out / '.lock')!r}, 'a'); "
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is running"):
            run_training(run, args)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    # Nothing is left of a process that was killed. Without questions there are no answers.
    result = run_training(run, args)
    assert result["flow_mse"] > 0
    assert not any(name.startswith("vqa") for name in result)
    assert result["fingerprints"]["vqa"] is result["fingerprints"]["vqa_final"] is None


def test_final_questions_that_cannot_be_asked_are_refused_before_the_training(make_run, make_args, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("built a trainer")

    monkeypatch.setattr(run_module, "AEGISTrainer", forbidden)
    for samples, message in ((-1, "vqa_final_samples must not be negative"), (10_000, "max_samples must lie between")):
        with pytest.raises(ValueError, match=message):
            run_training(make_run(vqa_final_samples=samples), make_args())


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures resident memory")
@pytest.mark.parametrize("exists", [True, False])
def test_peak_memory_where_the_system_cannot_start_a_new_measurement(tmp_path, monkeypatch, exists):
    # A folder exists, and cannot be written to, not even by root.
    monkeypatch.setattr(resources_module, "_CLEAR", tmp_path if exists else tmp_path / "missing" / "clear_refs")
    resources_module._can_reset_resident_peak.cache_clear()
    try:
        resources_module.reset_peak_memory()
        assert resources_module.peak_memory_mb() == pytest.approx(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        )
    finally:
        resources_module._can_reset_resident_peak.cache_clear()


def test_what_a_run_costs(make_language_model, make_args, token_dataset):
    class Allocate(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            torch.ones(64 * 2**18)

    def measured(*callbacks):
        resources = ResourceCallback()
        assert math.isnan(resources.step_ms)
        args = make_args(preserve="none", max_steps=3, gradient_accumulation_steps=2)
        trainer = AEGISTrainer(
            make_language_model(), args, train_dataset=token_dataset, callbacks=[resources, *callbacks]
        )
        gc.collect()
        trainer.train()
        return resources

    # What the process has held until now may be let go of in the first training.
    measured()
    small = measured()
    assert len(small.seconds) == 3
    assert all(0 < seconds < 60 for seconds in small.seconds)
    assert small.step_ms == pytest.approx(1e3 * sorted(small.seconds)[1])
    assert small.peak_mb > 50
    large = measured(Allocate())
    if not torch.cuda.is_available():
        assert large.peak_mb >= small.peak_mb + 40


def test_with_a_gradient_scaler_the_guard_stands_aside():
    parameter = torch.nn.Linear(1, 1)
    for fp16, skipped in ((True, 0), (False, 1)):
        guard = NonFiniteGuard()
        parameter.weight.grad = torch.full((1, 1), math.inf)
        args = SimpleNamespace(fp16=fp16, max_skipped_steps=20, world_size=1, device="cpu")
        guard.on_pre_optimizer_step(args, None, None, model=parameter)
        assert guard.skipped_steps == skipped
        assert (parameter.weight.grad is None) == (skipped == 1)
