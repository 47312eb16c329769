"""`hf-aegis compare`: several conditions, each with several seeds, trained from the same start on the same batches."""

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_aegis.cli.command_parser import CommandParser


@dataclass
class CompareArguments:
    """
    What `hf-aegis compare` runs; each field is a key of the recipe and an option of the command line.

    Args:
        output_dir (`str`): Folder for everything; a comparison interrupted there continues.
        conditions (`dict`):
            By name, fields of `hf-aegis train`, or the path of a recipe with them, relative to this recipe.
        seeds (`list[int]`, *optional*, defaults to `[0]`): Of expert, batches, noise and times; each is a run.
        shared (`dict`, *optional*): Fields for all conditions, below their own; nested ones are merged key by key.
        override (`dict`, *optional*): Fields for all conditions, above their own; meant for the command line.
        anchors (`dict`, *optional*):
            By name, fields of `hf-aegis anchor`. A condition whose `anchor` is one of the names uses what was
            collected by it.
        libero (`dict`, *optional*):
            Fields of `hf-aegis eval-libero`, such as `suite` and `episodes`, but for what is evaluated and where that
            is written: each trained model then acts in the simulator. Unless the section says otherwise, it sees
            pictures like its demonstrations'.
        gap (`list[str]`, *optional*):
            Two conditions, one that learns little and one that learns much: the table then says which share of the gap
            between their flow losses, with the same seed, each run closes.
        only (`list[str]`, *optional*): The conditions to run now; by default all.
        jobs (`int`, *optional*):
            Processes side by side, which share the cores. By default as many as before in this folder, with as many
            threads each; at first one per GPU, or one per core.

    Raises:
        ValueError: If a value does not fit; the message names the field.
    """

    output_dir: str = field(metadata={"help": "Folder for everything; a comparison interrupted there continues."})
    conditions: dict[str, Any] = field(metadata={"help": "By name, fields of `train` or a recipe of it, as JSON."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each is a run of every condition."})
    shared: dict[str, Any] | None = field(default=None, metadata={"help": "Fields for all, below their own, as JSON."})
    override: dict[str, Any] | None = field(default=None, metadata={"help": "Fields for all, above their own."})
    anchors: dict[str, Any] | None = field(default=None, metadata={"help": "By name, fields of `anchor`, as JSON."})
    libero: dict[str, Any] | None = field(default=None, metadata={"help": "Fields of `eval-libero`, as JSON."})
    gap: list[str] | None = field(default=None, metadata={"help": "Two conditions; the table tells shares between."})
    only: list[str] | None = field(default=None, metadata={"help": "The conditions to run now; default: all."})
    jobs: int | None = field(default=None, metadata={"help": "Processes side by side; default: one per GPU or core."})

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("conditions must name at least one condition, found none")
        # They become names of folders.
        for kind, names in (("conditions", self.conditions), ("anchors", self.anchors or {})):
            if wrong := [name for name in names if not re.fullmatch(r"[\w-]+", str(name))]:
                raise ValueError(f"{kind}: a name has letters, digits, '_' and '-' only, found {wrong[0]!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, found {self.seeds}")
        if unknown := sorted(set(self.only or ()) - self.conditions.keys()):
            raise ValueError(f"only: unknown conditions {unknown}, expected some of {list(self.conditions)}")
        if self.gap is not None and (len({*self.gap}) != 2 or len(self.gap) != 2 or {*self.gap} - {*self.conditions}):
            raise ValueError(f"gap must be two different conditions of {list(self.conditions)}, found {self.gap}")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, found {self.jobs}")


def configure(parser: CommandParser) -> None:
    """Makes the fields of [`CompareArguments`] the options."""
    parser.take_recipe(CompareArguments)


def run(arguments: argparse.Namespace) -> int:
    """
    Runs what is left of the comparison, prints its table and writes its report.

    Returns:
        `int`: 1 if a run failed, else 0.

    Raises:
        ValueError: If a field does not fit, or the folder holds results of other settings.
        OSError: If a recipe cannot be read, the model not be asked, or an anchor not be collected.
    """
    from hf_aegis.cli.comparison import Comparison, placement_in
    from hf_aegis.cli.conditions import check_rollouts, check_runnable, resolve_anchors, resolve_conditions
    from hf_aegis.reports.results_table import collect_results, markdown_table

    asked: CompareArguments = arguments.recipe[0]
    source: Path | None = arguments.config
    shared, override, anchors = asked.shared or {}, asked.override or {}, asked.anchors or {}
    conditions = resolve_conditions(asked.conditions, shared, override, anchors, source)
    used = resolve_anchors(anchors, conditions, source)
    check_runnable(conditions, source)
    if asked.libero is not None:
        for warning in check_rollouts(asked.libero, conditions, source):
            print(f"hf-aegis compare: warning: {warning}", file=sys.stderr, flush=True)
    folder = Path(asked.output_dir)
    comparison = Comparison(
        folder=folder,
        conditions=conditions,
        seeds=tuple(asked.seeds),
        placement=placement_in(folder, asked.jobs, at_most=len(conditions) * len(asked.seeds)),
        anchors=used,
        questions=_questions(next(iter(conditions.values()))),
        libero=asked.libero,
        gap=tuple(asked.gap) if asked.gap is not None else None,
        only=tuple(asked.only) if asked.only is not None else None,
    )
    if (missing := _cannot_draw()) is not None:
        print(f"No report will be written: {missing}", file=sys.stderr, flush=True)
    failures = comparison.execute()
    results = collect_results(folder)
    print(markdown_table(results))
    print(f"{folder}/results.json, results.csv, results.md")
    if failures:
        names = ", ".join(f"{failure['condition']} seed {failure['seed']}" for failure in failures)
        print(
            f"hf-aegis compare: {len(failures)} of {len(comparison.chosen)} runs failed: {names}; "
            f"their logs are in {folder / 'logs'}; start it again to repeat them",
            file=sys.stderr,
        )
    if missing is not None:
        print(f"No report was written: {missing}; then: hf-aegis report {folder}")
    elif results["runs"]:
        from hf_aegis.cli.report import write_report

        print(write_report(folder))
    return 1 if failures else 0


def _cannot_draw() -> str | None:
    """Why there can be no report, if so: a thing to know before hours of training."""
    from hf_aegis.reports.style import require_matplotlib

    try:
        require_matplotlib()
    except ImportError as error:
        return str(error)
    return None


def _questions(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The options of `hf-aegis eval-vqa` that ask the model before training what a run asks at its end."""
    from hf_aegis.training.run_arguments import RunArguments

    run = RunArguments(**{name: value for name, value in recipe.items() if name in RunArguments.__dataclass_fields__})
    if run.vqa_final_samples == 0:
        return None
    options = {
        "model": run.model,
        "dtype": run.dtype,
        "dataset": run.vqa_final_dataset or run.vqa_dataset,
        "split": run.vqa_final_split or run.vqa_split,
        "max_samples": run.vqa_final_samples,
        "seed": run.vqa_seed,
    }
    return {name: value for name, value in options.items() if value is not None}
