"""The conditions of a comparison: what they share and what sets them apart, merged and checked before any runs."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_aegis.cli.recipe import check_values, merged, option_types, read_recipe, recipe_beside


# Chosen by the comparison for each run.
_RESERVED = ("output_dir", "seed")
# The model before training is asked once for all conditions.
_ASKED_ONCE = (
    *("model", "dtype", "vqa_seed", "vqa_dataset", "vqa_split"),
    *("vqa_final_dataset", "vqa_final_split", "vqa_final_samples"),
)


def resolve_conditions(
    conditions: Mapping[str, Any],
    shared: Mapping[str, Any],
    override: Mapping[str, Any],
    anchors: Mapping[str, Mapping[str, Any]],
    source: Path | None,
) -> dict[str, dict[str, Any]]:
    """
    The recipe of `hf-aegis train` for each condition, but for `seed` and `output_dir`.

    Args:
        conditions (`Mapping`): By name, fields of `hf-aegis train`, or the path of a recipe with them.
        shared (`Mapping`): Fields for all, below those of a condition.
        override (`Mapping`): Fields for all, above those of a condition.
        anchors (`Mapping`): By name, fields of `hf-aegis anchor`. A condition's `anchor` may be one of the names.
        source (`Path`, *optional*): The comparison's recipe, for messages; paths in it are relative to its folder.

    Raises:
        OSError: If a recipe cannot be read.
        ValueError: If a field is unknown or a value wrong; file, condition and key are named.
    """
    hints = {name: hint for name, hint in train_hints().items() if name not in _RESERVED}
    where = str(source or "hf-aegis compare")
    check_values(shared, hints, f"{where}, shared")
    check_values(override, hints, f"{where}, override")
    resolved: dict[str, dict[str, Any]] = {}
    for name, own in conditions.items():
        place = f"{where}, condition {name!r}"
        if isinstance(own, str):
            path = recipe_beside(source or Path("recipe.yaml"), own, place)
            try:
                values = read_recipe(path, train_hints())
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            except OSError as error:
                raise type(error)(f"{place}: {error}") from error
            # A recipe of a single run says where that one goes.
            own = {key: value for key, value in values.items() if key not in _RESERVED}
            place = f"{place}, {path}"
        recipe = merged(shared, check_values(own, hints, place), override)
        first = next(iter(resolved.values()), recipe)
        for key in _ASKED_ONCE:
            if recipe.get(key) != first.get(key):
                raise ValueError(
                    f"{place}: key {key!r} is {recipe.get(key)!r}, but {first.get(key)!r} in condition "
                    f"{next(iter(resolved))!r}: the model before training is asked once, the same for all conditions"
                )
        _check_anchor(recipe.get("anchor"), anchors, place)
        resolved[name] = recipe
    return resolved


def resolve_anchors(
    anchors: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]], source: Path | None
) -> dict[str, dict[str, Any]]:
    """
    The recipe of `hf-aegis anchor` for each anchor that a condition uses, but for `output_dir`. Model and dtype are,
    unless given, those of the conditions.

    Raises:
        ValueError: If a field is unknown or a value wrong; file, anchor and key are named.
    """
    from hf_aegis.cli.anchor import AnchorRecipe

    hints = {name: hint for name, hint in option_types([AnchorRecipe]).items() if name not in _RESERVED[:1]}
    resolved = {}
    for name, own in anchors.items():
        place = f"{source or 'hf-aegis compare'}, anchor {name!r}"
        check_values(own, hints, place)
        users = [recipe for recipe in conditions.values() if recipe.get("anchor") == name]
        if not users:
            continue
        same = {key: users[0][key] for key in ("model", "dtype") if users[0].get(key) is not None}
        resolved[name] = check_values(merged(same, own), hints, place)
        try:
            AnchorRecipe(**resolved[name])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return resolved


def check_runnable(conditions: Mapping[str, Mapping[str, Any]], source: Path | None) -> None:
    """
    Gives each condition to the parser of `hf-aegis train`, which builds the run's arguments and refuses what does not
    fit together.

    Raises:
        ValueError: If a condition does not make a run; file and condition are named.
    """
    from hf_aegis.cli import build_parser

    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in conditions.items():
            path = Path(folder) / "recipe.yaml"
            path.write_text(yaml.safe_dump({**recipe, "output_dir": folder}), encoding="utf-8")
            try:
                run, _ = build_parser().parse_args(["train", "--config", str(path)]).recipe
                run.check()
            except ValueError as error:
                place = f"{source or 'hf-aegis compare'}, condition {name!r}"
                raise ValueError(f"{place}: {error}") from error


def check_rollouts(
    section: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]], source: Path | None
) -> list[str]:
    """
    Checks the fields of `hf-aegis eval-libero` that a comparison has, before anything is trained.

    Returns:
        `list[str]`: What to warn of: conditions that would see other pictures than those of their demonstrations.

    Raises:
        ValueError: If a field is unknown or chosen by the comparison, a value does not fit, by itself or to a
            condition, or a task is unknown; file and key are named.
        ImportError: If the `libero` extra is not installed.
    """
    from hf_aegis.cli.eval_libero import CHOSEN_BY_COMPARISON, PICTURES, EvalLiberoArguments
    from hf_aegis.evaluation.rollouts.libero import chosen_tasks
    from hf_aegis.training.run_arguments import RunArguments

    place = f"{source or 'hf-aegis compare'}, libero"
    hints = option_types([EvalLiberoArguments])
    check_values(section, {name: hint for name, hint in hints.items() if name not in CHOSEN_BY_COMPARISON}, place)
    try:
        asked = EvalLiberoArguments(model="its own", output="its own", **section)
        chosen_tasks(asked.suite or [], asked.tasks)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    for name, recipe in conditions.items():
        chunk_size = recipe.get("chunk_size", RunArguments.chunk_size)
        if asked.replan_steps > chunk_size:
            raise ValueError(
                f"{place}: replan_steps is {asked.replan_steps}, but a chunk of condition {name!r} has {chunk_size} "
                "actions"
            )
        if asked.head == "fast" and recipe.get("fast") is None:
            raise ValueError(f"{place}: head is 'fast', but condition {name!r} trains none (its field 'fast')")
    chosen = {name: value for name in PICTURES if (value := getattr(asked, name)) is not None}
    return _other_pictures(chosen, conditions, place) if chosen else []


def _other_pictures(chosen: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]], place: str) -> list[str]:
    from hf_aegis.assets import DEMONSTRATIONS
    from hf_aegis.data.libero_pictures import pictures_of

    warnings = []
    by_source: dict[tuple[str, ...], list[str]] = {}
    for name, recipe in conditions.items():
        by_source.setdefault(tuple(recipe.get("demonstrations") or [str(DEMONSTRATIONS)]), []).append(name)
    for demonstrations, names in by_source.items():
        try:
            known = pictures_of(demonstrations)
        except FileNotFoundError:
            # The training's to say, if there is any left to do.
            continue
        if known is not None and dataclasses.replace(known, **chosen) != known:
            warnings.append(
                f"{place}: {', '.join(names)} will see other pictures ({dataclasses.replace(known, **chosen)}) than "
                f"the demonstrations' ({known})"
            )
    return warnings


def train_hints() -> dict[str, Any]:
    """The type annotations of the fields of `hf-aegis train`."""
    from hf_aegis.cli.train import recipe_classes

    return option_types(recipe_classes())


def _check_anchor(anchor: str | None, anchors: Mapping[str, Any], place: str) -> None:
    """A Hub id has a slash; a name without one is a folder, or misspelt."""
    if anchor is not None and anchor not in anchors and "/" not in anchor and not os.path.isdir(anchor):
        raise ValueError(
            f"{place}: key 'anchor' is {anchor!r}, expected one of the anchors {sorted(anchors)}, a folder or a Hub id"
        )
