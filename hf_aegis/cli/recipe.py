"""
Recipes: YAML files with the options of a command, overridden on the command line.

TRL's parser turns dataclasses into options and builds them. It looks at neither the keys' types nor the file's name,
and sets environment variables from a key `env`; so the file is read and checked here before it is given to the parser.
"""

import argparse
import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_aegis.json_files import parse_json_object
from hf_aegis.yaml_files import read_yaml


EXTENDS = "extends"
"""Key of a recipe that names another one, which it is laid over."""
_MOST_EXTENDED = 50
# transformers annotates the field as text, which it is in old configurations, and asks for `fsdp=True`.
_BESIDES: dict[str, Any] = {"fsdp": bool}


def parse_recipe(
    dataclass_types: Sequence[type],
    options: Sequence[str],
    prog: str = "hf-aegis",
    description: str | None = None,
    epilog: str | None = None,
) -> tuple[Any, ...]:
    """
    Builds dataclasses from the options of a command line and the recipe that its `--config` names.

    Args:
        dataclass_types (`Sequence[type]`): The dataclasses. Their fields are the options, and the keys of the recipe.
        options (`Sequence[str]`): The command line after the command's name. What it says wins over the recipe.
        prog (`str`, *optional*, defaults to `"hf-aegis"`): The command, for its help.
        description (`str`, *optional*): What the command does, for its help.
        epilog (`str`, *optional*): What its help ends with.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        OSError: If the recipe cannot be read.
        ValueError: If an option or a key of the recipe is unknown, missing or has the wrong type.
        SystemExit: After `--help`.
    """
    path, rest = recipe_path(options)
    hints = option_types(dataclass_types)
    parser = _option_parser(dataclass_types, hints, prog=prog, description=description, epilog=epilog)
    if path is not None:
        parser.set_defaults_with_config(**read_recipe(path, hints))
    # Without this, a file beside the executable would be taken for options.
    *instances, unknown = parser.parse_args_into_dataclasses(
        rest, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}; see {prog} --help")
    return tuple(instances)


def recipe_path(options: Sequence[str]) -> tuple[Path | None, list[str]]:
    """
    The recipe that a command line names with `--config`, and the other options.

    Raises:
        ValueError: If `--config` names no file.
    """
    source = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    source.add_argument("--config", type=Path)
    try:
        found, rest = source.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    return found.config, rest


def option_types(dataclass_types: Sequence[type]) -> dict[str, Any]:
    """The types of all fields that are options, by name: their annotations, and what fields take besides."""
    return {
        field.name: hints[field.name] | _BESIDES[field.name] if field.name in _BESIDES else hints[field.name]
        for dataclass_type in dataclass_types
        for hints in [typing.get_type_hints(dataclass_type)]
        for field in dataclasses.fields(dataclass_type)
        if field.init
    }


def read_recipe(path: Path, hints: Mapping[str, Any], extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    Reads a YAML recipe and checks its keys and the types of its values. The key `extends` names another recipe, by its
    path from this one, over which this one is laid; mappings are merged key by key.

    Args:
        path (`Path`): The recipe.
        hints (`Mapping[str, Any]`): The options' type annotations.
        extending (`tuple[Path, ...]`, *optional*): The recipes on the way to this one.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not a YAML mapping, a key is unknown or has the wrong type, or recipes extend one
            another in a circle; file and key are named.
    """
    values = read_yaml(path)
    if not isinstance(values, dict) or EXTENDS not in values:
        return check_values(values, hints, str(path))
    below = values.pop(EXTENDS)
    if not isinstance(below, str):
        raise ValueError(f"{path}: key {EXTENDS!r} is {below!r}, expected the path of a recipe")
    extending = (*extending, path.resolve())
    base = recipe_beside(path, below, f"{path}: key {EXTENDS!r}")
    if base in extending:
        raise ValueError(f"{path}: key {EXTENDS!r} is {below!r}, which extends this recipe in turn")
    if len(extending) == _MOST_EXTENDED:
        raise ValueError(f"{path}: key {EXTENDS!r} is {below!r}, the {_MOST_EXTENDED}th recipe over one another")
    try:
        extended = read_recipe(base, hints, extending)
    except ValueError as error:
        raise ValueError(f"{path}: key {EXTENDS!r}: {error}") from error
    except OSError as error:
        raise type(error)(f"{path}: key {EXTENDS!r}: {error}") from error
    return merged(extended, check_values(values, hints, str(path)))


def recipe_beside(path: Path, text: str, place: str) -> Path:
    """
    The recipe that another one names.

    Args:
        path (`Path`): The other one; what it names is relative to its folder.
        text (`str`): What it names.
        place (`str`): Where it does, for messages.

    Raises:
        OSError: If there is no such file.
        ValueError: If this is no path.
    """
    try:
        found = (path.parent / text).resolve()
        exists = found.is_file()
    # Names that no file has: with a zero byte, too long, or of links in a circle.
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{place} is {text[:80]!r}, which is no path: {error}") from error
    if not exists:
        raise FileNotFoundError(f"{place} is {text!r}: there is no recipe {found}")
    return found


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings over one another, the last one on top; nested mappings are merged key by key."""
    result: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            if isinstance(value, Mapping) and isinstance(below := result.get(key), Mapping):
                value = merged(below, value)
            result[key] = value
    return result


def require_keys(dataclass_type: type, values: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ValueError: If `values` lacks fields of the dataclass that have no default; they are named, after `where`.
    """
    required = [
        field.name
        for field in dataclasses.fields(dataclass_type)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}: missing keys {missing}")


def check_values(values: Any, hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """
    The values of a recipe, or of a part of one, after their keys and types are checked.

    Args:
        values (`Any`): What was read.
        hints (`Mapping[str, Any]`): Type annotations by key.
        where (`str`): File, and part of it, for messages.

    Raises:
        ValueError: If this is no mapping, or a key is unknown or has the wrong type; place and key are named.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of options, found {type(values).__name__}")
    if unknown := sorted(map(str, set(values) - set(hints))):
        raise ValueError(f"{where}: unknown keys {unknown}, expected some of {sorted(hints)}")
    for name, value in values.items():
        if not _matches(value, hints[name]):
            raise ValueError(f"{where}: key {name!r} is {value!r}, expected {_describe(hints[name])}")
    return values


def _option_parser(dataclass_types: Sequence[type], hints: Mapping[str, Any], **settings: Any) -> Any:
    from trl import TrlParser

    class OptionParser(TrlParser):
        def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
            hint = hints.get(names[0].removeprefix("--"))
            parts = typing.get_args(hint) if _is_union(hint) else (hint,)
            # TRL would call `dict` on the text. Where text is a possible value, the dataclass reads the JSON itself.
            if str not in parts and any(part is dict or typing.get_origin(part) is dict for part in parts):
                settings["type"] = _json_object
            return super().add_argument(*names, **settings)

        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message}; see {self.prog} --help")

    parser = OptionParser(
        dataclass_types=dataclass_types,  # type: ignore[arg-type]
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        allow_abbrev=False,
        **settings,
    )
    parser.add_argument(
        "--config", default=argparse.SUPPRESS, metavar="FILE", help="recipe (YAML) with any of these options"
    )
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        return parse_json_object(text, repr(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _matches(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if _is_union(hint):
        return any(_matches(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, part) for item in value for part in parts)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [choice.value for choice in hint]
    if hint is float:
        return type(value) in (int, float) or (isinstance(value, str) and _is_number(value))
    # Not isinstance: a bool is an int.
    return type(value) is hint


def _is_number(text: str) -> bool:
    """YAML 1.1 takes numbers without a decimal point, such as `3e-4`, for text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _describe(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {[choice.value for choice in hint]}"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
