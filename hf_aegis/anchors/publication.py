"""An anchor as a dataset repository on the Hub: its two files, tables that `datasets` can load, and a card."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, DatasetCardData

from hf_aegis.anchors.storage import ANCHOR_CONFIG, ANCHOR_TENSORS
from hf_aegis.anchors.summaries import layer_rows, subspace_rows
from hf_aegis.atomic_files import write_text
from hf_aegis.hub import is_repo_id, push_folder, render_card


if TYPE_CHECKING:
    from hf_aegis.anchors.anchor import ActivationAnchor

CARD = "README.md"
LAYERS_TABLE = "layers.jsonl"
SUBSPACES_TABLE = "subspaces.jsonl"
FILES = (ANCHOR_TENSORS, ANCHOR_CONFIG, LAYERS_TABLE, SUBSPACES_TABLE, CARD)

_TAGS = ["hf-aegis", "activation-anchor", "continual-learning", "vision-language-action", "arxiv:2604.16067"]


def push_anchor(
    anchor: "ActivationAnchor",
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dataset_license: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """
    Completes the folder that an anchor was saved in by its tables and its card, and pushes these files, and no others
    that lie there, to a dataset repository.

    Args:
        anchor ([`ActivationAnchor`]):
            The anchor.
        folder (`str` or `os.PathLike`):
            Where it was saved.
        repo_id (`str`):
            `"org/name"`.
        dataset_license (`str`, *optional*):
            Licence of the data that the anchor was collected on, by the Hub's name for it, such as `"cc-by-4.0"`.
        keep_card (`bool`, *optional*, defaults to `False`):
            Pushes the folder's `README.md` as it is; by default it is written anew.
        private, revision, token, commit_message, create_pr:
            See [`~hub.push_folder`].

    Returns:
        `CommitInfo`: of huggingface_hub.

    Raises:
        HubUploadError: if the push fails; the folder is whole then.
    """
    folder = Path(folder)
    _write_rows(folder / LAYERS_TABLE, layer_rows(anchor.mean, anchor.variance))
    if anchor.subspaces:
        _write_rows(folder / SUBSPACES_TABLE, subspace_rows(anchor.subspaces))
    else:
        (folder / SUBSPACES_TABLE).unlink(missing_ok=True)
    if not keep_card:
        write_text(folder / CARD, anchor_card(anchor, repo_id, revision=revision, dataset_license=dataset_license))
    return push_folder(
        folder,
        repo_id,
        repo_type="dataset",
        private=private,
        revision=revision,
        token=token,
        commit_message=commit_message or "Upload activation anchor",
        create_pr=create_pr,
        allow_patterns=FILES,
        # Of an earlier anchor with subspaces, where this one has none.
        delete_patterns=SUBSPACES_TABLE,
    )


def anchor_card(
    anchor: "ActivationAnchor", repo_id: str, *, revision: str | None = None, dataset_license: str | None = None
) -> str:
    """
    The card of an anchor's repository: what it is and how to load it, what it was collected from, its tables.

    Args:
        anchor ([`ActivationAnchor`]):
            The anchor.
        repo_id (`str`):
            Where it goes.
        revision (`str`, *optional*):
            The branch it goes to, if that is not the main one.
        dataset_license (`str`, *optional*):
            Licence of the data that it was collected on.
    """
    fingerprint = anchor.fingerprint
    base_model = fingerprint.base_model or "an unnamed model"
    dataset, _, split = (fingerprint.dataset_id or "data without a name").partition(":")
    subspaces = subspace_rows(anchor.subspaces)
    tables = [("layers", LAYERS_TABLE), *([("subspaces", SUBSPACES_TABLE)] if subspaces else [])]
    data = DatasetCardData(
        license=dataset_license,
        pretty_name=f"Activation anchor of {base_model}",
        tags=_TAGS,
        size_categories="n<1K",
        configs=[
            {"config_name": name, "data_files": file, **({"default": True} if name == "layers" else {})}
            for name, file in tables
        ],
        base_model=base_model if is_repo_id(base_model) else None,
    )
    return render_card(
        "anchor.md",
        data,
        repo_id=repo_id,
        branch=revision if revision not in (None, "main") else None,
        anchored=_linked(base_model, "", fingerprint.revision),
        dataset=_linked(dataset, "datasets/"),
        split=split,
        dataset_license=dataset_license,
        fingerprint=fingerprint,
        options=fingerprint.subspace_options,
        layers=layer_rows(anchor.mean, anchor.variance),
        subspaces=subspaces,
        num_values=anchor.mean.numel() + anchor.variance.numel(),
        tables=tables,
    )


def _linked(name: str, prefix: str, commit: str | None = None) -> str:
    if not is_repo_id(name):
        return f"`{name}`" if " " not in name else name
    return f"[{name}](https://huggingface.co/{prefix}{name}{f'/tree/{commit}' if commit else ''})"


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
