"""Folders of comparisons as `hf-aegis compare` leaves them, with invented but plausible logs."""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


# Condition -> VQA cross-entropy at the end, accuracy at the end, held-out flow MSE at the end.
OUTCOMES = {
    "naive": (1.40, 0.61, 0.332),
    "stop_gradient": (0.007, 0.997, 0.352),
    "stop_gradient_fast": (0.05, 0.985, 0.349),
    "lora": (0.10, 0.96, 0.341),
    "aegis": (0.84, 0.71, 0.328),
    "aegis_lora": (0.09, 0.965, 0.343),
    "ewc": (0.12, 0.95, 0.338),
    "l2sp": (0.20, 0.92, 0.336),
    "feature_distillation": (0.15, 0.94, 0.340),
    "a_gem": (0.11, 0.957, 0.333),
    "pcgrad": (0.10, 0.960, 0.334),
    "graddrop": (0.30, 0.89, 0.339),
    "cotrain": (0.02, 0.992, 0.331),
    "weight_interpolation": (0.35, 0.87, 0.345),
    "vla_gse": (0.12, 0.955, 0.338),
    "aegis_vla_gse": (0.10, 0.960, 0.340),
}
ABLATIONS = {
    "aegis_global": (1.1, 0.66, 0.331),
    "aegis_tensor": (0.8, 0.72, 0.329),
    "aegis_image_tokens": (0.9, 0.70, 0.330),
    "aegis_text_tokens": (1.0, 0.69, 0.333),
    "aegis_pooled": (0.85, 0.71, 0.327),
    "aegis_50_samples": (0.95, 0.69, 0.331),
    "aegis_300_samples": (0.86, 0.715, 0.3285),
    "aegis_eps_10": (0.9, 0.70, 0.328),
    "aegis_eps": (1.2, 0.64, 0.331),
    "transport_loss": (0.25, 0.90, 0.334),
    "transport_loss_10": (0.10, 0.96, 0.337),
}
PROJECTED = (
    *("aegis", "aegis_lora", "aegis_vla_gse", "a_gem", "pcgrad", "graddrop"),
    *(name for name in ABLATIONS if name.startswith("aegis")),
)
STEPS = 120
BEFORE = {"cross_entropy": 0.007, "accuracy": 0.997}
TYPES = ("color", "shape", "yes/no")


def groups(layers: int) -> list[str]:
    return [*(f"layers.{index}" for index in range(layers)), "embeddings", "multi_modal_projector"]


def metrics(outcome: Sequence[float], random: np.random.Generator, condition: str) -> list[dict[str, Any]]:
    """A log with every kind of record that training writes, not every key in each."""
    cross_entropy, accuracy, flow = outcome
    records: list[dict[str, Any]] = [
        {"step": 0, "vqa_cross_entropy": BEFORE["cross_entropy"], "vqa_accuracy": BEFORE["accuracy"]}
    ]
    late = random.uniform(0.5, 1.5)
    for step in range(5, STEPS + 1, 5):
        progress = (step / STEPS) ** late
        mse = flow + 0.8 * math.exp(-step / 15) + random.normal(0, 0.02)
        record = {"step": step, "loss": 10 * mse, "flow_mse": mse, "learning_rate": 1e-3, "grad_norm": 1.0}
        if condition in PROJECTED:
            record |= {key: value for key, value in summary(random, condition).items() if "norm" not in key}
        records.append(record)
        if step % 10 == 0:
            drift = {
                "vqa_cross_entropy": 0.007 + progress * cross_entropy * random.uniform(0.8, 1.2),
                "vqa_accuracy": min(1.0, 0.997 - progress * (0.997 - accuracy) * random.uniform(0.9, 1.1)),
            }
            records.append({"step": step, **drift})
        if step % 40 == 0:
            held_out = flow + 0.3 * math.exp(-step / 20) + random.normal(0, 0.002)
            records.append({"step": step, "eval_loss": 10 * held_out, "eval_flow_mse": held_out})
    # The evaluation after training repeats the last step.
    return [*records, {"step": STEPS, "train_runtime": 3.0}, records[-1]]


def summary(random: np.random.Generator, condition: str) -> dict[str, float]:
    figures = {
        "throttle_rate": random.uniform(0.2, 0.7),
        "energy_shed": random.uniform(0.001, 0.02),
        "cosine": random.normal(0, 0.05),
        "alpha": -random.uniform(0, 0.01),
        "vlm_grad_norm": random.uniform(0.2, 0.6),
    }
    replays = condition in ("a_gem", "pcgrad", "graddrop")
    return figures | ({"replay_loss": random.uniform(0, 0.2)} if replays else {"penalty": random.uniform(8, 12)})


def projection(random: np.random.Generator, condition: str, layers: int) -> list[dict[str, Any]]:
    names = groups(layers)
    lasting = random.normal(0, 0.05, len(names))
    records = []
    for step in range(1, STEPS + 1):
        # A group without a finite gradient is missing from a step.
        present = names[1:] if step % 50 == 0 else names
        cosines = (lasting + random.normal(0, 0.05, len(names)))[-len(present) :]
        records.append(
            {"step": step, "groups": present, "cosine": cosines.tolist(), "summary": summary(random, condition)}
        )
    return records


def neuron_cosines(random: np.random.Generator, layers: int) -> dict[str, Any]:
    edges = np.linspace(-1, 1, 201)
    counts = {
        name: np.histogram(random.normal(0.02 * math.sin(index), 0.08, 4000), edges)[0].tolist()
        for index, name in enumerate(groups(layers))
    }
    return {"edges": edges.tolist(), "counts": counts, "steps": [1, 51, 101]}


def gradient_spectra(random: np.random.Generator, layers: int) -> dict[str, Any]:
    names = {"self_attn.q_proj": 40, "self_attn.k_proj": 20, "mlp.down_proj": 64}

    def values(size: int, decay: float) -> list[float]:
        index = np.arange(size)
        return (random.uniform(0.5, 2) * np.exp(-decay * index / size - 0.3 * np.sqrt(index))).tolist()

    return {
        "samples": 32,
        "flow_samples": 32,
        "layers": [
            {
                "name": f"layers.{index}",
                "matrices": {
                    name: {"cross_entropy": values(size, 4 + index / 4), "flow": values(size, 9 + index / 4)}
                    for name, size in names.items()
                },
            }
            for index in range(layers)
        ],
    }


def hidden_states(seed: int, condition: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    before = random.normal(0, 1, (80, 24)).astype(np.float32)
    directions = random.normal(0, 1, (2, 24))
    own = np.random.default_rng([seed, condition == "aegis"])
    drift = directions[0] * (0.8 if condition == "naive" else 0.3) + directions[1] * (
        0.5 if condition == "aegis" else 0
    )
    return {"before": before, "after": (before + drift + own.normal(0, 0.3, before.shape)).astype(np.float32)}


def expert_routing(random: np.random.Generator, layers: int) -> list[dict[str, Any]]:
    def figures(step: int) -> dict[str, Any]:
        probability = random.dirichlet(np.full(7, 2.0 + step / 20))
        entropy = -(probability * np.log(probability)).sum()
        return {"load": (2 * probability).tolist(), "probability": probability.tolist(), "entropy": float(entropy)}

    names = [f"model.language_model.layers.{i}.{part}" for i in range(layers) for part in ("mlp.up_proj", "q_proj")]
    return [{"step": step, "layers": {name: figures(step) for name in names}} for step in range(10, STEPS + 1, 10)]


def expert_spectra(random: np.random.Generator, layers: int) -> dict[str, Any]:
    def entry(name: str) -> dict[str, Any]:
        before = 0.3 * 0.9 ** np.arange(16)
        after = np.sort(before * random.uniform(0.8, 1.4, 16))[::-1]
        update = 0.1 * 0.8 ** np.arange(32)
        return {"name": name, "before": before.tolist(), "after": after.tolist(), "update": update.tolist()}

    names = [f"model.language_model.layers.{i}.{part}" for i in range(layers) for part in ("mlp.up_proj", "q_proj")]
    return {"layers": [entry(name) for name in names]}


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture(scope="session")
def write_comparison() -> Callable[..., Path]:
    """
    Writes a comparison's folder.

    `outcomes` are the conditions; `layers` how many there are; `analyses` whether the runs left what only some runs
    leave (spectra, hidden states, histograms); `unfinished` are runs without a result.
    """
    from safetensors.numpy import save_file

    def write(
        folder: Path,
        outcomes: dict[str, Sequence[float]] = OUTCOMES,
        seeds: Sequence[int] = (0, 1, 2),
        layers: int = 4,
        analyses: bool = True,
        unfinished: Sequence[tuple[str, int]] = (),
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "version": "0.1.0",
            "command": "hf-aegis compare --config comparison.yaml",
            "machine": {"cores": 2, "gpus": 0, "jobs": 2, "threads": 1},
            "seeds": list(seeds),
            "questions": {"seed": 0},
            "anchors": {},
            "conditions": {name: {"max_steps": STEPS} for name in outcomes},
        }
        (folder / "compare.json").write_text(json.dumps(settings))
        by_type = {name: {"count": 100, "accuracy": 0.99} for name in TYPES}
        (folder / "pretrained.json").write_text(json.dumps({**BEFORE, "by_type": by_type, "fingerprint": "q"}))
        for condition, outcome in outcomes.items():
            for seed in seeds:
                run = folder / "runs" / condition / f"seed_{seed}"
                run.mkdir(parents=True)
                # Not `hash`, which differs from process to process.
                random = np.random.default_rng([seed, zlib.crc32(condition.encode())])
                write_lines(run / "metrics.jsonl", metrics(outcome, random, condition))
                if condition in PROJECTED:
                    write_lines(run / "projection.jsonl", projection(random, condition, layers))
                if analyses:
                    write_analyses(run, random, condition, seed, layers)
                if (condition, seed) not in unfinished:
                    result = result_of(outcome, random)
                    (run / "result.json").write_text(json.dumps(result))
        return folder

    def write_analyses(run: Path, random: np.random.Generator, condition: str, seed: int, layers: int) -> None:
        if condition == "aegis":
            (run / "neuron_cosines.json").write_text(json.dumps(neuron_cosines(random, layers)))
        (run / "analysis").mkdir()
        if condition.endswith("vla_gse"):
            write_lines(run / "experts.jsonl", expert_routing(random, layers))
            (run / "analysis/expert_spectra.json").write_text(json.dumps(expert_spectra(random, layers)))
        (run / "analysis/gradient_spectra.json").write_text(json.dumps(gradient_spectra(random, layers)))
        save_file(hidden_states(seed, condition), run / "analysis/hidden_states.safetensors")

    return write


def result_of(outcome: Sequence[float], random: np.random.Generator) -> dict[str, Any]:
    cross_entropy, accuracy, flow = outcome
    accuracy = min(1.0, accuracy + random.normal(0, 0.15 * (1.001 - accuracy)))
    return {
        "vqa_cross_entropy": cross_entropy * random.uniform(0.8, 1.2),
        "vqa_accuracy": accuracy,
        "vqa_accuracy_by_type": {name: accuracy + 0.01 * index - 0.01 for index, name in enumerate(TYPES)},
        "flow_mse": flow + random.normal(0, 0.003),
        "step_ms": 300 + random.normal(0, 5),
        "peak_memory_mb": 1200,
        "trainable_parameters": 1_341_000,
        "skipped_steps": 0,
        "fingerprints": {"vqa_final": "q", "train": "t", "held_out": "h"},
        "versions": {"hf-aegis": "0.1.0", "torch": "2.15"},
    }
