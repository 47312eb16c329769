"""
Measures what trainings take, in a process of its own: the rise of its resident memory, from before model and trainer
are made, to the highest point of two steps, the second of which finds the optimiser's state. Prints a JSON object with
the bytes of each condition that is named.

The allocator returns what it frees (`MALLOC_MMAP_THRESHOLD_`, set by the caller), and a first training of the same
condition, on one sample, has brought in the libraries' code before. In bfloat16 a training of the same shapes has:
oneDNN compiles a kernel for each shape of a product, and keeps it as long as the process lives.
"""

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from planned_conditions import CONDITIONS, EXPERT, SAMPLES, SIZES, arguments

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.models import PaliGemmaFlowForAction
from hf_aegis.training import AEGISTrainer
from hf_aegis.training.adapters import add_lora
from hf_aegis.training.planning.recipe_workload import RecipeWorkload
from hf_aegis.training.planning.vlm_shapes import vlm_config
from hf_aegis.training.resources import peak_memory_mb, reset_peak_memory


def resident_bytes() -> int:
    """Resident memory after everything that can be given back was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) * 2**10


def random_batch(workload: RecipeWorkload, size: int) -> dict[str, torch.Tensor]:
    """A batch of the shapes that are planned."""
    batch = {name: torch.zeros_like(value) for name, value in workload.batch(size).items()}
    batch["input_ids"][:, : -SIZES.text_tokens] = workload.config.image_token_id
    batch["attention_mask"][:] = 1
    batch["pixel_values"].normal_()
    batch["actions"].normal_()
    return batch


def train(name: str, anchor_folder: Path, samples: int) -> float:
    """Trains for two steps; returns the highest resident memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run, args = arguments(name, folder, samples)
        workload = RecipeWorkload(run, args, vlm_config(None), SIZES)
        reset_peak_memory()
        model: Any = PaliGemmaFlowForAction.from_vlm(str(EMBEDDED_VLM), dtype=torch.float32, **EXPERT)
        if run.lora is not None:
            model = add_lora(model, run.lora)
        anchor = ActivationAnchor.from_pretrained(anchor_folder) if args.needs_anchor else None
        trainer = AEGISTrainer(
            model,
            args,
            anchor=anchor,
            data_collator=lambda rows: random_batch(workload, len(rows)),
            train_dataset=[{}] * (4 * samples),
        )
        trainer.train()
    return peak_memory_mb() * 2**20


def main() -> None:
    torch.set_num_threads(1)
    anchor_folder, names = Path(sys.argv[1]), sys.argv[2:]
    found = {}
    for name in names:
        train(name, anchor_folder, SAMPLES if CONDITIONS[name].get("bf16") else 1)
        before = resident_bytes()
        found[name] = train(name, anchor_folder, SAMPLES) - before
    print(json.dumps(found))


if __name__ == "__main__":
    main()
