"""One training run from arguments alone: data, model, anchor, hold-out, trainer, result."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, set_seed

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.atomic_files import write_text
from hf_aegis.data.vqa import VQACollator
from hf_aegis.evaluation.expert_spectra import ExpertSpectra
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.format_version import FORMAT_KEY, check_format_version, written_version
from hf_aegis.json_files import read_json_object
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.publishing import write_card
from hf_aegis.training.adapters import add_gse, add_lora
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.aegis_trainer import AEGISTrainer
from hf_aegis.training.analysis import Analysis
from hf_aegis.training.checkpoint_writing import naming_folder
from hf_aegis.training.checkpoints import last_complete_checkpoint
from hf_aegis.training.json_lines import finite_json
from hf_aegis.training.resources import ResourceCallback, peak_memory_mb, reset_peak_memory
from hf_aegis.training.run_arguments import RunArguments
from hf_aegis.training.run_inputs import (
    fit_action_tokenizer,
    load_demonstrations,
    load_final_questions,
    load_holdout,
    load_replayed_questions,
)
from hf_aegis.training.run_lock import locked_folder
from hf_aegis.training.run_recipe import RECIPE_FILE, RunRecipe
from hf_aegis.training.run_scores import action_errors, certified_deviations, projection_means, question_scores
from hf_aegis.training.run_upload import push_run
from hf_aegis.training.settling import settle_expert
from hf_aegis.training.unsupported import refuse_after_sharding
from hf_aegis.training.weight_interpolation import WeightPath


RESULT_FILE = "result.json"
_RESULT_KIND = "training result"
ADAPTER_FOLDER = "adapter"
EXPERT_SPECTRA_FILE = "analysis/expert_spectra.json"
_PACKAGES = ("hf-aegis", "torch", "transformers", "accelerate", "peft", "datasets", "h5py", "numpy", "safetensors")


def run_training(
    run: RunArguments,
    args: AEGISConfig,
    illustrate: Callable[[Path], Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """
    Trains and evaluates; continues an interrupted run from its last whole checkpoint, or, where there is none, from
    `args.resume_from_checkpoint`, which may be a run on the Hub.

    The output folder gets everything that the run needs to be repeated: the resolved recipe, versions and data
    fingerprints, metrics as JSON lines, the model with its processor, `result.json`, and a model card. A finished run
    with the same recipe is not run again. With `args.push_to_hub` it is pushed when all that is written, also if it
    was finished before. Of several processes (`torchrun -m hf_aegis train ...`) the main one writes and pushes.

    Args:
        run ([`RunArguments`]): What is trained on what.
        args ([`AEGISConfig`]): How.
        illustrate (`Callable`, *optional*): Given the output folder of a run that will be pushed, puts figures there.
        callbacks (`Sequence[TrainerCallback]`, *optional*): The trainer's, besides its own.

    Returns:
        `dict`: On the final questions, if there are any, `vqa_cross_entropy` and `vqa_accuracy` with their 95 %
        intervals, `vqa_any_match` where all annotators' answers are known, and accuracies by type; on the held-out
        demonstrations `flow_mse` and `action_mse`; with a discrete head `fast_action_mse` and `fast_decode_failures`;
        with interpolated weights `weight_share`, the share of the fine-tuned ones;
        with a reference gradient the means of its figures over training; with a certificate `certificate_layers` (the
        largest deviation of a layer), `certificate_logits` and `certificate_divergence` at the end of training;
        `step_ms` and `step_processor_ms` (medians), `peak_memory_mb` of steps, `phase_memory_mb` by phase
        ([`~training.resources.PHASES`]; of this process, so that what a resumed run did before is left out),
        `trainable_parameters`, `skipped_steps` and
        `unprotected_steps`; and what produced them.

    Raises:
        ValueError: If another process runs in the folder, the folder holds a run with another recipe, or an argument
            does not fit.
        HubUploadError: If the run cannot be pushed. It is finished by then, and the message says how to push it.
    """
    assert args.output_dir is not None
    folder = Path(args.output_dir)
    main = args.process_index == 0
    with locked_folder(folder) if main else contextlib.nullcontext():
        result = _run_in(folder, run, args, callbacks)
        if args.push_to_hub and main:
            if illustrate is not None:
                illustrate(folder)
            repo_id = args.hub_model_id or folder.resolve().name
            write_card(folder, repo_id)
            push_run(
                folder,
                repo_id,
                private=args.hub_private_repo,
                revision=args.hub_revision,
                token=args.hub_token,
                commit_message="Finished run",
            )
        return result


def _run_in(
    folder: Path, run: RunArguments, args: AEGISConfig, callbacks: Sequence[TrainerCallback]
) -> dict[str, Any]:
    run.check()
    if run.gse is not None and args.holds_subspaces:
        raise ValueError(f'preserve="{args.preserve}" holds LoRA\'s adapters alone: it cannot be combined with gse')
    refuse_after_sharding(run, args)
    recipe = RunRecipe.of(run, args)
    if (finished := _finished(folder, recipe)) is not None:
        return finished

    set_seed(args.seed)
    reset_peak_memory()
    source = run.model or str(EMBEDDED_VLM)
    train, held_out = load_demonstrations(run)
    model = PaliGemmaFlowForAction.from_vlm(
        source, dtype=getattr(torch, run.dtype), chunk_size=run.chunk_size, **(run.expert or {})
    )
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        source,
        statistics=train.statistics,
        cameras=train.cameras,
        action_tokenizer=fit_action_tokenizer(run, train),
        state_features=train.state_features,
        pictures=train.pictures,
    )
    anchored = args.needs_anchor or run.certificate_samples > 0
    anchor = ActivationAnchor.from_pretrained(run.anchor) if run.anchor and anchored else None
    # All that is evaluated on, before the training, lest what is wrong with it come out after hours.
    holdout = VQAHoldout(questions, processor) if (questions := load_holdout(run)) else None
    certified = questions[: run.certificate_samples]
    final_questions = load_final_questions(run)
    replayed = load_replayed_questions(run) if args.needs_replay or run.keep_within is not None else None
    if not model.config.flow_gradient_to_vlm and run.fast is None:
        # No loss would reach it.
        model.model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    main = args.process_index == 0
    if main:
        write_text(folder / RECIPE_FILE, recipe.to_yaml())
    analysis = (
        Analysis(folder, run, processor, train, args.per_device_train_batch_size)
        if run.analysis_samples and main
        else None
    )
    if analysis is not None:
        model.to(args.device)  # type: ignore[arg-type]
        analysis.before(model)
    trained: Any = model
    if run.lora is not None:
        trained = add_lora(model, run.lora)
    elif run.gse is not None:
        trained = add_gse(model, run.gse)
    trainer = AEGISTrainer(
        trained,
        args,
        anchor=anchor,
        replay_dataset=replayed if args.needs_replay else None,
        replay_collator=VQACollator(processor),
        vqa_holdout=holdout,
        certificate_batches=_batches(certified, VQACollator(processor), 16) if certified else None,
        data_collator=PaliGemmaFlowCollator(processor, action_tokens=run.fast is not None),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[ResourceCallback(), *callbacks],
    )
    trainer.memory.note("load", peak_memory_mb())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    pretrained = _pretrained(trainer) if run.interpolates else {}
    experts = ExpertSpectra(trained) if run.gse is not None else None
    unfinished = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint if unfinished is None else str(unfinished))
    # The main process writes what all of them read below.
    trainer.accelerator.wait_for_everyone()
    if run.interpolates:
        share = _interpolate(trainer, pretrained, run, VQAHoldout(replayed, processor) if replayed else None)
        if run.settling_steps:
            settle_expert(trainer, run.settling_steps)
    # What is saved below is what is published.
    trainer.non_finite_guard.check_weights(args, trainer.state, trainer.model)
    if isinstance(trainer.model, PeftModel):
        # What is measured is what is saved, rounding included.
        trainer.save_model(str(folder / ADAPTER_FOLDER), _internal_call=True)
        if run.lora is not None:
            trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    # Experts stay on it: what routes cannot be merged.
    policy = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    unchanged = not run.interpolates and run.lora is None
    flow = (_last_evaluation(trainer) if unchanged else None) or trainer.evaluate()
    scores, asked = question_scores(policy, processor, final_questions) if final_questions else ({}, None)
    # The Trainer may replace its callbacks when it resumes.
    resources = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ResourceCallback))
    result = {
        **scores,
        "flow_mse": flow["eval_flow_mse"],
        **action_errors(run, policy, processor, held_out),
        "step_ms": resources.step_ms,
        "step_processor_ms": resources.step_processor_ms,
        "peak_memory_mb": resources.peak_mb,
        "phase_memory_mb": trainer.memory.peaks_mb,
        "trainable_parameters": trainable,
        **(projection_means(folder) if trainer.shield is not None else {}),
        **(certified_deviations(folder) if certified else {}),
        **({"weight_share": share} if run.interpolates else {}),
        "skipped_steps": trainer.non_finite_guard.skipped_steps,
        "unprotected_steps": trainer.unprotected_steps,
        "fingerprints": {
            "train": train.fingerprint,
            "held_out": held_out.fingerprint,
            "vqa": holdout.fingerprint if holdout is not None else None,
            "vqa_final": asked,
            "anchor": anchor.fingerprint.to_dict() if anchor is not None else None,
        },
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
    }
    if analysis is not None:
        analysis.after(policy)
    if experts is not None:
        spectra = finite_json(experts.compare(policy))
        if main:
            (folder / EXPERT_SPECTRA_FILE).parent.mkdir(exist_ok=True)
            write_text(folder / EXPERT_SPECTRA_FILE, json.dumps(spectra))
        # Projector and expert stay as they were trained.
        trainer.model = trainer.model_wrapped = trained.unload()
    # Not to be pushed before the result is there.
    with naming_folder(folder):
        trainer.save_model(str(folder), _internal_call=True)
    result = finite_json(result)
    if main:
        written = {**written_version(_RESULT_KIND), **result}
        write_text(folder / RESULT_FILE, json.dumps(written, indent=2, allow_nan=False))
        write_card(folder)
    return result


def _pretrained(trainer: AEGISTrainer) -> dict[str, torch.Tensor]:
    """
    A copy of the weights that are to go back. Those of LoRA's first matrices stay out: its update starts at zero, and
    goes back to it, by the second ones alone.
    """
    weights = {name: p for name, p in trainer.preservation.weights.items() if ".lora_A." not in name}
    if started := [name for name, p in weights.items() if ".lora_B." in name and bool(p.any())]:
        raise ValueError(
            f"weights go back to the pre-trained ones only where LoRA starts at zero: {started[0]} does not"
        )
    return {name: p.detach().clone() for name, p in weights.items()}


def _interpolate(
    trainer: AEGISTrainer, pretrained: dict[str, torch.Tensor], run: RunArguments, questions: VQAHoldout | None
) -> float:
    """Goes back towards the pre-trained weights, and says how large a share of the way from them is left."""
    path = WeightPath({name: trainer.preservation.weights[name] for name in pretrained}, pretrained)
    if run.weight_interpolation is not None:
        path.go_to(run.weight_interpolation)
        return run.weight_interpolation
    assert run.keep_within is not None and questions is not None

    def loss() -> float:
        entropy = questions.evaluate_cross_entropy(trainer.model).cross_entropy
        assert entropy is not None
        return entropy

    return path.keep_within(loss, run.keep_within)


def _batches(samples: Sequence[Any], collate: Callable[[list[Any]], Any], size: int) -> list[Any]:
    return [collate(list(samples[start : start + size])) for start in range(0, len(samples), size)]


def _last_evaluation(trainer: AEGISTrainer) -> dict[str, float] | None:
    """What was measured after the last step, if anything was."""
    found = [log for log in trainer.state.log_history if "eval_flow_mse" in log]
    return found[-1] if found and found[-1]["step"] == trainer.state.global_step else None


def _finished(folder: Path, recipe: RunRecipe) -> dict[str, Any] | None:
    known = folder / RECIPE_FILE
    if known.exists() and (difference := recipe.difference(known.read_text(encoding="utf-8"))) is not None:
        raise ValueError(
            f"{folder} holds a run with another recipe: {difference}. Choose another output_dir, or delete the folder"
        )
    path = folder / RESULT_FILE
    if not known.exists() or not path.exists():
        return None
    result = read_json_object(path)
    check_format_version(result, _RESULT_KIND, path)
    return {key: value for key, value in result.items() if key != FORMAT_KEY}
