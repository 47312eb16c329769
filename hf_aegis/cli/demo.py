"""`hf-aegis demo`: the whole experiment on the embedded model and demonstrations, in minutes on a CPU."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hf_aegis import __version__
from hf_aegis.atomic_files import write_text
from hf_aegis.cli.comparison import Comparison, Run, placement_in, refuse_other_settings
from hf_aegis.format_version import FORMAT_KEY, check_format_version, written_version
from hf_aegis.json_files import read_json_object
from hf_aegis.reports.comparison_files import read_result
from hf_aegis.reports.results_table import COLUMNS, PRETRAINED_FILE, pretrained_scores
from hf_aegis.reports.style import require_matplotlib


# The conditions share everything but what keeps the knowledge, and the rate that this allows for: start, seed,
# batches, noise and times. The embedded model is about two thousand times smaller than the paper's, so rates and
# lengths are this project's choice.
TRAINING: dict[str, Any] = {
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "expert_learning_rate": 1e-3,
    "warmup_steps": 20,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 60,
    "per_device_eval_batch_size": 64,
    "vqa_steps": 50,
    "vqa_samples": 256,
    "save_steps": 60,
    "save_total_limit": 1,
    "chunk_size": 50,
    "expert": {
        "expert_hidden_size": 128,
        "expert_num_layers": 3,
        "expert_num_heads": 4,
        "expert_intermediate_size": 512,
    },
}
ANCHORS: dict[str, dict[str, Any]] = {
    # Sensitivities take two forward and two backward passes for each question, the moments alone one forward pass.
    "easy_vqa": {"num_samples": 3000, "subspaces": True, "subspace_energy": 1.0, "sensitivity": True},
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "naive": {"preserve": "none"},
    "aegis": {"preserve": "projection", "anchor": "easy_vqa"},
    # What is held allows for larger steps, and AEGIS's penalty as a loss keeps the rest close.
    "held_pairs": {
        "preserve": "subspace",
        "subspace_sensitivity": 0.99,
        "penalties": {"transport": 1.0},
        "learning_rate": 2e-3,
        "anchor": "easy_vqa",
    },
}
# Of the measures of a comparison's table, those of the demo's.
_KIND = "demo"
_ROWS = {
    "vqa_cross_entropy": "VQA cross-entropy (nats/token)",
    "vqa_accuracy": "VQA accuracy (%)",
    "flow_mse": "held-out flow MSE",
    "step_ms": "step time (ms, median)",
    "peak_memory_mb": "peak memory in steps (MB)",
    "throttle_rate": "throttle rate (%)",
    "energy_shed": "energy shed (%)",
}
FINAL_QUESTIONS = 2000


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options."""
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/demo"),
        help="folder for results and figures; a demo interrupted there continues (default: outputs/demo)",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=TRAINING["max_steps"],
        help=f"training steps of each condition (default: {TRAINING['max_steps']})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of expert, batches, noise and times (default: 0)")
    parser.add_argument(
        "--vqa_final_samples",
        type=int,
        default=FINAL_QUESTIONS,
        help=f"questions asked before and after, of easy-VQA's 9,673 (default: {FINAL_QUESTIONS})",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes side by side, which share the cores (default: one per GPU, or one per core)",
    )


def run(arguments: argparse.Namespace) -> int:
    """
    Collects the anchor, fine-tunes naively, with AEGIS, and with held pairs of directions and the penalty as a loss,
    and writes `summary.json`, `metrics.jsonl` and figures.

    What is finished is not done again, so an interrupted demo continues.

    Raises:
        ValueError: If the folder holds a demo with other settings, or an option does not fit.
        OSError: If one of the commands fails.
        ImportError: If matplotlib is not installed, before anything is trained.
    """
    started = time.perf_counter()
    require_matplotlib()
    folder: Path = arguments.output_dir
    shared = TRAINING | {name: getattr(arguments, name) for name in ("max_steps", "vqa_final_samples")}
    for name in ("max_steps", "vqa_final_samples", "jobs"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, found {value}")
    comparison = Comparison(
        folder=folder,
        conditions={name: shared | own for name, own in CONDITIONS.items()},
        seeds=(arguments.seed,),
        placement=placement_in(
            folder, arguments.jobs and min(arguments.jobs, len(CONDITIONS)), at_most=len(CONDITIONS)
        ),
        anchors=ANCHORS,
        questions={"max_samples": arguments.vqa_final_samples, "seed": 0},
    )
    _keep(
        shared | {"seed": arguments.seed, "anchors": ANCHORS, "version": __version__},
        folder / "demo.json",
    )
    if failures := comparison.execute():
        raise OSError(failures[0]["error"])

    measured = {run.condition: read_result(run.folder / "result.json") for run in comparison.runs}
    summary: dict[str, Any] = {"pretrained": pretrained_scores(folder / PRETRAINED_FILE), **measured}
    write_text(folder / "summary.json", json.dumps(summary, indent=2))
    _report(folder, comparison.runs)
    print(format_table(summary))
    if comparison.placement.jobs > 1:
        print(
            f"\nStep times were measured with {comparison.placement.jobs} processes side by side; "
            "`make bench` measures them in turn."
        )
    print(f"\n{folder}/summary.json, metrics.jsonl and *.png; {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def format_table(summary: dict[str, Any]) -> str:
    """The summary as a table for a terminal, one row per measure."""
    columns = {column.key: column for column in COLUMNS}
    lines = [f"{'':32}" + "".join(f"{name:>14}" for name in summary)]
    for key, label in _ROWS.items():
        found = (scores.get(key) for scores in summary.values())
        alone = (None if value is None else {"mean": value, "std": None, "n": 1} for value in found)
        lines.append(f"{label:32}" + "".join(f"{columns[key].cell(measure, 1):>14}" for measure in alone))
    return "\n".join(lines)


def _keep(settings: dict[str, Any], file: Path) -> None:
    """Notes the settings of a demo, so that results of others are not taken for its own."""
    if file.exists():
        earlier = read_json_object(file)
        check_format_version(earlier, _KIND, file)
        noted = {key: value for key, value in earlier.items() if key != FORMAT_KEY}
        refuse_other_settings(noted, settings, f"{file.parent} holds a demo", "delete the folder")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**written_version(_KIND), **settings}, indent=2))


def _report(folder: Path, runs: list[Run]) -> None:
    from hf_aegis.reports.training_curves import plot_flow, plot_projection, plot_vqa
    from hf_aegis.training.json_lines import METRICS_FILE, PROJECTION_FILE, JSONLines

    folders = {run.condition: run.folder for run in runs}
    metrics = {name: JSONLines(run / METRICS_FILE).read() for name, run in folders.items()}
    lines = (json.dumps({"condition": name, **record}) for name, records in metrics.items() for record in records)
    write_text(folder / METRICS_FILE, "".join(f"{line}\n" for line in lines))
    loss_scale = read_json_object(folders["aegis"] / "config.json")["flow_loss_scale"]
    plot_vqa(metrics, folder / "vqa.png")
    plot_flow(metrics, loss_scale, folder / "flow.png")
    projection = JSONLines(folders["aegis"] / PROJECTION_FILE).read()
    plot_projection(metrics["aegis"], projection, folder / "projection.png")
