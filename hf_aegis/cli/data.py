"""`hf-aegis data`: record demonstrations in the LIBERO simulator, combine files of them, inspect files of them."""

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml


class _LazyParser(argparse.ArgumentParser):
    """Adds its options when it is first used: those of a recording are read off a class whose import takes a while."""

    def __init__(self, *args: Any, options: Callable[[argparse.ArgumentParser], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._options: Callable[[argparse.ArgumentParser], None] | None = options

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if self._options is not None:
            options, self._options = self._options, None
            options(self)
        return super().parse_known_args(*args, **kwargs)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands `record-libero`, `combine` and `inspect`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND", parser_class=_LazyParser)
    for name, (summary, options, _) in _COMMANDS.items():
        commands.add_parser(name, help=summary, description=summary, options=options)


def run(arguments: argparse.Namespace) -> int:
    """Runs the sub-command that `configure` parsed."""
    return _COMMANDS[arguments.data_command][2](arguments)


def _combine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files, or folders of *.hdf5 files")
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument("--suite", help="suite of tasks whose file and folder do not tell it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _combine(arguments: argparse.Namespace) -> int:
    from hf_aegis.data.libero_combine import combine

    output = combine(arguments.files, arguments.output, suite=arguments.suite, overwrite=arguments.overwrite)
    print(f"wrote {output} ({os.path.getsize(output):,} bytes)")
    return 0


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files, or folders of *.hdf5 files")


def _inspect(arguments: argparse.Namespace) -> int:
    from hf_aegis.data.libero_files import resolve_files
    from hf_aegis.data.libero_inspect import format_report, inspect_file

    sound = True
    for path in arguments.files:
        # A missing file is a finding like any other: the files after it are inspected too.
        for file in resolve_files(path) if path.is_dir() else [path]:
            report = inspect_file(file)
            print(format_report(report), end="\n\n")
            sound = sound and not report.problems
    return 0 if sound else 1


def _record_options(parser: argparse.ArgumentParser) -> None:
    from hf_aegis.data.libero_recorder import RecordingConfig

    parser.add_argument("--config", type=Path, help="recipe (YAML); options given on the command line win")
    hints = typing.get_type_hints(RecordingConfig)
    for option in dataclasses.fields(RecordingConfig):
        hint = _without_none(hints[option.name])
        settings: dict[str, Any] = {"help": option.metadata["help"]}
        if typing.get_origin(hint) is typing.Literal:
            settings["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is list:
            settings |= {"nargs": "+", "type": typing.get_args(hint)[0]}
        else:
            settings["type"] = hint
        parser.add_argument(f"--{option.name}", **settings)


def _record(arguments: argparse.Namespace) -> int:
    from hf_aegis.data.libero_recorder import RecordingConfig, RecordingError, record

    hints = typing.get_type_hints(RecordingConfig)
    values = {} if arguments.config is None else read_recipe(arguments.config, hints)
    values |= {name: getattr(arguments, name) for name in hints if getattr(arguments, name) is not None}
    if "output_dir" not in values:
        raise ValueError("output_dir is missing: give it in the recipe or as --output_dir")
    try:
        summaries = record(RecordingConfig(**values))
    except RecordingError as error:
        print(f"hf-aegis data record-libero: error: {error}", file=sys.stderr)
        return 1
    for summary in summaries:
        print(
            f"{summary.suite}/{summary.task}: {summary.demonstrations} demonstrations, {summary.steps} steps, "
            f"{summary.attempts} attempts, {summary.file}"
        )
    return 0


def read_recipe(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """
    Reads a YAML recipe and checks its keys and types.

    Args:
        path (`Path`): the recipe.
        hints (`Mapping[str, Any]`): the options' type annotations.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a YAML mapping, or a key is unknown or has the wrong type; file and key are named.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of options, found {type(values).__name__}")
    if unknown := sorted(map(str, set(values) - set(hints))):
        raise ValueError(f"{path}: unknown keys {unknown}, expected some of {sorted(hints)}")
    for name, value in values.items():
        if not _matches(value, hints[name]):
            raise ValueError(f"{path}: key '{name}' is {value!r}, expected {_describe(hints[name])}")
    return values


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`; other annotations as they are."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _matches(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_matches(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


# Name -> (one-line help, adds the options, runs).
_COMMANDS = {
    "record-libero": ("record scripted demonstrations in the LIBERO simulator", _record_options, _record),
    "combine": ("put many LIBERO files into one, by suite and task", _combine_options, _combine),
    "inspect": ("say what LIBERO files hold, and everything that is wrong with them", _inspect_options, _inspect),
}
