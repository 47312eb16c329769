"""`hf-aegis anchor inspect`: what an anchor was collected from, its subspaces' ranks, and what it is sensitive to."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.cli.text_table import text_table


if TYPE_CHECKING:
    from hf_aegis.anchors import AnchorFingerprint, InputSubspace, PairSensitivity


# Shares of the sensitivity that are worth holding.
_SHARES = (0.9, 0.95, 0.99)


def configure(parser: CommandParser) -> None:
    """Adds the options."""
    parser.add_argument("anchor", metavar="FOLDER_OR_REPO", help="folder of the anchor, or a data set on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def run(arguments: argparse.Namespace) -> int:
    """
    Prints the anchor's fingerprint, and tables of its subspaces and its sensitivities.

    Raises:
        OSError: if there is no such anchor.
        ValueError: if it cannot be read.
    """
    from hf_aegis.anchors import ActivationAnchor

    anchor = ActivationAnchor.from_pretrained(arguments.anchor, revision=arguments.revision)
    print(format_fingerprint(anchor.fingerprint))
    print()
    print(format_subspaces(anchor.subspaces) if anchor.subspaces else "no subspaces")
    if anchor.sensitivities:
        print()
        print(format_sensitivities(anchor.sensitivities, anchor.subspaces))
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
    from hf_aegis.anchors.summaries import subspace_rows

    heads = ("input of", "width", "rank", "energy", "inputs")
    rows = [
        (
            _shared(tuple(row["linears"])),
            f"{row['width']:,}",
            f"{row['rank']:,}",
            f"{100 * row['energy_share']:.3f} %",
            f"{row['num_inputs']:,}",
        )
        for row in subspace_rows(subspaces)
    ]
    return text_table(heads, rows)


def format_sensitivities(
    sensitivities: "Mapping[str, PairSensitivity]", subspaces: "Mapping[str, InputSubspace]"
) -> str:
    """
    A table with a line for each linear layer, and one for all of them: width and rank of outputs and inputs, share of
    the sensitivity over all layers, and the share of the weight's pairs of directions (out · in of them) that are
    held where 90, 95 or 99 % of the sensitivity over all layers is.
    """
    from hf_aegis.anchors.summaries import by_number
    from hf_aegis.gradients.held_pairs import largest_pairs

    inputs = {name: subspace.width for subspace in subspaces.values() for name in subspace.linears}
    values = {name: sensitivities[name].sensitivities.double() for name in sorted(sensitivities, key=by_number)}
    masks = [largest_pairs(values, share) for share in _SHARES]
    total = sum(float(table.sum()) for table in values.values())
    heads = ("weight of", "outputs", "rank", "inputs", "rank", "sensitivity", *(f"{share:.0%}" for share in _SHARES))
    rows, held, pairs = [], [0] * len(_SHARES), 0
    for name, table in values.items():
        width = sensitivities[name].output_basis.shape[0]
        largest = [int(mask[name].sum()) for mask in masks]
        rows.append(
            (
                name,
                f"{width:,}",
                f"{table.shape[0]:,}",
                f"{inputs[name]:,}",
                f"{table.shape[1]:,}",
                _percent(float(table.sum()), total),
                *(_percent(count, width * inputs[name]) for count in largest),
            )
        )
        held = [sum(counts) for counts in zip(held, largest, strict=True)]
        pairs += width * inputs[name]
    rows.append(("all", "", "", "", "", _percent(total, total), *(_percent(count, pairs) for count in held)))
    return text_table(heads, rows)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f} %" if whole > 0 else "-"


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
