"""`hf-aegis anchor inspect`: what an anchor was collected from, and the rank of every subspace in it."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_aegis.cli.command_parser import CommandParser


if TYPE_CHECKING:
    from hf_aegis.anchors import AnchorFingerprint, InputSubspace


def configure(parser: CommandParser) -> None:
    """Adds the options."""
    parser.add_argument("anchor", metavar="FOLDER_OR_REPO", help="folder of the anchor, or a data set on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def run(arguments: argparse.Namespace) -> int:
    """
    Prints the anchor's fingerprint, and a table of its subspaces.

    Raises:
        OSError: if there is no such anchor.
        ValueError: if it cannot be read.
    """
    from hf_aegis.anchors import ActivationAnchor

    anchor = ActivationAnchor.from_pretrained(arguments.anchor, revision=arguments.revision)
    print(format_fingerprint(anchor.fingerprint))
    print()
    print(format_subspaces(anchor.subspaces) if anchor.subspaces else "no subspaces")
    return 0


def format_fingerprint(fingerprint: "AnchorFingerprint") -> str:
    """One line for each field; those of the subspaces' options are indented."""
    lines = []
    for name, value in fingerprint.to_dict().items():
        if isinstance(value, Mapping):
            lines += [name, *(f"  {inner:<22}  {_shown(option)}" for inner, option in value.items())]
        else:
            lines.append(f"{name:<24}  {_shown(value)}")
    return "\n".join(lines)


def format_subspaces(subspaces: "Mapping[str, InputSubspace]") -> str:
    """A table with a line for each subspace: linear layers, width, rank, share of the energy, number of inputs."""
    heads = ("input of", "width", "rank", "energy", "inputs")
    rows = [
        (
            _shared(subspace.linears),
            f"{subspace.width:,}",
            f"{subspace.rank:,}",
            f"{100 * subspace.energy_share:.3f} %",
            f"{subspace.num_inputs:,}",
        )
        for subspace in subspaces.values()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (heads, *rows)
    )


def _shared(linears: tuple[str, ...]) -> str:
    """Layers beside each other have the same path but for its end, which is told once."""
    parents = {name.rpartition(".")[0] for name in linears}
    if len(parents) > 1:
        return ", ".join(linears)
    return ", ".join([linears[0], *(name.rpartition(".")[2] for name in linears[1:])])


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
