"""The card of a fine-tuned policy, from its run's files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.hub import is_repo_id, render_card
from hf_aegis.publishing.papers import bibliography
from hf_aegis.publishing.run_record import RunRecord


TEMPLATE = "policy.md"
POLICY_TYPE = "paligemma_flow"

_CAPTIONS = {
    "vqa": "VQA cross-entropy and accuracy on the hold-out over training steps",
    "flow": "Flow-matching error on training batches and on held-out demonstrations over training steps",
    "projection": "What the projection did over training steps, and where gradients were in conflict",
}
_NAMES = {"easy-vqa": "easy-VQA"}


@dataclass(frozen=True)
class CardOptions:
    """
    What a card says besides what its run's files tell.

    Args:
        license (`str`, *optional*): By default that of the base model, where it is known.
        language (`str`, *optional*): Of the questions and instructions.
        tags (`Sequence[str]`, *optional*): Added to the card's own.
        base_model (`str`, *optional*): By default as the model's configuration says.
        datasets (`Sequence[str]`, *optional*): On the Hub; by default those of the run's arguments.
    """

    license: str | None = None
    language: str | None = None
    tags: Sequence[str] = ()
    base_model: str | None = None
    datasets: Sequence[str] | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table of results: texts."""

    measure: str
    before: str
    after: str


def policy_card(record: RunRecord, repo_id: str | None = None, options: CardOptions | None = None) -> str:
    """
    The card of a model that a run has fine-tuned.

    Args:
        record ([`RunRecord`]): What the run's folder tells.
        repo_id (`str`, *optional*): Where it is on the Hub; by default the card speaks of the folder.
        options ([`CardOptions`], *optional*): What it says besides.

    Returns:
        `str`: the text of `README.md`.

    Raises:
        ValueError: If a file of the run is not what it should be.
    """
    options = options or CardOptions()
    base = options.base_model or record.base_model
    name = (repo_id or record.folder.resolve().name).split("/")[-1]
    method = record.method
    papers = [*(method.papers if method else ()), *_architecture_papers(record.config)]
    data = ModelCardData(
        language=options.language,
        license=options.license or base_licence(base),
        # Transformers loads the others by itself.
        library_name="hf_aegis" if is_policy(record.config) else "transformers",
        pipeline_tag="robotics" if is_policy(record.config) else None,
        tags=list(dict.fromkeys(["hf-aegis", *_tags(record.config), *(method.tags if method else ()), *options.tags])),
        base_model=base if is_repo_id(base) else None,
        base_model_relation="finetune" if is_repo_id(base) else None,
        datasets=list(options.datasets) if options.datasets is not None else _datasets(record.arguments),
        model_name=name,
        eval_results=evaluation_results(record) or None,
    )
    return render_card(
        TEMPLATE,
        data,
        name=name,
        source=repo_id or name,
        policy=is_policy(record.config),
        routed=record.arguments.get("gse") is not None,
        base=told_model(base),
        method=method,
        rows=results_table(record),
        questions=told_questions(record.arguments),
        steps=record.steps,
        step_ms=record.result.get("step_ms"),
        trainable=record.result.get("trainable_parameters"),
        projection=_projection(record.result),
        anchor=told_anchor(record),
        figures=[(path, _caption(path)) for path in record.figures],
        cameras=record.processor.get("cameras") or [],
        chunk_size=record.config.get("chunk_size"),
        recipe=told_recipe(record.arguments),
        versions=record.result.get("versions", {}),
        bibliography=bibliography(papers),
    )


def is_policy(config: Mapping[str, Any]) -> bool:
    """Whether a model's configuration is of a [`PaliGemmaFlowForAction`]."""
    return config.get("model_type") == POLICY_TYPE


def base_licence(base: str | None) -> str | None:
    """The licence that a fine-tuned model has from its base model, where this package knows it."""
    if base == EMBEDDED_VLM.name:
        return "apache-2.0"
    return "gemma" if base is not None and base.startswith("google/paligemma") else None


def told_model(base: str | None) -> str:
    """A base model as a card's text says it."""
    if base is None:
        return "a model that its configuration does not name"
    if base == EMBEDDED_VLM.name:
        return f"`{base}`, the small PaliGemma 2 that the package carries (`hf_aegis.assets.EMBEDDED_VLM`)"
    return f"[{base}](https://huggingface.co/{base})" if is_repo_id(base) else f"`{base}`"


def told_anchor(record: RunRecord) -> str | None:
    """The anchor as a card's text says it: where it is, what of, and the hash of the weights it describes."""
    anchor, name = record.anchor, record.arguments.get("anchor")
    if anchor is None:
        return None
    where = (
        f"[{name}](https://huggingface.co/datasets/{name})"
        if is_repo_id(name)
        else f"`{PurePosixPath(name or 'anchor').name}`"
    )
    samples = f"{anchor['num_samples']:,} samples" if anchor.get("num_samples") else "samples"
    source = f" of `{anchor['dataset_id']}`" if anchor.get("dataset_id") else ""
    return f"{where}, from {samples}{source}; layer weights' SHA-256 `{anchor['weights_sha256']}`"


def told_questions(arguments: Mapping[str, Any]) -> str:
    """The questions at the end of a run, as in "2,000 questions of easy-VQA, test split"."""
    name, split = _final_questions(arguments)
    count = arguments.get("vqa_final_samples")
    return f"{f'{count:,}' if count else 'all'} questions of {_NAMES.get(name, name)}, {split} split"


def told_recipe(arguments: Mapping[str, Any]) -> str:
    """A run's arguments as YAML, without those that say nothing."""
    said = {key: value for key, value in arguments.items() if value is not None and key != "output_dir"}
    return yaml.safe_dump(said, sort_keys=False).strip() if said else ""


def results_table(record: RunRecord) -> list[Row]:
    """What was measured before and after, as far as it was."""
    result, before = record.result, record.before
    rows = []
    for key, label, form, scale in (
        ("vqa_cross_entropy", "VQA cross-entropy (nats per token)", ".3f", 1),
        ("vqa_accuracy", "VQA accuracy (%)", ".1f", 100),
    ):
        if result.get(key) is not None:
            interval = [f"{scale * bound:{form}}" for bound in result.get(f"{key}_interval") or ()]
            spread = f" ({' – '.join(interval)})" if interval else ""
            rows.append(Row(label, _number(before.get(key), form, scale), f"{scale * result[key]:{form}}{spread}"))
        elif values := record.logged(key):
            start = _number(values[0], form, scale) if len(values) > 1 else "–"
            rows.append(Row(f"{label}, hold-out during training", start, _number(values[-1], form, scale)))
    for kind, accuracy in (
        result.get("vqa_accuracy_by_answer_type") or result.get("vqa_accuracy_by_type") or {}
    ).items():
        rows.append(Row(f"VQA accuracy (%), {kind}", "–", f"{100 * accuracy:.1f}"))
    logged_flow = record.logged("eval_flow_mse")
    for key, label, form, value in (
        ("flow_mse", "flow MSE on held-out demonstrations", ".4f", logged_flow[-1] if logged_flow else None),
        ("action_mse", "open-loop action MSE there", ".4f", None),
        ("fast_action_mse", "the same of the FAST head", ".4f", None),
        ("fast_decode_failures", "FAST chunks not decodable", ".0f", None),
        ("certificate_logits", "logits' relative deviation from the pre-trained model's", ".4f", None),
        ("certificate_divergence", "divergence from its predictions (nats per token)", ".4f", None),
    ):
        found = result.get(key, value)
        if found is not None:
            rows.append(Row(label, "–", f"{found:{form}}"))
    return rows


def evaluation_results(record: RunRecord) -> list[EvalResult]:
    """The same for the card's metadata: what was measured at the run's end."""
    name, split = _final_questions(record.arguments)
    questions: dict[str, Any] = {
        "task_type": "visual-question-answering",
        "task_name": "Visual question answering after fine-tuning",
        "dataset_type": name,
        "dataset_name": _NAMES.get(name, name),
        "dataset_split": split,
    }
    demonstrations: dict[str, Any] = {
        "task_type": "robotics",
        "task_name": "Action chunks",
        "dataset_type": "libero",
        "dataset_name": "held-out LIBERO demonstrations",
    }
    measures: tuple[tuple[str, dict[str, Any], str, str], ...] = (
        ("vqa_accuracy", questions, "accuracy", "VQA accuracy"),
        ("vqa_cross_entropy", questions, "cross_entropy", "VQA cross-entropy, nats per token"),
        ("flow_mse", demonstrations, "mse", "Flow-matching MSE"),
        ("action_mse", demonstrations, "mse", "Open-loop action MSE"),
    )
    return [
        EvalResult(metric_type=kind, metric_name=label, metric_value=record.result[key], **about)
        for key, about, kind, label in measures
        if record.result.get(key) is not None
    ]


def _final_questions(arguments: Mapping[str, Any]) -> tuple[str, str]:
    name = arguments.get("vqa_final_dataset") or arguments.get("vqa_dataset") or "easy-vqa"
    return PurePosixPath(name).name if name.startswith("/") else name, str(
        arguments.get("vqa_final_split") or arguments.get("vqa_split") or "test"
    )


def _datasets(arguments: Mapping[str, Any]) -> list[str] | None:
    """Sets on the Hub that the model was trained on; questions are not among them, unless they are replayed."""
    replays = arguments.get("reference") in ("replay", "replayed_transport") or bool(
        {"replay", "ewc"} & (arguments.get("penalties") or {}).keys()
    )
    found = [arguments.get("replay_dataset")] if replays else []
    return [name for name in found if name is not None and is_repo_id(name)] or None


def _tags(config: Mapping[str, Any]) -> list[str]:
    return ["robotics", "vision-language-action", "flow-matching"] if is_policy(config) else []


def _architecture_papers(config: Mapping[str, Any]) -> list[str]:
    if not is_policy(config):
        return []
    second = (config.get("text_config") or {}).get("model_type") == "gemma2"
    return ["2412.03555" if second else "2407.07726", "2210.02747", "2410.24164"]


def _projection(result: Mapping[str, Any]) -> str | None:
    """What the combiner did on average."""
    if result.get("throttle_rate") is None:
        return None
    return (
        f"In {100 * result['throttle_rate']:.1f} % of groups and steps the gradients were in conflict; "
        f"{100 * result['energy_shed']:.2f} % of the task gradient's energy was removed."
    )


def _caption(path: str) -> str:
    stem = PurePosixPath(path).stem
    return next((text for start, text in _CAPTIONS.items() if stem.startswith(start)), stem.replace("_", " "))


def _number(value: float | None, form: str, scale: float) -> str:
    return "–" if value is None else f"{scale * value:{form}}"
