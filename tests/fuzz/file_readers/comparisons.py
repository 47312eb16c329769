"""Folders of comparisons, as `hf-aegis report` and `hf-aegis compare` read them: all their files as one input."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from file_readers.file_reader import FileReader
from file_readers.packed_folders import FOLDER, pack, unpack
from hf_aegis.publishing.run_record import RunRecord
from hf_aegis.reports.bands import band
from hf_aegis.reports.diagnostics_table import diagnostics_rows
from hf_aegis.reports.drift_plane import drift_plane
from hf_aegis.reports.expert_figures import summed_routing
from hf_aegis.reports.film_strips import filmed_episodes
from hf_aegis.reports.neuron_cosine_figures import summed_counts
from hf_aegis.reports.results_table import csv_table, markdown_table, write_results
from hf_aegis.reports.run_logs import runs_by_condition
from hf_aegis.reports.spectra_figures import mean_concentration, mean_spectra
from hf_aegis.reports.training_curves import conflict_map


_RUN = "runs/aegis/seed_0/"
_GROUPS = ["layers.0", "layers.1"]


def _lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _files() -> dict[str, bytes]:
    """A finished comparison of one run that left everything."""
    suites = {"libero_object": {"success_rate": 0.5}, "libero_spatial": {"success_rate": None}}
    figures = {"load": [0.5, 1.5], "entropy": 0.4, "probability": [0.5, 0.5]}
    episode = {"suite": "libero_object", "task": "pick_up", "start": 0, "seed": 1, "success": True, "steps": 9}
    states = {"before": torch.rand(3, 4), "after": torch.rand(3, 4)}
    spectrum = {"before": [2.0, 1.0], "after": [2.5, 1.0], "update": [0.5, 0.1]}
    losses = {"cross_entropy": [2.0, 1.0], "flow": [1.0, 0.0]}
    objects: dict[str, Any] = {
        "compare.json": {
            **{"format_version": 1, "version": "0.1", "command": "hf-aegis compare", "seeds": [0, 1], "gap": None},
            **{"machine": {"jobs": 2, "threads": 1}, "questions": {"seed": 0}, "libero": {"episodes": 1}},
            **{"anchors": {}, "conditions": {"aegis": {"max_steps": 2}, "naive": {"combiner": "pcgrad"}}},
        },
        "pretrained.json": {
            **{"cross_entropy": 0.1, "accuracy": 0.9, "any_match": None, "fingerprint": "f"},
            **{"by_type": {"color": {"accuracy": 0.8}}, "by_answer_type": {}},
        },
        "failures.json": [{"condition": "naive", "seed": 0, "error": "out of memory"}],
        _RUN + "result.json": {
            **{"format_version": 1, "vqa_accuracy": 0.7, "vqa_accuracy_by_type": {"color": 0.5}, "flow_mse": 0.3},
            **{"fingerprints": {"vqa_final": "f", "train": "t"}, "versions": {"torch": "2"}, "step_ms": None},
        },
        _RUN + "libero.json": {
            **{"episodes": 2, "successes": 1, "crashed": 0, "success_rate": 0.5, "by_suite": suites, "asked": {}},
        },
        _RUN + "neuron_cosines.json": {"edges": [-1, 0, 1], "counts": {"layers.0": [3, 4]}, "steps": [1]},
        _RUN + "analysis/gradient_spectra.json": {
            "samples": 4,
            "layers": [{"name": "layers.0", "matrices": {"q": losses, "k": losses}}],
        },
        _RUN + "analysis/expert_spectra.json": {"layers": [{"name": "layers.0.q", **spectrum}]},
        _RUN + "config.json": {"model_type": "paligemma_flow", "vlm_name_or_path": "org/model"},
    }
    logs = {
        _RUN + "libero.json.episodes.jsonl": _lines({"settings": {}}, {**episode, "wall_s": 0.1}),
        _RUN + "metrics.jsonl": _lines({"step": 0, "vqa_accuracy": 0.9}, {"step": 1, "loss": 0.5, "flow_mse": None}),
        _RUN + "projection.jsonl": _lines(
            {"step": 1, "groups": _GROUPS, "cosine": [0.1, None], "summary": {"cosine": 0.1, "energy_shed": None}}
        ),
        _RUN + "experts.jsonl": _lines({"step": 1, "layers": {"layers.0.q": figures, "layers.1.q": figures}}),
        _RUN + "analysis/hidden_states.safetensors": save(states),
    }
    return {**{name: json.dumps(value).encode() for name, value in objects.items()}, **logs}


def comparison_folder(folder: Path) -> FileReader:
    known = _files()

    def read(data: bytes) -> None:
        unpack(data, folder, known)
        results = write_results(folder)
        markdown_table(results), csv_table(results)
        logs = runs_by_condition(folder, results["runs"])
        filmed_episodes(logs, dict.fromkeys(logs, ""))
        RunRecord.read(folder / _RUN)
        for run in (run for runs in logs.values() for run in runs):
            run.fingerprints()
            _of_each(run.metrics(), lambda records: band([records], "vqa_accuracy"))
            _of_each(run.projection(), partial(_projection, run.folder))
            _of_each(run.experts(), lambda records: summed_routing([records]))
            _of_each(run.neuron_cosines(), lambda found: summed_counts([found]))
            _of_each(run.gradient_spectra(), lambda found: (mean_spectra([found], "flow"), _shares(found)))
            _of_each(run.hidden_states(), partial(_plane, run.folder))
            run.expert_spectra()

    return FileReader([pack(known)], read, folder.name, FOLDER)


def _of_each(found: Any, use: Callable[[Any], Any]) -> None:
    with np.errstate(all="ignore"):
        if found is not None:
            use(found)


def _projection(run: Path, records: Any) -> None:
    try:
        conflict_map([records])
    except ValueError as error:  # what the figure says in its place
        raise ValueError(f"{run}: {error}") from error
    diagnostics_rows({"AEGIS": [[record["summary"] for record in records if record.get("summary")]]})


def _shares(found: Any) -> Any:
    return mean_concentration([found], "cross_entropy", 0.05)


def _plane(run: Path, states: Any) -> None:
    try:
        drift_plane(states["before"], states["after"], states["after"])
    except ValueError as error:  # what the figure says in its place
        raise ValueError(f"{run}: hidden states: {error}") from error


COMPARISON_READERS = {"comparison_folder": comparison_folder}
