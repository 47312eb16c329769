"""Running a comparison: conditions × seeds of `hf-aegis train`, and what they need, in one resumable folder."""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from hf_aegis import __version__
from hf_aegis.atomic_files import write_text
from hf_aegis.cli.eval_libero import asked_of_comparison
from hf_aegis.cli.processes import Call, Placement, available_cores, run_calls
from hf_aegis.format_version import written_version
from hf_aegis.json_files import require_keys
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.reports.comparison_files import read_failures, read_rollout_scores, read_settings
from hf_aegis.reports.results_table import (
    FAILURES_FILE,
    PRETRAINED_FILE,
    ROLLOUTS_FILE,
    SETTINGS_FILE,
    write_results,
)
from hf_aegis.yaml_files import read_yaml


# What a command writes last, or a run once it has been set up.
_RECIPE = "recipe.yaml"
_RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """One run of a comparison: its condition, its seed, and the folder of the comparison."""

    condition: str
    seed: int
    comparison: Path

    @property
    def folder(self) -> Path:
        return self.comparison / "runs" / self.condition / f"seed_{self.seed}"

    @property
    def recipe(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def call(self) -> Call:
        return Call(f"{self.condition}_seed_{self.seed}", ("train", "--config", str(self.recipe)))

    @property
    def rollout_recipe(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.libero.yaml")

    @property
    def rollout_call(self) -> Call:
        name = f"{self.condition}_seed_{self.seed}_libero"
        return Call(name, ("eval-libero", "--config", str(self.rollout_recipe)))

    @property
    def finished(self) -> bool:
        return (self.folder / _RESULT).exists()

    def steps_done(self) -> int:
        """The last logged step. Reads the file's end itself: the training package takes seconds to import."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        return next((int(match[1]) for line in reversed(lines) if (match := re.match(r'{"step": (\d+),', line))), 0)


@dataclass(frozen=True)
class Comparison:
    """
    What is compared, resolved and checked.

    Args:
        folder (`Path`): Where everything is written.
        conditions (`Mapping`): By name, the recipe of `hf-aegis train` but for `seed` and `output_dir`.
        seeds (`tuple[int, ...]`): Of each condition.
        placement (`Placement`): How the commands share the machine.
        anchors (`Mapping`, *optional*): By name, the recipe of `hf-aegis anchor` but for `output_dir`.
        questions (`Mapping`, *optional*):
            Options of `hf-aegis eval-vqa`, which asks the model before training; `None` for no questions.
        libero (`Mapping`, *optional*):
            Fields of `hf-aegis eval-libero`, which lets each trained model act; `None` for no rollouts.
        gap (`tuple[str, ...]`, *optional*): The two conditions between whose flow losses shares are told.
        only (`tuple[str, ...]`, *optional*): The conditions to run now; by default all.
    """

    folder: Path
    conditions: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    placement: Placement
    anchors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    questions: Mapping[str, Any] | None = None
    libero: Mapping[str, Any] | None = None
    gap: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that a comparison under way already says something of every condition."""
        return [Run(condition, seed, self.folder) for seed in self.seeds for condition in self.conditions]

    @property
    def chosen(self) -> list[Run]:
        """The runs of the conditions to run now."""
        return [run for run in self.runs if self.only is None or run.condition in self.only]

    @property
    def chosen_anchors(self) -> list[str]:
        """The anchors that the conditions to run now use."""
        used = {self.conditions[run.condition].get("anchor") for run in self.chosen}
        return [name for name in self.anchors if name in used]

    def execute(self) -> list[dict[str, Any]]:
        """
        Does what is left to do: asks the model before training, collects the anchors, trains, and lets what was
        trained act. The table is written anew after each run.

        Returns:
            `list[dict]`: `condition`, `seed` and `error` of the runs that failed; the others went on.

        Raises:
            OSError: If the model cannot be asked or an anchor not be collected.
            ValueError: If another process works in the folder, or it holds results of other settings.
        """
        from hf_aegis.training.run_lock import locked_folder

        with locked_folder(self.folder):
            self._check_unchanged()
            self._write_recipes()
            self._write_settings()
            if calls := list(self._preparations()):
                print(f"Before training: {', '.join(call.name for call in calls)} ...", flush=True)
                run_calls(calls, self.folder / "logs", self.placement)
            failures = self._train() + self._roll_out()
            write_results(self.folder)
        return failures

    def _train(self) -> list[dict[str, Any]]:
        pending = {run.call: run for run in self.chosen if not run.finished}
        steps = {run: self.conditions[run.condition].get("max_steps", -1) for run in pending.values()}
        # Without `max_steps` the length depends on the data: then the bar counts runs.
        bar: dict[str, Any] = {}
        ended: set[Run] = set()
        if all(count > 0 for count in steps.values()):
            bar["total"] = sum(steps.values())
            bar["progress"] = lambda: sum(n if run in ended else run.steps_done() for run, n in steps.items())
        return self._carry_out(pending, "Training, with each seed from the same start on the same batches", ended, bar)

    def _roll_out(self) -> list[dict[str, Any]]:
        if self.libero is None:
            return []
        own = {"num_envs": self.placement.threads, **self.libero}
        pending = {}
        for run in self.chosen:
            output = run.folder / ROLLOUTS_FILE
            # A model that is trained may be asked for more episodes; the command refuses to mix other settings.
            scores = read_rollout_scores(output) if output.exists() else None
            again = scores is not None and own.get("retry_crashed", False) and scores["crashed"] > 0
            if run.finished and (scores is None or again or scores.get("asked") != asked_of_comparison(own)):
                recipe = {**own, "model": str(run.folder), "output": str(output)}
                write_text(run.rollout_recipe, yaml.safe_dump(recipe, sort_keys=False))
                pending[run.rollout_call] = run
        return self._carry_out(pending, "Acting in LIBERO")

    def _carry_out(
        self,
        pending: Mapping[Call, Run],
        what: str,
        ended: set[Run] | None = None,
        bar: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Runs commands, keeps account of those that fail, and adds to `ended` the runs whose commands have ended."""
        failures: list[dict[str, Any]] = []
        path = self.folder / FAILURES_FILE
        again = {(run.condition, run.seed) for run in pending.values()}
        earlier = [failure for failure in read_failures(path) if (failure["condition"], failure["seed"]) not in again]
        write_text(path, json.dumps(earlier, indent=2))
        if not pending:
            return failures

        def note(call: Call, error: str | None) -> None:
            run = pending[call]
            if ended is not None:
                ended.add(run)
            if error is not None:
                error = without_machine_paths(error, self.folder)
                failures.append({"condition": run.condition, "seed": run.seed, "error": error})
                write_text(path, json.dumps(earlier + failures, indent=2))
            write_results(self.folder)

        names = ", ".join(dict.fromkeys(run.condition for run in pending.values()))
        print(f"{what}: {names} ...", flush=True)
        run_calls(list(pending), self.folder / "logs", self.placement, ended=note, **(bar or {}))
        return failures

    def _preparations(self) -> Iterator[Call]:
        if self.questions is not None and not (output := self.folder / PRETRAINED_FILE).exists():
            options = (text for name, value in self.questions.items() for text in (f"--{name}", str(value)))
            yield Call("eval-vqa", ("eval-vqa", "--output", str(output), *options))
        for name in self.chosen_anchors:
            # The anchor's recipe is written last.
            if not (self._anchor(name) / _RECIPE).exists():
                yield Call(f"anchor_{name}", ("anchor", "--config", str(self._anchor_file(name))))

    def _check_unchanged(self) -> None:
        """Refuses to mix results of different settings; conditions, anchors and seeds may be added."""
        for run in self.runs:
            if (run.folder / _RECIPE).exists() or run.finished:
                self._compare(run.recipe, self._run_recipe(run), f"delete {run.folder}")
        for name in self.anchors:
            if (self._anchor(name) / _RECIPE).exists():
                remedy = f"delete {self._anchor(name)} and the runs that used it"
                self._compare(self._anchor_file(name), self._anchor_recipe(name), remedy)
        if (noted := _settings_of_started(self.folder)) is not None:
            # Scores before and after belong together.
            earlier, own = {"questions": noted.get("questions")}, {"questions": self.questions}
            refuse_other_settings(earlier, own, f"{self.folder} holds a comparison", "delete the folder")

    def _compare(self, path: Path, recipe: dict[str, Any], remedy: str) -> None:
        if path.exists():
            earlier = _wherever(_read_recipe(path))
            refuse_other_settings(earlier, _wherever(recipe), f"{path} was run", remedy)

    def _write_recipes(self) -> None:
        for run in self.chosen:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            self._write_recipe(run.recipe, run.folder, self._run_recipe(run))
        (self.folder / "anchors").mkdir(exist_ok=True)
        for name in self.chosen_anchors:
            self._write_recipe(self._anchor_file(name), self._anchor(name), self._anchor_recipe(name))

    def _write_recipe(self, path: Path, output: Path, recipe: dict[str, Any]) -> None:
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))
        resolved = output / _RECIPE
        if resolved.exists() and (earlier := _read_recipe(resolved)).get("output_dir") != str(output):
            # The folder was moved. A run in it continues by a recipe that says where it is now.
            moved = {key: recipe[key] for key in ("output_dir", "anchor") if key in recipe}
            write_text(resolved, yaml.safe_dump(earlier | moved, sort_keys=False))

    def _write_settings(self) -> None:
        path = self.folder / SETTINGS_FILE
        earlier = read_settings(path) if path.exists() else {"seeds": [], "anchors": {}, "conditions": {}}
        shown = {run.condition for run in self.chosen} | earlier["conditions"].keys()
        settings = {
            **written_version("comparison"),
            "version": __version__,
            "started": earlier.get("started", datetime.now(UTC).isoformat(timespec="seconds")),
            "command": without_machine_paths(shlex.join(["hf-aegis", *sys.argv[1:]])),
            "machine": {
                "cores": available_cores(),
                "gpus": len(self.placement.gpus),
                "jobs": self.placement.jobs,
                "threads": self.placement.threads,
            },
            "seeds": sorted({*earlier["seeds"], *self.seeds}),
            "questions": self.questions,
            "libero": earlier.get("libero") if self.libero is None else dict(self.libero),
            "gap": earlier.get("gap") if self.gap is None else list(self.gap),
            "anchors": (earlier.get("anchors") or {}) | {name: self.anchors[name] for name in self.chosen_anchors},
            # In this comparison's order, after those that only the earlier one had.
            "conditions": {name: own for name, own in earlier["conditions"].items() if name not in self.conditions}
            | {name: own for name, own in self.conditions.items() if name in shown},
        }
        write_text(path, json.dumps(settings, indent=2))

    def _run_recipe(self, run: Run) -> dict[str, Any]:
        recipe = {**self.conditions[run.condition], "seed": run.seed, "output_dir": str(run.folder)}
        if recipe.get("anchor") in self.anchors:
            recipe["anchor"] = str(self._anchor(recipe["anchor"]))
        return recipe

    def _anchor_recipe(self, name: str) -> dict[str, Any]:
        return {**self.anchors[name], "output_dir": str(self._anchor(name))}

    def _anchor(self, name: str) -> Path:
        return self.folder / "anchors" / name

    def _anchor_file(self, name: str) -> Path:
        return self.folder / "anchors" / f"{name}.yaml"


def placement_in(folder: Path, jobs: int | None, at_most: int) -> Placement:
    """
    How the commands of a comparison share the machine: as when it was started, since rounding depends on the number of
    threads, and step times on what runs beside.

    Args:
        folder (`Path`): The comparison's.
        jobs (`int`, *optional*): Processes side by side that were asked for.
        at_most (`int`): The number of runs.

    Raises:
        ValueError: If the comparison was started with another number of processes than was asked for.
    """
    placement = Placement.on_this_machine(jobs, at_most)
    if (noted := _settings_of_started(folder)) is None:
        return placement
    machine = require_keys(noted.get("machine"), {"jobs": int, "threads": int}, f"{folder / SETTINGS_FILE}, machine")
    earlier = machine["jobs"]
    if jobs is not None:
        remedy = "leave out jobs to continue with as many as before"
        refuse_other_settings({"jobs": earlier}, {"jobs": jobs}, f"{folder} holds a comparison", remedy)
    return dataclasses.replace(placement, jobs=earlier, threads=machine["threads"])


def _settings_of_started(folder: Path) -> dict[str, Any] | None:
    """The settings of the comparison in a folder, once anything was measured or trained there."""
    path = folder / SETTINGS_FILE
    started = (folder / PRETRAINED_FILE).exists() or any(folder.glob(f"runs/*/*/{_RECIPE}"))
    return read_settings(path) if path.exists() and started else None


def _read_recipe(path: Path) -> dict[str, Any]:
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected a mapping of options, found {type(recipe).__name__}")
    return recipe


def _wherever(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without where the comparison's folder is, which may be moved; an anchor in it has its name only."""
    settings = {key: value for key, value in recipe.items() if key != "output_dir"}
    if recipe.get("anchor") is not None:
        anchor, folder = Path(recipe["anchor"]), Path(recipe["output_dir"]).parents[2]
        settings["anchor"] = anchor.name if anchor.parent == folder / "anchors" else recipe["anchor"]
    return settings


def refuse_other_settings(earlier: Mapping[str, Any], own: Mapping[str, Any], what: str, remedy: str) -> None:
    """
    Raises:
        ValueError: If the settings differ, with the first that does; `what` says where the earlier ones are, `remedy`
            what to do about them.
    """
    for name in {**own, **earlier}:
        if earlier.get(name) != own.get(name):
            raise ValueError(
                f"{what} with other settings: {name} is {earlier.get(name)!r} there and {own.get(name)!r} here. "
                f"Choose another output_dir, or {remedy}"
            )
