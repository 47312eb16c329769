"""`hf-aegis plan`: what a training, or each condition of a comparison, would take."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.cli.recipe import EXTENDS
from hf_aegis.json_files import parse_json
from hf_aegis.yaml_files import read_yaml


if TYPE_CHECKING:
    from hf_aegis.training.planning.recipe_workload import RecipeWorkload
    from hf_aegis.training.planning.report import ConditionPlan


def configure(parser: CommandParser) -> None:
    """Adds the options."""
    parser.add_argument("--config", type=Path, required=True, help="recipe of `train` or of `compare`")
    parser.add_argument("--override", default="{}", metavar="JSON", help="fields of `train` above the recipe's")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="conditions of a comparison; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is planned for; default: cuda")
    parser.add_argument("--model_config", help="config.json of the model, to take in place of its own")
    parser.add_argument("--text_tokens", type=int, default=24, help="tokens of a prompt beside the image's")
    parser.add_argument("--cameras", type=int, default=2, help="pictures of a sample")
    parser.add_argument("--fast_tokens", type=int, default=64, help="FAST tokens of a chunk, where they are learnt")
    parser.add_argument("--capacities", type=float, nargs="+", default=None, metavar="GIB", help="default: 24 48 80")
    parser.add_argument("--advice", action="store_true", help="say which options would lower the peak, by how much")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; `-` prints them alone")


def run(arguments: argparse.Namespace) -> int:
    """
    Plans, and prints what was found.

    Raises:
        OSError: If a recipe or the model's configuration cannot be had.
        ValueError: If a recipe does not fit, or its memory is not known here.
    """
    from hf_aegis.cli.text_table import text_table
    from hf_aegis.training.planning.report import CAPACITIES, itemised

    capacities = arguments.capacities or list(CAPACITIES)
    is_comparison, recipes = _recipes(arguments)
    alone = arguments.json is not None and str(arguments.json) == "-"
    plans = []
    for name, recipe in recipes.items():
        workload = _workload(recipe, arguments)
        size = workload.args.per_device_train_batch_size
        # Far enough that the larger batches are not read off the cost of the first few samples.
        others = () if is_comparison else {1, 4 * size} - {size}
        plans.append(_plan(name, workload, arguments, others))
        if not alone and not is_comparison:
            print(itemised(plans[-1], capacities))
        elif is_comparison:
            print(f"{name}: planned", file=sys.stderr, flush=True)
    if is_comparison and not alone:
        print(text_table(*_table(plans, capacities)))
        print("\n".join(_notes(plans)))
    figures = {"device": arguments.device, "plans": [plan.to_dict(capacities) for plan in plans]}
    if alone:
        print(json.dumps(figures, indent=2))
    elif arguments.json is not None:
        from hf_aegis.atomic_files import write_text

        write_text(arguments.json, json.dumps(figures, indent=2))
    return 0


def _recipes(arguments: argparse.Namespace) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Whether the recipe is a comparison's, and fields of `hf-aegis train` by name."""
    from hf_aegis.cli.compare import CompareArguments
    from hf_aegis.cli.conditions import resolve_conditions, train_hints
    from hf_aegis.cli.recipe import check_values, merged, option_types, read_recipe, require_keys

    override = parse_json(arguments.override, "--override")
    hints = option_types([CompareArguments])
    source: Path = arguments.config
    if not _compares(source):
        if arguments.only is not None:
            raise ValueError(f"--only is for comparisons: {source} has no conditions")
        recipe = merged(read_recipe(source, train_hints()), check_values(override, train_hints(), "--override"))
        return False, {source.stem: recipe}
    values = read_recipe(source, hints)
    require_keys(CompareArguments, values, str(source))
    found = CompareArguments(**values)
    override = merged(found.override or {}, override)
    conditions = resolve_conditions(found.conditions, found.shared or {}, override, found.anchors or {}, source)
    if unknown := sorted(set(arguments.only or ()) - conditions.keys()):
        raise ValueError(f"--only: unknown conditions {unknown}, expected some of {list(conditions)}")
    return True, {n: c for n, c in conditions.items() if arguments.only is None or n in arguments.only}


def _compares(path: Path, seen: frozenset[Path] = frozenset()) -> bool:
    """Whether a recipe, or one that it extends, has conditions. Reading it says what is wrong with it."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        return False
    below = values.get(EXTENDS)
    if "conditions" in values or not isinstance(below, str) or path.resolve() in seen:
        return "conditions" in values
    return _compares(path.parent / below, seen | {path.resolve()})


def _workload(recipe: dict[str, Any], arguments: argparse.Namespace) -> "RecipeWorkload":
    import torch

    from hf_aegis.cli import build_parser
    from hf_aegis.training.planning.recipe_workload import RecipeWorkload, Sizes
    from hf_aegis.training.planning.vlm_shapes import vlm_config

    sizes = Sizes(arguments.text_tokens, fast_tokens=arguments.fast_tokens, cameras=arguments.cameras)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        here = {} if torch.cuda.is_available() else {"use_cpu": True}
        path.write_text(yaml.safe_dump({**recipe, "output_dir": folder, **here}), encoding="utf-8")
        run_arguments, training_arguments = build_parser().parse_args(["train", "--config", str(path)]).recipe
    config = vlm_config(run_arguments.model, arguments.model_config)
    return RecipeWorkload(run_arguments, training_arguments, config, sizes)


def _plan(
    name: str, workload: "RecipeWorkload", arguments: argparse.Namespace, other_batches: Iterable[int] = ()
) -> "ConditionPlan":
    from hf_aegis.training.planning.advice import advise
    from hf_aegis.training.planning.rehearsal import rehearse
    from hf_aegis.training.planning.report import ConditionPlan

    plan = rehearse(workload, arguments.device)
    size = workload.args.per_device_train_batch_size
    found = {size: plan}
    for other in other_batches:
        found[other] = rehearse(workload.changed({"per_device_train_batch_size": other}), arguments.device)
    by_batch = {batch: {name: peak.bytes for name, peak in each.phases.items()} for batch, each in found.items()}
    return ConditionPlan(
        name,
        workload.describe(arguments.device),
        plan,
        by_batch,
        tuple(workload.assumptions(arguments.device)),
        advise(workload, plan, arguments.device) if arguments.advice else None,
    )


def _table(plans: list["ConditionPlan"], capacities: list[float]) -> tuple[list[str], list[list[str]]]:
    from hf_aegis.training.planning.report import size

    phases = list(dict.fromkeys(phase for plan in plans for phase in plan.plan.phases))
    heads = ["condition", "peak", *phases, "operations", *(f"{gib:g} GiB" for gib in capacities)]
    rows = []
    for plan in plans:
        found = plan.plan.phases
        cells = [size(found[phase].bytes) if phase in found else "–" for phase in phases]
        fits = ["fits" if plan.fits(gib) else "no" for gib in capacities]
        rows.append([plan.name, size(plan.plan.peak.bytes), *cells, f"{plan.plan.step_flops:.3g}", *fits])
    return heads, rows


def _notes(plans: list["ConditionPlan"]) -> list[str]:
    """Each note once, with the conditions that it is about where it is not about all."""
    names: dict[str, list[str]] = {}
    for plan in plans:
        for note in plan.notes:
            names.setdefault(note, []).append(plan.name)
    return [
        f"note: {note}" if len(about) == len(plans) else f"note: {', '.join(about)}: {note}"
        for note, about in names.items()
    ]
