"""`hf-aegis data`: record demonstrations in the LIBERO simulator, combine files of them, inspect files of them."""

import argparse
import os
from pathlib import Path

from hf_aegis.cli.command_parser import CommandParser


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands `record-libero`, `combine` and `inspect`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, (summary, options, _) in _COMMANDS.items():
        commands.add_parser(name, help=summary, description=summary, configure=options)


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


def _record_options(parser: CommandParser) -> None:
    from hf_aegis.data.libero_recorder import RecordingConfig

    parser.take_recipe(RecordingConfig)


def _record(arguments: argparse.Namespace) -> int:
    from hf_aegis.data.libero_recorder import record

    for summary in record(*arguments.recipe):
        print(
            f"{summary.suite}/{summary.task}: {summary.demonstrations} demonstrations, {summary.steps} steps, "
            f"{summary.attempts} attempts, {summary.file}"
        )
    return 0


# Name -> (one-line help, adds the options, runs).
_COMMANDS = {
    "record-libero": ("record scripted demonstrations in the LIBERO simulator", _record_options, _record),
    "combine": ("put many LIBERO files into one, by suite and task", _combine_options, _combine),
    "inspect": ("say what LIBERO files hold, and everything that is wrong with them", _inspect_options, _inspect),
}
