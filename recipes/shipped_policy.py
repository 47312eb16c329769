"""A policy as it ships: rounded to bfloat16, as few bytes as it takes, and no path of the machine it was made on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_aegis.atomic_files import write_text
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.evaluation.vqa import VQAHoldout
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


def same_questions(policy: Path, before: Mapping[str, Any], result: Mapping[str, Any]) -> VQAHoldout:
    """
    The questions that were asked before a run and at its end, for the policy that ships.

    Args:
        policy (`Path`): Its folder.
        before (`Mapping`): The comparison's `pretrained.json`.
        result (`Mapping`): The run's `result.json`.

    Raises:
        ValueError: If this installation of easy-vqa has other questions.
    """
    questions = load_easy_vqa(before["split"], before["max_samples"], before["seed"])
    holdout = VQAHoldout(questions, PaliGemmaFlowProcessor.from_pretrained(policy))
    if not holdout.fingerprint == before["fingerprint"] == result["fingerprints"]["vqa_final"]:
        raise ValueError("the questions that were asked are not those of this installation of easy-vqa")
    return holdout
