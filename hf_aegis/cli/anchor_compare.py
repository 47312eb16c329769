"""`hf-aegis anchor compare`: how far two anchors of the same base are from each other, layer by layer."""

import argparse
from typing import TYPE_CHECKING

from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.cli.text_table import text_table


if TYPE_CHECKING:
    from hf_aegis.anchors import ActivationAnchor


def configure(parser: CommandParser) -> None:
    """Adds the options."""
    parser.add_argument("first", metavar="FOLDER_OR_REPO", help="folder of an anchor, or a data set on the Hub")
    parser.add_argument("second", metavar="FOLDER_OR_REPO", help="another anchor of the same model")
    parser.add_argument("--first_revision", help="branch, tag or commit of the first on the Hub")
    parser.add_argument("--second_revision", help="branch, tag or commit of the second on the Hub")


def run(arguments: argparse.Namespace) -> int:
    """
    Prints in what the anchors' fingerprints differ, and a table of the layers' distances.

    Raises:
        OSError: if there is no such anchor.
        ValueError: if one cannot be read, or they are of different models.
    """
    from hf_aegis.anchors import ActivationAnchor

    first = ActivationAnchor.from_pretrained(arguments.first, revision=arguments.first_revision)
    second = ActivationAnchor.from_pretrained(arguments.second, revision=arguments.second_revision)
    distances = format_distances(first, second)
    print(format_differences(first, second))
    print()
    print(distances)
    return 0


def format_differences(first: "ActivationAnchor", second: "ActivationAnchor") -> str:
    """A line for each field of the fingerprints that differs."""
    one, other = first.fingerprint.to_dict(), second.fingerprint.to_dict()
    lines = [
        f"{name:<24}  {one.get(name)}  |  {other.get(name)}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
    return "\n".join(lines) or "the fingerprints agree"


def format_distances(first: "ActivationAnchor", second: "ActivationAnchor") -> str:
    """
    A table with a line for each layer: squared 2-Wasserstein distance per hidden dimension, the parts of it that come
    from means and from standard deviations, and the distance as a share of the first anchor's mean variance.
    """
    from hf_aegis.anchors.comparison import layer_distances

    scales = first.variance.double().mean(dim=-1).tolist()
    rows = [
        (str(layer), f"{means + stds:.4g}", f"{means:.4g}", f"{stds:.4g}", _share(means + stds, scale))
        for layer, (means, stds, scale) in enumerate(
            zip(*layer_distances(first, second).tolist(), scales, strict=True)
        )
    ]
    return text_table(("layer", "distance", "of means", "of stds", "of variance"), rows)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f} %" if whole > 0 else "-"
