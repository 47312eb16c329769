"""Files of a repository on the Hub, all of the same commit."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download

from hf_aegis.hub.reasons import FAILURES, describe_repo, reason
from hf_aegis.hub.redaction import redacted_cause


class HubDownloadError(OSError):
    """A file did not come. The text says which, from where, why, and what to do about it."""


def download_files(
    repo_id: str,
    names: Sequence[str],
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> list[Path]:
    """
    Downloads files into the cache, or finds them there. All are of the commit that `revision` meant when the first one
    was asked for, though somebody may push in the meantime.

    Args:
        repo_id (`str`):
            `"org/name"`.
        names (`Sequence[str]`):
            Files, relative to `subfolder`.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.
        revision (`str`, *optional*):
            Branch, tag or commit; the main branch by default.
        token (`str` or `bool`, *optional*):
            Token for the Hub; that of the environment or the login by default.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where downloads are kept.
        local_files_only (`bool`, *optional*, defaults to `False`):
            Uses the cache only, without a network call.
        subfolder (`str`, *optional*):
            Folder of the repository that the names are relative to.

    Returns:
        `list[Path]`: the files in the cache, in the order of `names`.

    Raises:
        HubDownloadError: if a file cannot be had: there is no such repository, revision or file, the token may not
            see it, or the Hub is out of reach and the file not in the cache.
    """
    files: list[Path] = []
    commit = revision
    for name in names:
        path = f"{subfolder}/{name}" if subfolder else name
        try:
            file = hf_hub_download(
                repo_id,
                path,
                repo_type=repo_type,
                revision=commit,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
            )
        except FAILURES as error:
            raise HubDownloadError(
                f"no {path} from {describe_repo(repo_id, repo_type, revision or 'main')} on the Hub: "
                f"{reason(error, token)}"
            ) from redacted_cause(error, token)
        files.append(Path(file))
        # The cache keeps a folder for each commit, with the repository's paths below it.
        commit = files[0].parents[len(PurePosixPath(path).parts) - 1].name if len(files) == 1 else commit
    return files
