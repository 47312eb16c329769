"""The `hf-aegis` command line: one module per command, imported only when its command runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence


# Command name -> (module, one-line help). Each module offers `configure(parser)` and `run(arguments)` and keeps heavy
# imports inside `run`. A command that sets the default `overrides` gets there what its parser does not know.
COMMANDS = {
    "demo": ("hf_aegis.cli.demo", "fine-tune the embedded model naively and with AEGIS, and compare"),
    "train": ("hf_aegis.cli.train", "fine-tune a vision-language model into a policy from a recipe"),
    "anchor": ("hf_aegis.cli.anchor", "collect the activation anchor of a pre-trained model"),
    "eval-vqa": ("hf_aegis.cli.eval_vqa", "measure how well a model answers questions about images"),
    "data": ("hf_aegis.cli.data", "record, combine and inspect LIBERO demonstrations"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser; with the options of `command` only, so that no other command is imported."""
    parser = argparse.ArgumentParser(
        prog="hf-aegis", description="Fine-tune a VLM into a robot policy that still answers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        child = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == command:
            importlib.import_module(module).configure(child)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors of the user's input end with one line and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(command)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:
        arguments.overrides = rest
    try:
        return importlib.import_module(COMMANDS[arguments.command][0]).run(arguments) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-aegis {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-aegis {arguments.command}: interrupted; start it again to continue", file=sys.stderr)
        return 130
