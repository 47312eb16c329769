"""Files of a repository on the Hub, all of the same commit, and each what the Hub says it is."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download

from hf_aegis.hub.answers import checked_answers
from hf_aegis.hub.names import is_commit, is_file_name
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
    was asked for, though somebody may push in the meantime. What arrives is hashed, and what was there before as well:
    the Hub names a file by the SHA-256 of its content, or a small one by the hash that git has for it.

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
            see it, the Hub is out of reach and the file not in the cache, or its content is not what the Hub
            announced; the file is deleted then, to be downloaded again.
        ValueError: if a name leads out of the repository.
    """
    if wrong := [name for name in names if not is_file_name(f"{subfolder}/{name}" if subfolder else name)]:
        raise ValueError(f"no file of {describe_repo(repo_id, repo_type)} can have the name {wrong[0]!r}")
    place = f"{describe_repo(repo_id, repo_type, revision or 'main')} on the Hub"
    files: list[Path] = []
    commit = revision
    for name in names:
        path = f"{subfolder}/{name}" if subfolder else name
        try:
            with checked_answers():
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
            raise HubDownloadError(f"no {path} from {place}: {reason(error, token)}") from redacted_cause(error, token)
        if fault := _damage(Path(file)):
            raise HubDownloadError(f"no {path} from {place}: {fault}; what arrived is deleted, try again")
        files.append(Path(file))
        if len(files) == 1:
            # The cache keeps a folder for each commit, with the repository's paths below it.
            commit = files[0].parents[len(PurePosixPath(path).parts) - 1].name
            if not is_commit(commit):
                raise HubDownloadError(f"no {path} from {place}: it is said to be of {commit!r}, which is no commit")
    return files


def _damage(file: Path) -> str | None:
    """What is wrong with a content, which is deleted then; `None` too where the cache does not say what it is."""
    # The cache's entry is a link to the content, which bears the hash as its name.
    if not file.is_symlink():
        return None
    announced = Path(os.readlink(file)).name
    with file.open("rb") as content:
        if re.fullmatch("[0-9a-f]{64}", announced):
            found = hashlib.file_digest(content, "sha256").hexdigest()
        else:
            git = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
            while data := content.read(1 << 20):
                git.update(data)
            found = git.hexdigest()
    if found == announced:
        return None
    file.resolve().unlink()
    file.unlink()
    return f"its content has the hash {found}, and the Hub announced {announced!r}"
