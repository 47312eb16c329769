"""The `hf-aegis` command line: one module per command, imported only when its command runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence


# Command name -> (module, one-line help). Each module offers `configure(parser)` and `run(arguments)`; modules keep
# heavy imports inside `run`, so that `--help` answers at once.
COMMANDS = {
    "demo": ("hf_aegis.cli.demo", "fine-tune the embedded model naively and with AEGIS, and compare"),
    "anchor": ("hf_aegis.cli.anchor", "collect the activation anchor of a pre-trained model"),
    "data": ("hf_aegis.cli.data", "record, combine and inspect LIBERO demonstrations"),
    "eval-vqa": ("hf_aegis.cli.eval_vqa", "measure how well a model answers questions about images"),
    "train": ("hf_aegis.cli.train", "fine-tune a model from a recipe"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser, with one sub-parser per command."""
    parser = argparse.ArgumentParser(prog="hf-aegis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        importlib.import_module(module).configure(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors of the user's input end with one line and exit code 2."""
    arguments = build_parser().parse_args(argv)
    module, _ = COMMANDS[arguments.command]
    try:
        return importlib.import_module(module).run(arguments) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-aegis {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-aegis {arguments.command}: interrupted", file=sys.stderr)
        return 130
