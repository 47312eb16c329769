"""What the Hub checks of a card before it takes it: the front matter has to be YAML of known fields' types."""

import yaml

from loopback_hub.server import Answer, Request
from loopback_hub.store import Store


_LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "gemma", "other", "unknown"}
_TEXTS = ("library_name", "pipeline_tag", "pretty_name", "license_name", "license_link", "title", "emoji", "sdk")
_SIZES = {"n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"}
_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}


def validate(store: Store, request: Request) -> Answer:
    wanted = request.json()
    errors, warnings = check_metadata(wanted["content"], wanted.get("repoType", "model"))
    body = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return Answer.of(body, 400 if errors else 200)


def check_metadata(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    parts = content.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"], []
    if not isinstance(found, dict):
        return ["the metadata must be a mapping"], []
    errors = [f'"{name}" must be a string' for name in _TEXTS if not isinstance(found.get(name, ""), str)]
    for name in ("tags", "datasets", "models", "base_model", "language", "task_categories", "license"):
        values = found.get(name, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{name}" must be a string or an array of strings')
    for name, known in (
        ("license", _LICENSES),
        ("size_categories", _SIZES),
        ("base_model_relation", _RELATIONS),
        ("colorFrom", _COLOURS),
        ("colorTo", _COLOURS),
    ):
        values = found.get(name, [])
        unknown = [value for value in (values if isinstance(values, list) else [values]) if value not in known]
        if unknown:
            errors.append(f'"{name}" must be one of {sorted(known)}, found {unknown}')
    if found.get("license") == "other" and "license_name" not in found:
        errors.append('"license_name" is required where "license" is "other"')
    for model in found.get("model-index", []):
        for result in model.get("results", []):
            if not (result.get("task", {}).get("type") and result.get("dataset", {}).get("type")):
                errors.append('"model-index" needs the types of task and dataset of each result')
    for configuration in found.get("configs", []):
        if not {"config_name", "data_files"} <= set(configuration):
            errors.append('"configs" needs "config_name" and "data_files"')
    if kind == "space" and len(str(found.get("short_description", ""))) > 60:
        errors.append('"short_description" must have 60 characters at most')
    if kind == "space" and found.get("sdk") not in ("gradio", "docker", "static"):
        errors.append('"sdk" must be one of gradio, docker, static')
    return errors, []
