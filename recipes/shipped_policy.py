"""A policy as it ships: rounded to bfloat16, as few bytes as it takes, and no path of the machine it was made on."""

import json
from pathlib import Path

import torch

from hf_aegis.atomic_files import write_text
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor


_HOW_LOADED = ("is_local", "local_files_only")


def write_policy(run: Path, folder: Path) -> None:
    """
    Writes the model and processor of a run.

    Args:
        run (`Path`): Output folder of `hf-aegis train`.
        folder (`Path`): Where to; exists.
    """
    model = PaliGemmaFlowForAction.from_pretrained(run, dtype=torch.float32).to(torch.bfloat16)
    model.config.vlm_name_or_path = without_machine_paths(model.config.vlm_name_or_path)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    PaliGemmaFlowProcessor.from_pretrained(run).save_pretrained(folder)
    # Several of them ship: without indentation a tokenizer is half as large, and so are the statistics.
    for file in (folder / "tokenizer.json", folder / "processor_config.json"):
        write_text(file, json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")))
    # What says how the tokenizer was loaded says nothing about it.
    settings = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings.read_text()).items() if key not in _HOW_LOADED}
    write_text(settings, json.dumps(kept, indent=2) + "\n")
