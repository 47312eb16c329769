"""One training run from arguments alone: data, model, anchor, hold-out, trainer, result."""

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import yaml
from transformers import set_seed

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM
from hf_aegis.atomic_files import write_text
from hf_aegis.data import LiberoDataset
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.aegis_trainer import AEGISTrainer
from hf_aegis.training.callbacks import mean_summary
from hf_aegis.training.json_lines import PROJECTION_FILE, JSONLines, finite_json
from hf_aegis.training.resources import ResourceCallback
from hf_aegis.training.run_lock import locked_folder


RESULT_FILE = "result.json"
RECIPE_FILE = "recipe.yaml"
_PACKAGES = ("hf-aegis", "torch", "transformers", "accelerate", "peft", "datasets", "h5py", "numpy", "safetensors")


@dataclass
class RunArguments:
    """
    What is trained on what. The arguments of the training itself are those of [`AEGISConfig`].

    Args:
        model (`str`, *optional*): Folder or Hub id of a PaliGemma; by default the embedded one.
        demonstrations (`list[str]`, *optional*): LIBERO HDF5 files or folders; by default the embedded ones.
        anchor (`str`, *optional*): Folder or Hub id of the anchor; needed unless `preserve="none"`.
        chunk_size (`int`, *optional*, defaults to `50`): Actions per chunk.
        held_out_per_task (`int`, *optional*, defaults to `1`): Demonstrations of each task kept for evaluation.
        short_demonstrations (`str`, *optional*, defaults to `"error"`): `"pad"` admits those shorter than a chunk.
        expert (`dict`, *optional*): Fields of [`PaliGemmaFlowConfig`], such as `expert_hidden_size`.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the weights.
        vqa_samples (`int`, *optional*, defaults to `500`): Questions of the hold-out during training; 0 for none.
        vqa_seed (`int`, *optional*, defaults to `0`): Selects them.
        vqa_final_samples (`int`, *optional*):
            Questions asked after training; by default the whole test split, 0 for none.
    """

    model: str | None = field(default=None, metadata={"help": "PaliGemma to fine-tune; default: the embedded one."})
    demonstrations: list[str] | None = field(default=None, metadata={"help": "LIBERO HDF5; default: embedded."})
    anchor: str | None = field(default=None, metadata={"help": "Folder or Hub id of the anchor."})
    chunk_size: int = field(default=50, metadata={"help": "Actions per chunk."})
    held_out_per_task: int = field(default=1, metadata={"help": "Demonstrations of each task kept for evaluation."})
    short_demonstrations: Literal["error", "pad"] = field(
        default="error", metadata={"help": "What those shorter than a chunk are."}
    )
    expert: dict[str, Any] | None = field(default=None, metadata={"help": "Fields of PaliGemmaFlowConfig, as JSON."})
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = field(
        default="float32", metadata={"help": "Dtype of the weights."}
    )
    vqa_samples: int = field(default=500, metadata={"help": "Questions of the hold-out during training."})
    vqa_seed: int = field(default=0, metadata={"help": "Selects them."})
    vqa_final_samples: int | None = field(default=None, metadata={"help": "Questions after training; default: all."})


def run_training(run: RunArguments, args: AEGISConfig) -> dict[str, Any]:
    """
    Trains and evaluates; continues an interrupted run from its last whole checkpoint.

    The output folder gets everything that the run needs to be repeated: the resolved recipe, versions and data
    fingerprints, metrics as JSON lines, the model with its processor, and `result.json`. A finished run with the same
    recipe is not run again.

    Returns:
        `dict`: `vqa_cross_entropy`, `vqa_accuracy` and `vqa_accuracy_by_type` on the final questions, if there are
        any; `flow_mse` on the held-out demonstrations; with the projection the means of its figures over training;
        `step_ms`, `peak_memory_mb` and `skipped_steps`; and what produced them.

    Raises:
        ValueError: If another process runs in the folder, the folder holds a run with another recipe, or an argument
            does not fit.
    """
    assert args.output_dir is not None
    folder = Path(args.output_dir)
    with locked_folder(folder):
        return _run_in(folder, run, args)


def _run_in(folder: Path, run: RunArguments, args: AEGISConfig) -> dict[str, Any]:
    recipe = _resolved(run, args)
    if (finished := _finished(folder, recipe)) is not None:
        return finished

    for name in ("dtype", "short_demonstrations"):
        choices = get_args(get_type_hints(RunArguments)[name])
        if (value := getattr(run, name)) not in choices:
            raise ValueError(f"{name} must be one of {choices}, found {value!r}")
    set_seed(args.seed)
    source = run.model or str(EMBEDDED_VLM)
    splits = _datasets(run)
    model = PaliGemmaFlowForAction.from_vlm(
        source, dtype=getattr(torch, run.dtype), chunk_size=run.chunk_size, **(run.expert or {})
    )
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        source, statistics=splits["train"].statistics, cameras=splits["train"].cameras
    )
    anchor = ActivationAnchor.from_pretrained(run.anchor) if run.anchor and args.preserve != "none" else None
    holdout = _holdout(run.vqa_samples, run.vqa_seed, processor)
    # Before the training, lest what is wrong with it come out after hours.
    final_holdout = _holdout(run.vqa_final_samples, run.vqa_seed, processor)
    trainer = AEGISTrainer(
        model,
        args,
        anchor=anchor,
        vqa_holdout=holdout,
        train_dataset=splits["train"],
        eval_dataset=splits["held_out"],
        processing_class=processor,
        callbacks=[ResourceCallback()],
    )
    write_text(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False))
    trainer.train(resume_from_checkpoint=True)
    flow = trainer.evaluate()
    final = _scores(final_holdout, model) if final_holdout is not None else {}
    trainer.save_model(str(folder))
    # The Trainer may replace its callbacks when it resumes.
    resources = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ResourceCallback))
    result = {
        **final,
        "flow_mse": flow["eval_loss"] / model.config.flow_loss_scale,
        "step_ms": resources.step_ms,
        "peak_memory_mb": resources.peak_mb,
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
    result = finite_json(result)
    write_text(folder / RESULT_FILE, json.dumps(result, indent=2, allow_nan=False))
    return result


def _datasets(run: RunArguments) -> dict[str, LiberoDataset]:
    paths: Any = run.demonstrations or DEMONSTRATIONS
    common: dict[str, Any] = {
        "chunk_size": run.chunk_size,
        "held_out_per_task": run.held_out_per_task,
        "short_demonstrations": run.short_demonstrations,
    }
    train = LiberoDataset(paths, split="train", **common)
    return {"train": train, "held_out": LiberoDataset(paths, split="held_out", statistics=train.statistics, **common)}


def _holdout(samples: int | None, seed: int, processor: PaliGemmaFlowProcessor) -> VQAHoldout | None:
    return None if samples == 0 else VQAHoldout(load_easy_vqa("test", samples, seed=seed), processor)


def _scores(holdout: VQAHoldout, model: PaliGemmaFlowForAction) -> dict[str, Any]:
    result = holdout.evaluate(model)
    return {
        "vqa_cross_entropy": result.cross_entropy,
        "vqa_accuracy": result.accuracy,
        "vqa_accuracy_by_type": {name: score.accuracy for name, score in result.by_type.items()},
    }


def _means(folder: Path) -> dict[str, float]:
    """Means over training of the projection's figures, over every projected backward pass."""
    means = mean_summary(record["summary"] for record in JSONLines(folder / PROJECTION_FILE).read())
    return {name: means[name] for name in ("throttle_rate", "energy_shed", "cosine", "alpha", "penalty") if means}


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
