"""A policy pushed to the Hub by its own method: weights, configuration, and a card that says what it is."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from hf_aegis.hub import HubDownloadError, download_files, ensure_repo, push_folder


_CARD = "README.md"
# In cards that transformers makes where there is none.
_UNFILLED = "[More Information Needed]"

WEIGHTS = "model*.safetensors*"
"""A model's weights, whole or in shards, and what says which is where."""


def push_policy(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] = (),
) -> CommitInfo:
    """
    What `PaliGemmaFlowForAction.push_to_hub` does. A card that somebody has written stays.

    Raises:
        ValueError: if `revision` is a commit, or is given together with `create_pr`.
        HubUploadError: if the push fails. All that was to be pushed stays in a folder, which the error names.
    """
    # Cards are written from what a training leaves, which is above the models; here they are of a model alone.
    from hf_aegis.publishing import CardOptions, write_card

    repo_id = ensure_repo(repo_id, private=private, revision=revision, token=token, create_pr=create_pr)
    folder = Path(tempfile.mkdtemp(prefix="hf-aegis-policy-"))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if not _has_card(repo_id, revision, token):
        write_card(folder, repo_id, CardOptions(tags=tags))
    commit = push_folder(
        folder,
        repo_id,
        private=private,
        revision=revision,
        token=token,
        commit_message=commit_message or f"Upload {type(model).__name__}",
        create_pr=create_pr,
        # Weights in shards and whole, one of them old, would be loaded from whichever comes first.
        delete_patterns=WEIGHTS,
    )
    shutil.rmtree(folder)
    return commit


def _has_card(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    try:
        (card,) = download_files(repo_id, [_CARD], revision=revision, token=token)
    except HubDownloadError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return False
        raise
    return _UNFILLED not in card.read_text(encoding="utf-8")
