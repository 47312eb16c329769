"""Which commit of a repository on the Hub is meant: a branch may hold something else tomorrow."""

import logging
from pathlib import Path
from typing import Literal

from hf_aegis.hub.names import is_commit
from hf_aegis.hub.reasons import FAILURES, reason


logger = logging.getLogger(__name__)

# Seconds; the answer is no more than a record.
_TIMEOUT = 10.0


def hub_commit(kind: Literal["model", "dataset"], source: str, revision: str | None = None) -> str | None:
    """
    The commit that a model or dataset is loaded at.

    Args:
        kind (`str`): `"model"` or `"dataset"`.
        source (`str`): id on the Hub, or a path.
        revision (`str`, *optional*): branch, tag or commit; by default the main branch.

    Returns:
        `str`: the commit's hash; `revision` as it is of a path, and, with a warning, where the Hub does not say.
    """
    if Path(source).exists() or is_commit(revision):
        return revision
    from huggingface_hub import dataset_info, model_info

    try:
        if kind == "model":
            commit = model_info(source, revision=revision, timeout=_TIMEOUT).sha
        else:
            commit = dataset_info(source, revision=revision, timeout=_TIMEOUT).sha
        if not is_commit(commit):
            raise ValueError(f"the Hub says that it is {commit!r}, which is no commit")
    except FAILURES as error:
        logger.warning(
            "the commit of the %s %s is not known, so that a change of its branch would go unnoticed: %s",
            kind,
            source,
            reason(error),
        )
        return revision
    return commit
