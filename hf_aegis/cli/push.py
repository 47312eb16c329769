"""`hf-aegis push`: what a folder holds, an anchor, a policy, an adapter or results, on the Hub with its card."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_aegis.cli.data_licenses import known_license
from hf_aegis.hub import push_folder


# What tells a folder, in the order in which it is asked.
_MARKS = {
    "anchor": "anchor_config.json",
    "comparison": "compare.json",
    "adapter": "adapter_config.json",
    "model": "config.json",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds what is pushed, where to, and how."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="an anchor, a run's output folder or a model, an adapter, or the output folder of a comparison",
    )
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository, created where it is missing")
    parser.add_argument("--private", action="store_true", help="make a new repository private; refuse a public one")
    parser.add_argument("--revision", help="branch to push to, created where it is missing (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request in the place of a commit")
    parser.add_argument("--commit_message", help="first line of the commit's message")
    parser.add_argument(
        "--dataset_license",
        help="licence of the data that an anchor was collected on, for its card, by the Hub's name for it; that of "
        "easy-vqa is known",
    )
    parser.add_argument(
        "--keep_card", action="store_true", help="push README.md as it is, rather than write it anew from the results"
    )


def run(arguments: argparse.Namespace) -> int:
    """
    Writes the card, pushes everything in one commit, and prints where it is. The token is that of `HF_TOKEN` or of
    `hf auth login`.

    Raises:
        ValueError: If the folder holds nothing that is known here.
        OSError: If the push fails; the folder stays as it is.
    """
    folder: Path = arguments.folder
    kind = recognise(folder)
    if arguments.dataset_license is not None and kind != "anchor":
        raise ValueError(f"--dataset_license is for the card of an anchor, and {folder} holds a {kind}")
    options = {
        # Not False, which would ask for a public one.
        "private": arguments.private or None,
        "revision": arguments.revision,
        "create_pr": arguments.create_pr,
        "commit_message": arguments.commit_message,
        **({"dataset_license": arguments.dataset_license} if kind == "anchor" else {}),
    }
    push: dict[str, Callable[..., Any]] = {
        "anchor": _push_anchor,
        "comparison": _push_comparison,
        "adapter": _push_model,
        "model": _push_model,
    }
    commit = push[kind](folder, arguments.repo_id, arguments.keep_card, options)
    print(f"{kind}: {commit.pr_url or commit.commit_url}")
    return 0


def recognise(folder: Path) -> str:
    """
    What a folder holds: `"anchor"`, `"comparison"`, `"adapter"` or `"model"`.

    Raises:
        ValueError: If it holds none of them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    for kind, mark in _MARKS.items():
        if (folder / mark).is_file():
            return kind
    raise ValueError(
        f"{folder} holds nothing to push: expected one of "
        + ", ".join(f"{mark} ({kind})" for kind, mark in _MARKS.items())
    )


def _push_anchor(folder: Path, repo_id: str, keep_card: bool, options: dict[str, Any]) -> Any:
    from hf_aegis.anchors import ActivationAnchor
    from hf_aegis.anchors.publication import push_anchor

    anchor = ActivationAnchor.from_pretrained(folder)
    options["dataset_license"] = options["dataset_license"] or known_license(anchor.fingerprint.dataset_id)
    return push_anchor(anchor, folder, repo_id, keep_card=keep_card, **options)


def _push_comparison(folder: Path, repo_id: str, keep_card: bool, options: dict[str, Any]) -> Any:
    from hf_aegis.reports.results_card import PUSHED_FILES, write_results_card

    if not keep_card:
        write_results_card(folder, repo_id)
    return push_folder(folder, repo_id, repo_type="dataset", allow_patterns=PUSHED_FILES, **options)


def _push_model(folder: Path, repo_id: str, keep_card: bool, options: dict[str, Any]) -> Any:
    from hf_aegis.publishing import write_card
    from hf_aegis.reports.run_figures import draw_run_figures
    from hf_aegis.training.run_upload import push_run

    if not keep_card:
        draw_run_figures(folder)
        write_card(folder, repo_id)
    return push_run(folder, repo_id, **options)
