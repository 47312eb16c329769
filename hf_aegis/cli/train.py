"""`hf-aegis train`: one training run from a recipe."""

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`; every other option is a field of the run's or the training's arguments."""
    parser.add_argument("--config", help="recipe (YAML); options given on the command line win")
    parser.set_defaults(overrides=[])
    parser.epilog = (
        "All fields of hf_aegis.training.run.RunArguments and hf_aegis.training.AEGISConfig (and so of transformers' "
        "TrainingArguments) are options: --output_dir out --max_steps 1500 --preserve projection ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates and prints the result."""
    from transformers import logging
    from trl import TrlParser

    from hf_aegis.training import AEGISConfig
    from hf_aegis.training.run import RunArguments, run_training

    parser = TrlParser([RunArguments, AEGISConfig], prog="hf-aegis train")  # type: ignore[list-item]
    config = [] if arguments.config is None else ["--config", arguments.config]
    run_arguments, training = parser.parse_args_and_config([*config, *arguments.overrides])
    logging.set_verbosity_warning()
    result = run_training(run_arguments, training)
    print(json.dumps({k: v for k, v in result.items() if k not in ("versions", "fingerprints")}, indent=2))
    return 0
