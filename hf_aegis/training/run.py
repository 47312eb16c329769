"""One training run from arguments alone: data, model, anchor, hold-out, trainer, result."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM
from hf_aegis.data import LiberoDataset
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.aegis_trainer import AEGISTrainer
from hf_aegis.training.callbacks import mean_summary
from hf_aegis.training.json_lines import PROJECTION_FILE, JSONLines, finite_json
from hf_aegis.training.resources import ResourceCallback


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
        vqa_final_samples (`int`, *optional*): Questions asked after training; by default the whole test split.
    """

    model: str | None = field(default=None, metadata={"help": "PaliGemma to fine-tune; default: the embedded one."})
    demonstrations: list[str] | None = field(default=None, metadata={"help": "LIBERO HDF5; default: embedded."})
    anchor: str | None = field(default=None, metadata={"help": "Folder or Hub id of the anchor."})
    chunk_size: int = field(default=50, metadata={"help": "Actions per chunk."})
    held_out_per_task: int = field(default=1, metadata={"help": "Demonstrations of each task kept for evaluation."})
    short_demonstrations: str = field(default="error", metadata={"help": "'error' or 'pad'."})
    expert: dict[str, Any] | None = field(default=None, metadata={"help": "Fields of PaliGemmaFlowConfig, as JSON."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights."})
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
        `dict`: `vqa_cross_entropy`, `vqa_accuracy` and `vqa_accuracy_by_type` on the final questions, `flow_mse` on
        the held-out demonstrations, `step_ms`, `peak_memory_mb`, and what produced them.

    Raises:
        ValueError: If the folder holds a run with another recipe, or an argument does not fit.
    """
    assert args.output_dir is not None
    folder = Path(args.output_dir)
    recipe = _resolved(run, args)
    if (finished := _finished(folder, recipe)) is not None:
        return finished

    dtype = getattr(torch, run.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must name a floating-point type of torch such as 'bfloat16', found {run.dtype!r}")
    set_seed(args.seed)
    source = run.model or str(EMBEDDED_VLM)
    splits = _datasets(run)
    model = PaliGemmaFlowForAction.from_vlm(source, dtype=dtype, chunk_size=run.chunk_size, **(run.expert or {}))
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        source, statistics=splits["train"].statistics, cameras=splits["train"].cameras
    )
    anchor = ActivationAnchor.from_pretrained(run.anchor) if run.anchor and args.preserve != "none" else None
    holdout = None
    if run.vqa_samples:
        holdout = VQAHoldout(load_easy_vqa("test", run.vqa_samples, seed=run.vqa_seed), processor)
    resources = ResourceCallback()
    trainer = AEGISTrainer(
        model,
        args,
        anchor=anchor,
        vqa_holdout=holdout,
        train_dataset=splits["train"],
        eval_dataset=splits["held_out"],
        processing_class=processor,
        callbacks=[resources],
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False))
    trainer.train(resume_from_checkpoint=True)
    flow = trainer.evaluate()
    final = VQAHoldout(load_easy_vqa("test", run.vqa_final_samples, seed=run.vqa_seed), processor).evaluate(model)
    trainer.save_model(str(folder))
    result = {
        "vqa_cross_entropy": final.cross_entropy,
        "vqa_accuracy": final.accuracy,
        "vqa_accuracy_by_type": {name: score.accuracy for name, score in final.by_type.items()},
        "flow_mse": flow["eval_loss"] / model.config.flow_loss_scale,
        **_costs(resources),
        **(_means(folder) if trainer.shield is not None else {}),
        "skipped_steps": trainer.non_finite_guard.skipped_steps,
        "fingerprints": {
            "train": splits["train"].fingerprint,
            "held_out": splits["held_out"].fingerprint,
            "vqa": holdout.fingerprint if holdout is not None else None,
        },
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
    }
    result = finite_json(result)
    _write(folder / RESULT_FILE, json.dumps(result, indent=2, allow_nan=False))
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


def _costs(resources: ResourceCallback) -> dict[str, float]:
    """Empty where all training was done before an interruption, so that there was no step left to measure."""
    return {"step_ms": resources.step_ms, "peak_memory_mb": resources.peak_mb} if resources.seconds else {}


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


def _write(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".partial")
    staged.write_text(text)
    os.replace(staged, path)
