"""
The `hf-aegis` command line: a module for each command, imported only when its command runs, and beside them what
several commands share: parsing (`command_parser`, `recipe`, `device`), comparisons, which `compare` and `demo` run
(`comparison`, `conditions`), and the processes in which these start other commands (`processes`, `parent_process`).
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.cli.parent_process import end_with_parent
from hf_aegis.training.training_ended import TrainingEndedError


# Command name -> (module, one-line help). Each module offers `configure(parser)` and `run(arguments)` and keeps heavy
# imports inside them.
COMMANDS = {
    "demo": ("hf_aegis.cli.demo", "fine-tune the embedded model naively and with AEGIS, and compare"),
    "compare": (
        "hf_aegis.cli.compare",
        "train several conditions with several seeds, and tabulate what they measured",
    ),
    "report": ("hf_aegis.cli.report", "draw the figures of a comparison and put them on a page"),
    "train": ("hf_aegis.cli.train", "fine-tune a vision-language model into a policy from a recipe"),
    "plan": ("hf_aegis.cli.plan", "estimate the peak memory and the operations of a training, from shapes alone"),
    "anchor": ("hf_aegis.cli.anchor", "collect the activation anchor of a pre-trained model"),
    "eval-vqa": ("hf_aegis.cli.eval_vqa", "measure how well a model answers questions about images"),
    "serve": ("hf_aegis.cli.serve", "let clients of openpi's policy servers ask a trained policy for actions"),
    "eval-libero": ("hf_aegis.cli.eval_libero", "measure how often a policy succeeds in the LIBERO simulator"),
    "push": ("hf_aegis.cli.push", "push an anchor, a policy, an adapter or a comparison's results to the Hub"),
    "space": ("hf_aegis.cli.space", "show the models' answers and actions on a page, here or as a Space on the Hub"),
    "data": ("hf_aegis.cli.data", "record, combine and inspect LIBERO demonstrations"),
}

# The same for commands of two words. The first word is a command of its own that takes a recipe, and so cannot have
# sub-commands.
TWO_WORD_COMMANDS = {
    "anchor inspect": ("hf_aegis.cli.anchor_inspect", "say what an anchor was collected from and what it holds"),
    "anchor compare": ("hf_aegis.cli.anchor_compare", "say how far two anchors of the same model are from each other"),
    "anchor merge": ("hf_aegis.cli.anchor_merge", "make one anchor from several of parts of the same data"),
}


TRACEBACK_VARIABLE = "HF_AEGIS_TRACEBACK"
"""Environment variable that asks for the traceback of an error, before its one line."""


def build_parser() -> CommandParser:
    """The command line's parser; a command's module is imported when that command is parsed."""
    parser = CommandParser(
        prog="hf-aegis",
        description="Fine-tune a vision-language model into a robot policy that still answers.",
        epilog=f"Errors are one line; with {TRACEBACK_VARIABLE}=1 in the environment, the traceback comes before it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in {**COMMANDS, **TWO_WORD_COMMANDS}.items():
        beside = [
            f"`hf-aegis {words}` to {does}"
            for words, (_, does) in TWO_WORD_COMMANDS.items()
            if words.split()[0] == name
        ]
        commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"See also {', '.join(beside)}." if beside else None,
            configure=lambda child, module=module: importlib.import_module(module).configure(child),
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs one command.

    Returns:
        `int`: 0, or what the command says; 1 after a training that ended too early, and 2 after an error of the user's
        input, each told on standard error, after its traceback where `HF_AEGIS_TRACEBACK` asks for it; 130 after an
        interruption.

    Raises:
        SystemExit: after `--help` (0) and for a command line that cannot be parsed (2).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if (two_words := " ".join(argv[:2])) in TWO_WORD_COMMANDS:
        argv[:2] = [two_words]
    end_with_parent()
    try:
        arguments = build_parser().parse_args(argv)
        module, _ = {**COMMANDS, **TWO_WORD_COMMANDS}[arguments.command]
        return importlib.import_module(module).run(arguments) or 0
    except (TrainingEndedError, ValueError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
        if isinstance(error, TrainingEndedError):
            print(f"hf-aegis {argv[0]}: {error}", file=sys.stderr)
            return 1
        # Messages of YAML and of the Hub span lines.
        print(f"hf-aegis {argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-aegis {argv[0]}: interrupted; start it again to continue", file=sys.stderr)
        return 130
