"""How `pi0_libero.py` measures a π0, and how it shows it."""

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hf_aegis.anchors import unwrap_model
from hf_aegis.data import LiberoDataset
from hf_aegis.evaluation.evaluating import evaluating
from hf_aegis.functional.flow_matching import sample_timesteps
from hf_aegis.reports.results_table import Column, measured_columns


PACKAGES = ("hf-aegis", "torch", "transformers", "accelerate", "peft", "h5py", "safetensors")
VERSIONS = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
COLUMNS = (
    Column("vqa_cross_entropy", "VQA CE (nats/token)", ".3f"),
    Column("vqa_accuracy", "VQA accuracy (%)", ".1f", 100),
    Column("flow_mse", "held-out flow MSE", ".4f"),
    Column("step_ms", "step (ms)", ".0f"),
    Column("step_processor_ms", "step, processor time (ms)", ".0f"),
    Column("peak_memory_mb", "peak memory (MB)", ".0f"),
    Column("trainable_parameters", "trainable parameters", ",.0f", spread=False),
    Column("throttle_rate", "throttle rate (%)", ".1f", 100),
    Column("energy_shed", "energy shed (%)", ".2f", 100),
)


def flow_error(
    model: torch.nn.Module,
    dataset: LiberoDataset,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    samples: int,
    batch_size: int,
    seed: int = 0,
) -> float:
    """
    Mean squared error of the velocity on evenly spaced chunks, with the same noise and times at every call: of the
    steps before the end of an episode and the dimensions that actions have. π0's own loss counts what they are padded
    with as well.
    """
    config: Any = unwrap_model(model).config
    indices = np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).round().astype(int).tolist()
    generator = torch.Generator().manual_seed(seed)
    squared, count = 0.0, 0
    # Without the mixed precision that accelerate has put on a model in training: the checkpoint was measured without.
    forward: Any = vars(model).get("_original_forward", model)
    with evaluating(model) as device:
        starts = range(0, len(indices), batch_size)
        for start in tqdm(starts, desc="held-out chunks", leave=False, disable=None):
            items = [dataset[index] for index in indices[start : start + batch_size]]
            batch = dict(collate(items))
            actions = batch["actions"]
            batch["noise"] = torch.randn(actions.shape, generator=generator)
            # π0's time runs from actions to noise.
            batch["timestep"] = 1 - sample_timesteps(
                len(items),
                alpha=config.time_sampling_beta_alpha,
                beta=config.time_sampling_beta_beta,
                scale=config.time_sampling_scale,
                offset=config.time_sampling_offset,
                generator=generator,
            )
            velocity = forward(**{name: value.to(device) for name, value in batch.items()}).logits
            error = (velocity.cpu().double() - (batch["noise"] - actions).double()).square()
            real = ~torch.stack([item["action_is_pad"] for item in items])
            dimensions = items[0]["actions"].shape[-1]
            squared += float(error[..., :dimensions][real].sum())
            count += int(real.sum()) * dimensions
    return squared / count


def markdown_table(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """Mean ± standard deviation over seeds, one row per condition."""
    shown = measured_columns(results, columns)
    before = {name: {"mean": value, "std": None, "n": 1} for name, value in results["before"].items()}
    rows = [
        ["condition", "seeds", *(column.header for column in shown)],
        ["---", *["---:"] * (len(shown) + 1)],
        ["before fine-tuning", "", *(column.cell(before.get(column.key), 1) for column in shown)],
    ]
    for name, condition in results["conditions"].items():
        cells = (column.cell(condition["measures"].get(column.key), condition["runs"]) for column in shown)
        rows.append([name, str(condition["runs"]), *cells])
    note = "Mean ± standard deviation (n − 1) over seeds. The error counts no step past the end of an episode."
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{note}\n"
