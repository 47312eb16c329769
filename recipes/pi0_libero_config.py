"""What `pi0_libero.py` is told."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PI0ForConditionalGeneration

from hf_aegis.anchors import SubspaceOptions
from hf_aegis.cli.recipe import check_values, option_types, read_recipe, require_keys
from hf_aegis.data.vqa import VQASample
from hf_aegis.data.vqa_sources import load_vqa
from hf_aegis.training import AEGISConfig


# What a condition may say beside the fields of `AEGISConfig`.
OWN = {"lora": dict[str, Any], "gse": dict[str, Any], "weight_interpolation": float}


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Arguments of `load_vqa`, and how many questions go through the model together."""

    dataset: str
    split: str
    samples: int
    batch_size: int
    seed: int = 0

    def load(self) -> Sequence[VQASample]:
        return load_vqa(self.dataset, self.split, self.samples, self.seed)


@dataclasses.dataclass(frozen=True)
class PI0Study:
    output_dir: str
    model: str
    processor: str
    attn_implementation: str
    demonstrations: list[str] | None
    held_out_per_task: int
    flow_samples: int
    anchored: QuestionsConfig
    holdout: QuestionsConfig
    moments: str
    subspaces: dict[str, Any]
    seeds: list[int]
    training: dict[str, Any]
    conditions: dict[str, Any]

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """
        Raises:
            ValueError: If a key is unknown, missing or has the wrong type, or a value is not allowed; file and key are
                named.
        """
        path = Path(path)
        parts = ("anchored", "holdout")
        raw = read_recipe(path, option_types([cls]) | dict.fromkeys(parts, dict[str, Any]))
        require_keys(cls, raw, str(path))
        for name in parts:
            where = f"{path}: {name}"
            require_keys(QuestionsConfig, check_values(raw[name], option_types([QuestionsConfig]), where), where)
            raw[name] = QuestionsConfig(**raw[name])
        fields = option_types([AEGISConfig])
        check_values(raw["training"], fields, f"{path}: training")
        for name, own in raw["conditions"].items():
            check_values(own, fields | OWN, f"{path}: conditions: {name}")
            if "lora" in own and "gse" in own:
                raise ValueError(f"{path}: conditions: {name}: lora and gse adapt the same layers; choose one")
        study = cls(**raw)
        # What does not fit is to be known before the anchor is collected.
        SubspaceOptions(**study.subspaces)
        for name in study.conditions:
            try:
                study.arguments(name, seed=0)
            except ValueError as error:
                raise ValueError(f"{path}: conditions: {name}: {error}") from error
        return study

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def recipe(self, condition: str) -> dict[str, Any]:
        """All fields of a condition."""
        return {**self.training, **self.conditions[condition]}

    def run_folder(self, condition: str, seed: int) -> Path:
        return self.folder / "runs" / condition / f"seed_{seed}"

    def arguments(self, condition: str, seed: int) -> AEGISConfig:
        fields = {name: value for name, value in self.recipe(condition).items() if name not in OWN}
        folder = str(self.run_folder(condition, seed))
        return AEGISConfig(output_dir=folder, seed=seed, **{"report_to": "none", **fields})

    def load_model(self) -> PI0ForConditionalGeneration:
        return PI0ForConditionalGeneration.from_pretrained(
            self.model,
            # Small steps would be rounded away in bfloat16; `bf16` of the training computes in it.
            dtype=torch.float32,
            attn_implementation=self.attn_implementation,
            use_safetensors=True,
        )
