"""`hf-aegis demo`: the whole experiment on the embedded model and demonstrations, in minutes on a CPU."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_aegis import __version__
from hf_aegis.atomic_files import write_text
from hf_aegis.cli import TRACEBACK_VARIABLE
from hf_aegis.cli.parent_process import PARENT_VARIABLE


# Both conditions share everything but `preserve`: start, seed, batches, noise and times. The embedded model is about
# two thousand times smaller than the paper's, so rates and lengths are this project's choice.
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
    "vqa_steps": 25,
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
CONDITIONS: dict[str, dict[str, Any]] = {"naive": {"preserve": "none"}, "aegis": {"preserve": "projection"}}
ANCHOR_SAMPLES = 3000
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
        default=os.cpu_count() or 1,
        help="processes side by side, which share the cores (default: one per core); use 1 on a GPU",
    )


def run(arguments: argparse.Namespace) -> int:
    """
    Collects the anchor, fine-tunes naively and with AEGIS, and writes `summary.json`, `metrics.jsonl` and figures.

    What is finished is not done again, so an interrupted demo continues.

    Raises:
        ValueError: If the folder holds a demo with other settings, or an option does not fit.
        OSError: If one of the commands fails.
    """
    started = time.perf_counter()
    folder: Path = arguments.output_dir
    shared = TRAINING | {name: getattr(arguments, name) for name in ("max_steps", "seed", "vqa_final_samples")}
    for name in ("max_steps", "vqa_final_samples", "jobs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    folder.mkdir(parents=True, exist_ok=True)
    circumstances = {
        "anchor_samples": ANCHOR_SAMPLES,
        # Rounding depends on the number of threads, and step times on what runs beside.
        "jobs": min(arguments.jobs, len(CONDITIONS)),
        "threads": _threads(arguments.jobs),
        "version": __version__,
    }
    _keep(shared | circumstances, folder / "demo.json")

    pretrained, anchor = folder / "pretrained.json", folder / "anchor"
    calls: list[tuple[str, ...]] = []
    if not pretrained.exists():
        questions = ("--max_samples", str(arguments.vqa_final_samples), "--seed", "0")
        calls.append(("eval-vqa", "--output", str(pretrained), *questions))
    # The anchor's recipe is written last.
    if not (anchor / "recipe.yaml").exists():
        calls.append(("anchor", "--output_dir", str(anchor), "--num_samples", str(ANCHOR_SAMPLES)))
    if calls:
        print("Asking the pre-trained model, collecting its anchor ...", flush=True)
        _call_together(calls, folder, arguments.jobs)

    results = {name: folder / name / "result.json" for name in CONDITIONS}
    if pending := [name for name, result in results.items() if not result.exists()]:
        for name in pending:
            recipe = {**shared, **CONDITIONS[name], "output_dir": str(folder / name)}
            if recipe["preserve"] != "none":
                recipe["anchor"] = str(anchor)
            write_text(folder / f"{name}.yaml", yaml.safe_dump(recipe, sort_keys=False))
        print(f"Fine-tuning, from the same start on the same batches: {', '.join(pending)} ...", flush=True)
        _call_together(
            [("train", "--config", str(folder / f"{name}.yaml")) for name in pending],
            folder,
            arguments.jobs,
            total=arguments.max_steps * len(pending),
            progress=lambda: sum(_steps_done(folder / name) for name in pending),
        )
    scores = json.loads(pretrained.read_text())
    measured = {name: json.loads(result.read_text()) for name, result in results.items()}
    for name, result in measured.items():
        asked = result.get("fingerprints", {}).get("vqa_final")
        if asked is not None and asked != scores["fingerprint"]:
            raise ValueError(
                f"{results[name]}: key 'fingerprints.vqa_final' is {asked}, but key 'fingerprint' of {pretrained} is "
                f"{scores['fingerprint']}: other questions were asked before than after. Delete {folder} to start anew"
            )
    summary: dict[str, Any] = {"pretrained": _vqa(scores), **measured}
    write_text(folder / "summary.json", json.dumps(summary, indent=2))
    _report(folder)
    print(format_table(summary))
    if circumstances["jobs"] > 1:
        print(
            f"\nStep times were measured with {circumstances['jobs']} processes side by side; "
            "`make bench` measures them in turn."
        )
    print(f"\n{folder}/summary.json, metrics.jsonl and *.png; {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def format_table(summary: dict[str, Any]) -> str:
    """The summary as a table for a terminal, one row per measure."""
    rows = [
        ("VQA cross-entropy (nats/token)", "vqa_cross_entropy", "{:.3f}", 1),
        ("VQA accuracy (%)", "vqa_accuracy", "{:.1f}", 100),
        ("held-out flow MSE", "flow_mse", "{:.4f}", 1),
        ("step time (ms, median)", "step_ms", "{:.0f}", 1),
        ("peak memory in steps (MB)", "peak_memory_mb", "{:.0f}", 1),
        ("throttle rate (%)", "throttle_rate", "{:.1f}", 100),
        ("energy shed (%)", "energy_shed", "{:.2f}", 100),
    ]
    names = list(summary)
    lines = [f"{'':32}" + "".join(f"{name:>14}" for name in names)]
    for label, key, text, scale in rows:
        cells = (text.format(scale * summary[name][key]) if key in summary[name] else "–" for name in names)
        lines.append(f"{label:32}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _keep(settings: dict[str, Any], file: Path) -> None:
    """Notes the settings of a demo, so that results of others are not taken for its own."""
    if not file.exists():
        write_text(file, json.dumps(settings, indent=2))
        return
    earlier = json.loads(file.read_text())
    if different := [name for name in settings if earlier.get(name) != settings[name]]:
        name = different[0]
        raise ValueError(
            f"{file.parent} holds a demo with other settings: {name} is {earlier.get(name)!r} there and "
            f"{settings[name]!r} here. Choose another --output_dir, or delete the folder"
        )


def _vqa(scores: dict[str, Any]) -> dict[str, Any]:
    return {
        "vqa_cross_entropy": scores["cross_entropy"],
        "vqa_accuracy": scores["accuracy"],
        "vqa_accuracy_by_type": {name: score["accuracy"] for name, score in scores["by_type"].items()},
    }


def _report(folder: Path) -> None:
    from hf_aegis.reports.training_curves import plot_flow, plot_projection, plot_vqa
    from hf_aegis.training.json_lines import METRICS_FILE, PROJECTION_FILE, JSONLines

    runs = {name: JSONLines(folder / name / METRICS_FILE).read() for name in CONDITIONS}
    lines = (json.dumps({"condition": name, **record}) for name, records in runs.items() for record in records)
    write_text(folder / METRICS_FILE, "".join(f"{line}\n" for line in lines))
    loss_scale = json.loads((folder / "aegis" / "config.json").read_text())["flow_loss_scale"]
    plot_vqa(runs, folder / "vqa.png")
    plot_flow(runs, loss_scale, folder / "flow.png")
    plot_projection(runs["aegis"], JSONLines(folder / "aegis" / PROJECTION_FILE).read(), folder / "projection.png")


def _steps_done(folder: Path) -> int:
    """The last logged step of a run. Reads the file's end itself: the training package takes seconds to import."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(match[1]) for line in reversed(lines) if (match := re.match(r'{"step": (\d+),', line))), 0)


def _threads(jobs: int) -> int:
    """Threads of each process. Not of how many happen to run: an interrupted demo ends like a whole one."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else max(1, (os.cpu_count() or 1) // min(jobs, len(CONDITIONS)))


def _call_together(
    calls: Sequence[tuple[str, ...]],
    folder: Path,
    jobs: int,
    total: int | None = None,
    progress: Callable[[], int] | None = None,
) -> None:
    """
    Runs other commands, up to `jobs` side by side, each in a process of its own: conditions share no state, and memory
    is measured apart. What they say is added to `logs/` in `folder`. On Linux they end with this process.

    Raises:
        OSError: If one of them fails; the others are ended.
    """
    from tqdm import tqdm

    side_by_side = min(jobs, len(calls))
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        # A log has room for where an error came from.
        TRACEBACK_VARIABLE: "1",
        **os.environ,
        "OMP_NUM_THREADS": str(_threads(jobs)),
        PARENT_VARIABLE: str(os.getpid()),
    }
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    waiting = list(calls)
    running: dict[Path, tuple[subprocess.Popen, tuple[str, ...], int]] = {}
    with tqdm(total=total or len(calls), unit="step" if progress else "command", disable=None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    call = waiting.pop(0)
                    log = logs / f"{Path(call[-1]).stem if call[0] == 'train' else call[0]}.log"
                    with log.open("a") as file:
                        start = file.tell()
                        command = [sys.executable, "-m", "hf_aegis", *call]
                        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                        running[log] = process, call, start
                time.sleep(0.5)
                for log, (process, call, start) in list(running.items()):
                    if (code := process.poll()) is None:
                        continue
                    del running[log]
                    if code:
                        said = log.read_bytes()[start:].decode(errors="replace")
                        last = said.strip().splitlines()[-1:] or ["it said nothing"]
                        raise OSError(f"hf-aegis {call[0]} ended with code {code}: {last[0]} (all of it in {log})")
                bar.n = progress() if progress else len(calls) - len(waiting) - len(running)
                bar.refresh()
        finally:
            for process, _, _ in running.values():
                process.terminate()
                process.wait()
