"""One training run from arguments alone: data, model, anchor, hold-out, trainer, result."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftModel
from transformers import set_seed

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM
from hf_aegis.atomic_files import write_text
from hf_aegis.data import LiberoDataset
from hf_aegis.data.fast_tokenizer import FASTTokenizer
from hf_aegis.data.vqa import VQACollator, VQASample
from hf_aegis.data.vqa_sources import load_vqa
from hf_aegis.evaluation.open_loop import open_loop_error
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training.adapters import add_lora
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.aegis_trainer import AEGISTrainer
from hf_aegis.training.analysis import Analysis
from hf_aegis.training.callbacks import mean_summary
from hf_aegis.training.json_lines import PROJECTION_FILE, JSONLines, finite_json
from hf_aegis.training.resources import ResourceCallback
from hf_aegis.training.run_arguments import RunArguments
from hf_aegis.training.run_lock import locked_folder
from hf_aegis.training.weight_interpolation import interpolate_weights


RESULT_FILE = "result.json"
RECIPE_FILE = "recipe.yaml"
ADAPTER_FOLDER = "adapter"
_PACKAGES = ("hf-aegis", "torch", "transformers", "accelerate", "peft", "datasets", "h5py", "numpy", "safetensors")


def run_training(run: RunArguments, args: AEGISConfig) -> dict[str, Any]:
    """
    Trains and evaluates; continues an interrupted run from its last whole checkpoint.

    The output folder gets everything that the run needs to be repeated: the resolved recipe, versions and data
    fingerprints, metrics as JSON lines, the model with its processor, and `result.json`. A finished run with the same
    recipe is not run again.

    Returns:
        `dict`: `vqa_cross_entropy`, `vqa_accuracy` and `vqa_accuracy_by_type` on the final questions, if there are
        any; `flow_mse` and `action_mse` on the held-out demonstrations; with a discrete head `fast_action_mse` and
        `fast_decode_failures`; with a reference gradient the means of its figures over training; `step_ms`,
        `peak_memory_mb`, `trainable_parameters` and `skipped_steps`; and what produced them.

    Raises:
        ValueError: If another process runs in the folder, the folder holds a run with another recipe, or an argument
            does not fit.
    """
    assert args.output_dir is not None
    folder = Path(args.output_dir)
    with locked_folder(folder):
        return _run_in(folder, run, args)


def _run_in(folder: Path, run: RunArguments, args: AEGISConfig) -> dict[str, Any]:
    run.check()
    recipe = _resolved(run, args)
    if (finished := _finished(folder, recipe)) is not None:
        return finished

    set_seed(args.seed)
    source = run.model or str(EMBEDDED_VLM)
    splits = _datasets(run)
    model = PaliGemmaFlowForAction.from_vlm(
        source, dtype=getattr(torch, run.dtype), chunk_size=run.chunk_size, **(run.expert or {})
    )
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        source,
        statistics=splits["train"].statistics,
        cameras=splits["train"].cameras,
        action_tokenizer=None if run.fast is None else _fit_action_tokenizer(splits["train"], run.fast),
    )
    anchor = ActivationAnchor.from_pretrained(run.anchor) if run.anchor and args.needs_anchor else None
    # All that is evaluated on, before the training, lest what is wrong with it come out after hours.
    holdout = _holdout(run, processor, final=False)
    final_holdout = _holdout(run, processor, final=True)
    replay = _questions(run.replay_dataset, run.replay_split, run.replay_samples, run) if args.needs_replay else None
    analysis = Analysis(folder, run, processor, splits["train"]) if run.analysis_samples else None
    if analysis is not None:
        analysis.before(model)
    trainer = AEGISTrainer(
        model if run.lora is None else add_lora(model, run.lora),
        args,
        anchor=anchor,
        replay_dataset=replay,
        replay_collator=VQACollator(processor),
        vqa_holdout=holdout,
        data_collator=PaliGemmaFlowCollator(processor, action_tokens=run.fast is not None),
        train_dataset=splits["train"],
        eval_dataset=splits["held_out"],
        processing_class=processor,
        callbacks=[ResourceCallback()],
    )
    policy = trainer.model
    shared = trainer.preservation.weights
    pretrained = (
        {name: p.detach().clone() for name, p in shared.items()} if run.weight_interpolation is not None else {}
    )
    write_text(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False))
    trainer.train(resume_from_checkpoint=True)
    if run.weight_interpolation is not None:
        interpolate_weights(shared, pretrained, run.weight_interpolation)
    flow = trainer.evaluate()
    # The Trainer may replace its callbacks when it resumes.
    resources = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ResourceCallback))
    result = {
        **(_scores(final_holdout, policy) if final_holdout is not None else {}),
        "flow_mse": flow["eval_flow_mse"],
        **_action_errors(run, policy, processor, splits["held_out"]),
        "step_ms": resources.step_ms,
        "peak_memory_mb": resources.peak_mb,
        "trainable_parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        **(_means(folder) if trainer.shield is not None else {}),
        "skipped_steps": trainer.non_finite_guard.skipped_steps,
        "fingerprints": {
            "train": splits["train"].fingerprint,
            "held_out": splits["held_out"].fingerprint,
            "vqa": holdout.fingerprint if holdout is not None else None,
            "vqa_final": final_holdout.fingerprint if final_holdout is not None else None,
            "anchor": anchor.fingerprint.to_dict() if anchor is not None else None,
        },
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
    }
    if analysis is not None:
        analysis.after(policy)
    _save(trainer, processor, folder)
    result = finite_json(result)
    write_text(folder / RESULT_FILE, json.dumps(result, indent=2, allow_nan=False))
    return result


def _save(trainer: AEGISTrainer, processor: PaliGemmaFlowProcessor, folder: Path) -> None:
    """The model with its processor; of one with adapters those apart, and the model that they are merged into."""
    if isinstance(trainer.model, PeftModel):
        trainer.save_model(str(folder / ADAPTER_FOLDER))
        trainer.model.merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))


def _datasets(run: RunArguments) -> dict[str, LiberoDataset]:
    paths: Any = run.demonstrations or DEMONSTRATIONS
    common: dict[str, Any] = {
        "chunk_size": run.chunk_size,
        "held_out_per_task": run.held_out_per_task,
        "short_demonstrations": run.short_demonstrations,
    }
    train = LiberoDataset(paths, split="train", **common)
    return {"train": train, "held_out": LiberoDataset(paths, split="held_out", statistics=train.statistics, **common)}


def _fit_action_tokenizer(dataset: LiberoDataset, options: dict[str, Any]) -> FASTTokenizer:
    if unknown := sorted(set(options) - {"scale", "vocab_size"}):
        raise ValueError(f"fast: unknown key {unknown[0]!r}, expected some of ['scale', 'vocab_size']")
    return FASTTokenizer.fit(list(dataset.action_chunks()), **options)


def _questions(dataset: str, split: str, samples: int | None, run: RunArguments) -> Sequence[VQASample]:
    return load_vqa(dataset, split, samples, seed=run.vqa_seed)


def _holdout(run: RunArguments, processor: PaliGemmaFlowProcessor, final: bool) -> VQAHoldout | None:
    samples = run.vqa_final_samples if final else run.vqa_samples
    if samples == 0:
        return None
    dataset, split = run.vqa_dataset, run.vqa_split
    if final:
        dataset, split = run.vqa_final_dataset or dataset, run.vqa_final_split or split
    return VQAHoldout(_questions(dataset, split, samples, run), processor)


def _action_errors(
    run: RunArguments, policy: Any, processor: PaliGemmaFlowProcessor, dataset: LiberoDataset
) -> dict[str, Any]:
    """Open-loop errors of the flow expert and, where there is one, of the discrete head."""
    if run.action_samples == 0:
        return {}
    indices = np.linspace(0, len(dataset) - 1, min(run.action_samples, len(dataset))).round().astype(int).tolist()
    collator = PaliGemmaFlowCollator(processor)
    errors: dict[str, Any] = {}
    errors["action_mse"] = open_loop_error(policy, dataset, collator, indices)["action_mse"]
    if run.fast is not None:
        options: dict[str, Any] = {"head": "fast", "action_tokenizer": processor.action_tokenizer}
        discrete = open_loop_error(policy, dataset, collator, indices, **options)
        errors["fast_action_mse"], errors["fast_decode_failures"] = discrete["action_mse"], discrete["failures"]
    return errors


def _scores(holdout: VQAHoldout, model: torch.nn.Module) -> dict[str, Any]:
    result = holdout.evaluate(model)
    return {
        "vqa_cross_entropy": result.cross_entropy,
        "vqa_accuracy": result.accuracy,
        "vqa_accuracy_by_type": {name: score.accuracy for name, score in result.by_type.items()},
    }


def _means(folder: Path) -> dict[str, float]:
    """Means over training of the projection's figures, over every projected backward pass."""
    means = mean_summary(record["summary"] for record in JSONLines(folder / PROJECTION_FILE).read())
    figures = ("throttle_rate", "energy_shed", "cosine", "alpha", "penalty", "replay_loss")
    return {name: means[name] for name in figures if name in means}


def _resolved(run: RunArguments, args: AEGISConfig) -> dict[str, Any]:
    """Both groups of arguments; of the training's only what differs from the defaults."""
    defaults = AEGISConfig(output_dir=args.output_dir)
    changed = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(args)
        # A recipe is for others to read.
        if f.init and not f.name.endswith("_token") and getattr(args, f.name) != getattr(defaults, f.name)
    }
    # Through JSON, so that what is compared with a recipe read from disk has the types it would have there.
    return json.loads(json.dumps({**dataclasses.asdict(run), "output_dir": args.output_dir, **changed}, default=str))


def _finished(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    known = folder / RECIPE_FILE
    if known.exists():
        earlier = yaml.safe_load(known.read_text())
        if different := sorted(k for k in earlier.keys() | recipe.keys() if earlier.get(k) != recipe.get(k)):
            key = different[0]
            raise ValueError(
                f"{folder} holds a run with another recipe: {key} is {earlier.get(key)!r} there and "
                f"{recipe.get(key)!r} here. Choose another output_dir, or delete the folder"
            )
    result = folder / RESULT_FILE
    return json.loads(result.read_text()) if known.exists() and result.exists() else None
