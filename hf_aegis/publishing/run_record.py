"""What a run's folder tells of it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_aegis.format_version import check_format_version
from hf_aegis.json_files import read_json_object, require_keys
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.publishing.methods import Method, describe_method
from hf_aegis.yaml_files import read_yaml


@dataclass(frozen=True)
class RunRecord:
    """
    All that a card says of a run. Nothing in it names a path of this machine.

    Args:
        folder (`Path`): The output folder.
        arguments (`dict[str, Any]`): What was asked for, as in `recipe.yaml`.
        config (`dict[str, Any]`): The model's `config.json`.
        processor (`dict[str, Any]`): Its `processor_config.json`.
        result (`dict[str, Any]`): What was measured at the end, as in `result.json`; may be empty.
        metrics (`list[dict[str, Any]]`): What was logged, as in `metrics.jsonl`.
        before (`dict[str, float]`): `vqa_cross_entropy` and `vqa_accuracy` of the pre-trained model on the questions
            that were asked at the end, where it was asked them; may be empty.
        anchor (`dict[str, Any]`, *optional*): The anchor's fingerprint.
    """

    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    anchor: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path, **known: Any) -> Self:
        """
        Reads the folder of a run, of any training with [`AEGISTrainer`], or of a model alone.

        Args:
            folder (`Path`): The folder.
            known: Fields that are known already, and not read.

        Raises:
            ValueError: If a file is not JSON or YAML, or has a newer format; it is named.
        """
        result = known.get("result", _read(folder / "result.json"))
        place, mappings = folder / "result.json", (dict, type(None))
        check_format_version(result, "training result", place)
        require_keys(dict(result), {"fingerprints": mappings, "versions": mappings}, place)
        fingerprints = result.get("fingerprints") or {}
        found = {
            "arguments": _read(folder / "recipe.yaml"),
            "config": _read(folder / "config.json"),
            "processor": _read(folder / "processor_config.json"),
            "result": result,
            "metrics": _read_lines(folder / "metrics.jsonl"),
            "before": _before(folder, fingerprints.get("vqa_final")),
            "anchor": fingerprints.get("anchor"),
        }
        return cls(folder, **without_machine_paths({**found, **known}))

    @property
    def method(self) -> Method | None:
        """How knowledge was kept; `None` of a model whose training is not known."""
        if not self.arguments:
            return None
        from hf_aegis.training.aegis_config import AEGISConfig

        defaults = {f.name: f.default for f in dataclasses.fields(AEGISConfig)}
        return describe_method({**defaults, **self.arguments})

    @property
    def base_model(self) -> str | None:
        """What the model was fine-tuned from: an id on the Hub, or a name."""
        return self.config.get("vlm_name_or_path") or self.config.get("_name_or_path")

    @property
    def figures(self) -> list[str]:
        """Figures in the folder, by their paths in it."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob("figures/*.png"))

    @property
    def steps(self) -> int | None:
        """Optimiser steps that were logged."""
        return max((record["step"] for record in self.metrics), default=None)

    def logged(self, key: str) -> list[float]:
        """Every value of a figure that was logged, in order."""
        return [record[key] for record in self.metrics if record.get(key) is not None]


def _before(folder: Path, questions: str | None) -> dict[str, float]:
    """The pre-trained model's scores, where the run is one of a comparison, which asked it the same questions."""
    path = folder.resolve().parent.parent.parent / "pretrained.json"
    scores = _read(path)
    if questions is None or scores.get("fingerprint") != questions:
        return {}
    return {f"vqa_{key}": scores[key] for key in ("cross_entropy", "accuracy") if scores.get(key) is not None}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_json_object(path) if path.suffix == ".json" else read_yaml(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds {type(found).__name__}, expected a mapping")
    return dict(found)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    from hf_aegis.training.json_lines import JSONLines

    return JSONLines(path).read() if path.is_file() else []
