"""Checkpoints of trainings, as far as they are looked at before weights are loaded, and what callbacks keep there."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import TrainerControl, TrainerState, TrainingArguments

from file_readers.file_reader import FileReader
from file_readers.packed_folders import FOLDER, pack, unpack
from hf_aegis.gradients import NeuronCosines
from hf_aegis.training.checkpoint_faults import find_fault, has_finite_weights
from hf_aegis.training.neuron_cosine_callback import NeuronCosineCallback
from hf_aegis.training.non_finite_guard import NonFiniteGuard
from hf_aegis.training.resources import PhaseMemory, PhaseMemoryCallback, ResourceCallback


def _callbacks(folder: Path) -> list[Any]:
    shield: Any = None
    cosines = NeuronCosineCallback(shield, str(folder), 1)
    return [NonFiniteGuard(), ResourceCallback(), PhaseMemoryCallback(PhaseMemory()), cosines]


def _files(folder: Path) -> dict[str, bytes]:
    guard, resources, memory, cosines = callbacks = _callbacks(folder)
    guard.skipped_steps, resources.seconds, resources.peak_mb = 1, [0.5, 0.25], 3.5
    memory.peaks_mb = {"forward": 2.5}
    observed = NeuronCosines()
    cosines.observed_steps, cosines.histogram = [1], {"counts": {"layers.0": [1] * observed.bins}}
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}]
    stateful: Any = {type(callback).__name__: callback.state() for callback in callbacks}
    state = {"global_step": 2, "epoch": 0.5, "log_history": records, "stateful_callbacks": stateful}
    parts = {f"model-{name}.safetensors": save({name: torch.rand(3)}) for name in ("a", "b")}
    index = {"metadata": {}, "weight_map": dict(zip("ab", parts, strict=True))}
    torch.save({"state": {}}, folder / "scheduler.pt")
    archives = dict.fromkeys(("optimizer.pt", "scheduler.pt", "rng_state.pth"), (folder / "scheduler.pt").read_bytes())
    objects: dict[str, Any] = {
        "trainer_state.json": state,
        "config.json": {"model_type": "gemma2", "rope": {"kind": None}},
        "model.safetensors.index.json": index,
        "adapter/adapter_config.json": {"peft_type": "LORA"},
    }
    return {**{name: json.dumps(value).encode() for name, value in objects.items()}, **parts, **archives}


def checkpoint(folder: Path) -> FileReader:
    known = _files(folder)
    found = folder / "checkpoint-2"
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")

    def read(data: bytes) -> None:
        unpack(data, found, known)
        if (fault := find_fault(found)) is not None:
            raise ValueError(fault)
        has_finite_weights(found)
        state = TrainerState.load_from_json(str(found / "trainer_state.json"))
        for callback in _callbacks(folder):
            callback.on_train_begin(args, state, TrainerControl())

    return FileReader([pack(known)], read, "checkpoint", FOLDER)


CHECKPOINT_READERS = {"checkpoint": checkpoint}
