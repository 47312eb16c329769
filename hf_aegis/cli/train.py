"""`hf-aegis train`: one training run from a recipe."""

import argparse
import json
import logging

from hf_aegis.cli.command_parser import CommandParser


def configure(parser: CommandParser) -> None:
    """Makes the fields of the run's and of the training's arguments the options."""
    parser.take_recipe(*recipe_classes())


def recipe_classes() -> tuple[type, type]:
    """What a recipe of this command holds: the run's arguments and the training's."""
    # When imported, it warns of a missing kernel that only 4-bit models on a CPU would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    from hf_aegis.training import AEGISConfig
    from hf_aegis.training.run_arguments import RunArguments

    return RunArguments, AEGISConfig


def run(arguments: argparse.Namespace) -> int:
    """
    Trains, evaluates and prints the result; pushes it where the recipe asks for it.

    Raises:
        ValueError: If the recipe holds a token, or something in it does not fit.
        OSError: If a file is missing, or the finished run cannot be pushed.
    """
    from transformers.utils.logging import set_verbosity_warning

    from hf_aegis.reports.run_figures import draw_run_figures
    from hf_aegis.training.run import run_training

    run_arguments, training_arguments = arguments.recipe
    if training_arguments.hub_token is not None:
        raise ValueError(
            "hub_token: a command line or a recipe is no place for a token, others can read it there; log in with "
            "`hf auth login`, or set HF_TOKEN"
        )
    set_verbosity_warning()
    result = run_training(run_arguments, training_arguments, illustrate=draw_run_figures)
    if training_arguments.process_index == 0:
        print(json.dumps({k: v for k, v in result.items() if k not in ("versions", "fingerprints")}, indent=2))
    return 0
