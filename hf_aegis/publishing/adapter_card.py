"""The card of an adapter (LoRA, or routed experts), from its configuration and the run that it is of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.hub import is_repo_id, render_card
from hf_aegis.json_files import read_json_object
from hf_aegis.machine_paths import portable_name
from hf_aegis.publishing.papers import arxiv_link, bibliography
from hf_aegis.publishing.policy_card import (
    CardOptions,
    base_licence,
    evaluation_results,
    is_policy,
    results_table,
    told_anchor,
    told_model,
    told_questions,
    told_recipe,
)
from hf_aegis.publishing.run_record import RunRecord


TEMPLATE = "adapter.md"
ADAPTER_CONFIG = "adapter_config.json"

_KINDS = {"LORA": ("LoRA", "2106.09685"), "GSE": ("VLA-GSE", "2605.06175")}
_SIZES = ("r", "lora_alpha", "num_experts", "num_generalized", "top_k")


def adapter_card(
    folder: Path,
    repo_id: str | None = None,
    options: CardOptions | None = None,
    record: RunRecord | None = None,
    subfolder: str | None = None,
) -> str:
    """
    The card of an adapter's folder. Where it lies in the output folder of a run, the card has that run's figures.

    Args:
        folder (`Path`): With `adapter_config.json`.
        repo_id (`str`, *optional*): Where it is on the Hub; by default the card speaks of the folder.
        options ([`CardOptions`], *optional*): What it says besides.
        record ([`RunRecord`], *optional*): The run; by default what the folder tells, or the one it lies in.
        subfolder (`str`, *optional*): Where in that repository it is; by default at its root.

    Returns:
        `str`: the text of `README.md`.

    Raises:
        ValueError: If a file is not what it should be.
    """
    options = options or CardOptions()
    folder = folder.resolve()
    config = read_json_object(folder / ADAPTER_CONFIG)
    record = record or RunRecord.read(folder if (folder / "recipe.yaml").exists() else folder.parent)
    noted = config.get("base_model_name_or_path")
    base = options.base_model or (portable_name(noted) if noted else record.base_model)
    kind, paper = _KINDS.get(config["peft_type"], (config["peft_type"], None))
    name = (repo_id or f"{folder.parent.name}-{folder.name}").split("/")[-1]
    own_run = is_policy(record.config)
    method = record.method
    papers = [*(method.papers if method else ()), *([paper] if paper else [])]
    data = ModelCardData(
        language=options.language,
        license=options.license or base_licence(base),
        library_name="peft",
        pipeline_tag="robotics" if own_run else None,
        tags=list(dict.fromkeys(["hf-aegis", kind.lower(), *(method.tags if method else ()), *options.tags])),
        base_model=base if is_repo_id(base) else None,
        base_model_relation="adapter" if is_repo_id(base) else None,
        model_name=name,
        eval_results=evaluation_results(record) or None,
    )
    return render_card(
        TEMPLATE,
        data,
        name=name,
        source=repo_id or name,
        subfolder=subfolder,
        kind=kind,
        paper=arxiv_link(paper) if paper else None,
        base=told_model(base),
        base_import="from hf_aegis.assets import EMBEDDED_VLM" if base == EMBEDDED_VLM.name else None,
        base_source="EMBEDDED_VLM" if base == EMBEDDED_VLM.name else f'"{base}"',
        expert=_expert(record.config) if own_run else None,
        sizes={key: config[key] for key in _SIZES if config.get(key) is not None},
        trained_in_full=config.get("modules_to_save") or [],
        routes=config["peft_type"] == "GSE" and config.get("num_generalized") != config.get("num_experts"),
        method=method,
        rows=results_table(record),
        questions=told_questions(record.arguments),
        anchor=told_anchor(record),
        recipe=told_recipe(record.arguments),
        bibliography=bibliography(papers),
    )


def _expert(config: Mapping[str, Any]) -> str:
    """The keywords with which the base model gets the action expert that the adapter's weights fit."""
    from hf_aegis.models import PaliGemmaFlowConfig

    fields = [name for name in PaliGemmaFlowConfig.__annotations__ if not name.startswith("vlm_")]
    changed = {
        name: config[name]
        for name in fields
        if name in config and config[name] != getattr(PaliGemmaFlowConfig, name, None)
    }
    # The base model may be stored in another than it was trained in.
    dtype = f', dtype="{config["dtype"]}"' if config.get("dtype") else ""
    return dtype + "".join(f", {name}={value!r}" for name, value in changed.items())
