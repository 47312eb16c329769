"""`hf-aegis anchor merge`: one anchor from several that were collected on parts of the same data."""

import argparse

from hf_aegis.cli.command_parser import CommandParser


def configure(parser: CommandParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "anchors", nargs="+", metavar="FOLDER_OR_REPO", help="folder of an anchor, or a data set on the Hub"
    )
    parser.add_argument("--output_dir", required=True, help="folder for the merged anchor")


def run(arguments: argparse.Namespace) -> int:
    """
    Writes the merged anchor.

    Raises:
        OSError: if there is no such anchor.
        ValueError: if one cannot be read, or they do not merge.
    """
    from hf_aegis.anchors import ActivationAnchor

    anchor = ActivationAnchor.merge([ActivationAnchor.from_pretrained(name) for name in arguments.anchors])
    folder = anchor.save_pretrained(arguments.output_dir)
    print(f"{anchor}\nsaved to {folder}")
    return 0
