"""
Step time of a comparison's conditions, as ratios to its `naive`. Each condition trains in a process of its own, as
`hf-aegis compare` trains it, and all take turns step by step: only one computes at a time, and the machine's drift
hits them alike. Beside wall-clock time stand ratios of processor time, which other work on the machine disturbs less.

    hf-aegis compare --config recipes/study_embedded.yaml --seeds 0 --only naive    # collects the anchors
    python tests/benchmarks/condition_steps.py --comparison outputs/study_embedded

What is measured is kept group by group, so that an interrupted run goes on where it was; each group has a `naive` of
its own. The table is put on the machine's page in `tests/benchmarks/results/`.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from machine_results import MachineResults
from transformers import TrainerCallback

from hf_aegis.cli import build_parser
from hf_aegis.reports.comparison_files import read_settings
from hf_aegis.training.run import run_training


NAIVE = "naive"
# One of each kind of step; others differ in shares and rates.
CONDITIONS = (
    *("stop_gradient", "aegis", "pairs_99", "subspace_95", "subspace_soft", "pairs_both", "lora", "l2sp_1e-2"),
    *("feature_distillation", "transport_loss", "pairs_99_transport_lr_2e-3", "ewc", "a_gem", "cotrain"),
)
# Nothing but steps.
_STEPS_ALONE: dict[str, Any] = {
    **{"vqa_samples": 0, "vqa_final_samples": 0, "certificate_samples": 0, "seed": 0, "max_steps": 10**6},
    **{"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True},
}


class TakeTurns(TrainerCallback):
    """Waits for its turn before each step, and tells what it took. Put last, it times all that belongs to a step."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent
        self.started = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parent.send(None)
        self.parent.recv()
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parent.send((time.perf_counter() - self.started[0], time.process_time() - self.started[1]))


def train(recipe: dict[str, Any], folder: Path, parent: Connection) -> None:
    """One condition's process, until it is ended."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, **_STEPS_ALONE, "output_dir": str(folder)}), encoding="utf-8")
    run, args = build_parser().parse_args(["train", "--config", str(path)]).recipe
    run_training(run, args, callbacks=[TakeTurns(parent)])


def measure(recipes: dict[str, dict[str, Any]], warm_up: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of each condition the median milliseconds of a step, and medians of its ratios to the round's naive step."""
    context = multiprocessing.get_context("spawn")
    processes, connections = [], {}
    outputs = tempfile.TemporaryDirectory()
    try:
        for number, (name, recipe) in enumerate(recipes.items()):
            connections[name], theirs = context.Pipe()
            arguments = (recipe, Path(outputs.name, str(number)), theirs)
            processes.append(context.Process(target=train, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            # One after the other: while one is set up, none waits for its turn.
            connections[name].recv()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
        for round_ in range(warm_up + rounds):
            for name, connection in connections.items():
                connection.send(None)
                took = connection.recv()
                connection.recv()
                if round_ >= warm_up:
                    times[name].append(took)
    finally:
        for process in processes:
            process.kill()
            process.join()
        outputs.cleanup()
    return {
        name: {
            "step_ms": 1e3 * statistics.median(wall for wall, _ in times[name]),
            "wall_ratio": _ratio(times, name, 0),
            "processor_ratio": _ratio(times, name, 1),
        }
        for name in recipes
    }


def _ratio(times: dict[str, list[tuple[float, float]]], name: str, clock: int) -> float:
    return statistics.median(mine[clock] / naive[clock] for mine, naive in zip(times[name], times[NAIVE], strict=True))


def main() -> None:
    """Measures what is missing, prints a Markdown table and puts it on the machine's page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, required=True, help="its folder, with its anchors")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), help="default: one of each kind of step")
    parser.add_argument("--together", type=int, default=5, help="conditions that take turns, beside naive")
    parser.add_argument("--warm_up", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--again", action="store_true", help="measure anew what was measured with these settings")
    arguments = parser.parse_args()
    asked = read_settings(arguments.comparison / "compare.json")
    if unknown := [name for name in (NAIVE, *arguments.conditions) if name not in asked["conditions"]]:
        parser.error(f"{arguments.comparison} has no conditions {unknown}; it has {sorted(asked['conditions'])}")
    recipes = {name: _with_anchor(asked, name, arguments.comparison) for name in (NAIVE, *arguments.conditions)}

    settings = {"recipes": recipes, "rounds": arguments.rounds, "threads": torch.get_num_threads()}
    results = MachineResults("cpu")
    section = results.section(f"Steps of {arguments.comparison.name}", settings, arguments.again)
    rows: dict[str, dict[str, float]] = {}
    for start in range(0, len(arguments.conditions), arguments.together):
        group = arguments.conditions[start : start + arguments.together]
        chosen = {name: recipes[name] for name in (NAIVE, *group)}
        found = results.unit(
            section, ", ".join(chosen), lambda c=chosen: measure(c, arguments.warm_up, arguments.rounds)
        )
        rows |= {name: figures for name, figures in found.items() if name not in rows}
    together = min(arguments.together, len(arguments.conditions))
    lines = [
        "",
        f"{arguments.rounds} steps of each in turn, after {arguments.warm_up} that are not timed, "
        f"{together} conditions and `naive` at a time, torch threads: {settings['threads']}.",
        "",
        "| condition | × naive | × naive, processor |",
        "|---|---|---|",
        *(f"| {name} | {row['wall_ratio']:.2f} | {row['processor_ratio']:.2f} |" for name, row in rows.items()),
    ]
    results.show(section, lines)
    print("\n".join(lines))
    print(f"\n{results.page}")


def _with_anchor(asked: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    recipe = dict(asked["conditions"][name])
    if recipe.get("anchor") in asked["anchors"]:
        recipe["anchor"] = str(folder.resolve() / "anchors" / recipe["anchor"])
    return recipe


if __name__ == "__main__":
    main()
