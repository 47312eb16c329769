"""A local folder pushed to a repository on the Hub, in one commit."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from hf_aegis.hub.names import is_commit
from hf_aegis.hub.reasons import FAILURES, describe_repo, reason
from hf_aegis.hub.redaction import redacted, redacted_cause


# Files that are being written beside their targets, see `atomic_files`.
_STAGED = (".*.tmp", "*/.*.tmp")


class HubUploadError(OSError):
    """
    A folder was not pushed. The text says why, that the folder is whole, and how to try again.

    Args:
        text (`str`):
            All of it.
        why (`str`, *optional*):
            The part of it that says why.
    """

    def __init__(self, text: str, why: str = "") -> None:
        super().__init__(text)
        self.why = why


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    allow_patterns: Sequence[str] | str | None = None,
    ignore_patterns: Sequence[str] | str | None = None,
    delete_patterns: Sequence[str] | str | None = None,
    replacements: Mapping[str, bytes] | None = None,
    space_sdk: str | None = None,
) -> CommitInfo:
    """
    Pushes the files of a folder to a repository, which is created where it is missing. They arrive in one commit: all
    of them or none. Files that the repository has besides stay, but for those that are to be deleted.

    Args:
        folder (`str` or `os.PathLike`):
            The folder. It is only read.
        repo_id (`str`):
            `"org/name"`, or `"name"` for a repository of one's own.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.
        private (`bool`, *optional*):
            Whether a new repository is private; by default, as the namespace has it. A repository that exists keeps
            its visibility: to ask for a private one and find a public one is an error, before anything is uploaded.
        revision (`str`, *optional*):
            Branch, started from the main branch where it is missing.
        token (`str` or `bool`, *optional*):
            Token for the Hub; that of the environment or the login by default.
        commit_message (`str`, *optional*):
            First line of the commit's message.
        create_pr (`bool`, *optional*, defaults to `False`):
            Opens a pull request to the main branch in the place of a commit.
        allow_patterns, ignore_patterns (`Sequence[str]` or `str`, *optional*):
            Which files to push, and which of these not to, e.g. `"*.json"`.
        delete_patterns (`Sequence[str]` or `str`, *optional*):
            Which files of the repository are deleted in the same commit, unless they are pushed again: what would not
            go with the new ones.
        replacements (`Mapping[str, bytes]`, *optional*):
            What is pushed in the place of a file's own content, by its path in the folder.
        space_sdk (`str`, *optional*):
            What a new Space runs on, e.g. `"gradio"`.

    Returns:
        `CommitInfo`: of huggingface_hub: `commit_url`, `oid`, `pr_url`.

    Raises:
        ValueError: if `revision` is a commit, or is given together with `create_pr`.
        HubUploadError: if the folder holds no file to push, or the push fails for whatever reason.
    """
    folder = Path(folder)
    _check_branch(revision, create_pr)
    try:
        additions = _additions(folder, allow_patterns, ignore_patterns, replacements or {})
        target = _prepare(repo_id, repo_type, private, None if create_pr else revision, token, space_sdk)
        api = HfApi(token=token)
        deletions = []
        if delete_patterns is not None:
            there = set(api.list_repo_files(target, repo_type=repo_type, revision=revision))
            gone = there - {".gitattributes", *(addition.path_in_repo for addition in additions)}
            chosen = filter_repo_objects(sorted(gone), allow_patterns=_listed(delete_patterns))
            deletions = [CommitOperationDelete(path_in_repo=name) for name in chosen]
        return api.create_commit(
            target,
            [*additions, *deletions],
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )
    except FAILURES as error:
        why = reason(error, token)
        text = f"{folder.absolute()} was not pushed to {describe_repo(repo_id, repo_type, revision)}: {why}"
        if folder.is_dir():
            text += ". The folder is whole; to try again, repeat the call"
            # The command would publish in a public repository what was to be private, and contents that were replaced.
            if not (private or replacements):
                patterns = {"--include": allow_patterns, "--exclude": ignore_patterns, "--delete": delete_patterns}
                command = _command(folder, repo_id, repo_type, revision, create_pr, patterns)
                text += f", or run `{command}`"
        raise HubUploadError(redacted(text, token), why) from redacted_cause(error, token)


def ensure_repo(
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """
    Creates a repository, and a branch of it, where they are missing, so that what would keep a later push from
    succeeding is known now.

    Args:
        repo_id, repo_type, private, revision, token, create_pr: as of [`push_folder`].

    Returns:
        `str`: the repository's id, with its namespace.

    Raises:
        ValueError: if `revision` is a commit, or is given together with `create_pr`.
        HubUploadError: if there is none to push to.
    """
    _check_branch(revision, create_pr)
    try:
        return _prepare(repo_id, repo_type, private, None if create_pr else revision, token, None)
    except FAILURES as error:
        why = reason(error, token)
        text = f"nothing can be pushed to {describe_repo(repo_id, repo_type, revision)}: {why}"
        raise HubUploadError(redacted(text, token), why) from redacted_cause(error, token)


def _check_branch(revision: str | None, create_pr: bool) -> None:
    if is_commit(revision):
        raise ValueError(f"revision must be a branch to push to, found the commit {revision}")
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"a pull request goes to the main branch: create_pr=True allows no revision, found {revision!r}"
        )


def _command(
    folder: Path,
    repo_id: str,
    repo_type: str,
    revision: str | None,
    create_pr: bool,
    patterns: Mapping[str, Sequence[str] | str | None],
) -> str:
    """The command line of huggingface_hub that does the same."""
    words = ["hf", "upload", repo_id, os.fspath(folder.absolute()), ".", "--repo-type", repo_type]
    words += ["--revision", revision] if revision else []
    words += ["--create-pr"] if create_pr else []
    for option, given in patterns.items():
        for pattern in _listed(given or ()):
            words += [option, pattern]
    return shlex.join(words)


def _additions(
    folder: Path,
    allow_patterns: Sequence[str] | str | None,
    ignore_patterns: Sequence[str] | str | None,
    replacements: Mapping[str, bytes],
) -> list[CommitOperationAdd]:
    """The files to push, in the order of their paths."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    chosen = filter_repo_objects(
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
        allow_patterns=None if allow_patterns is None else _listed(allow_patterns),
        ignore_patterns=[*_listed(ignore_patterns or ()), *DEFAULT_IGNORE_PATTERNS, *_STAGED],
    )
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=replacements.get(name, folder / name)) for name in chosen
    ]
    if not additions:
        raise FileNotFoundError("it holds no file to push")
    return additions


def _listed(patterns: Sequence[str] | str) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _prepare(
    repo_id: str,
    repo_type: str,
    private: bool | None,
    branch: str | None,
    token: str | bool | None,
    space_sdk: str | None,
) -> str:
    """The id of the repository, which exists from now on, as does its branch."""
    api = HfApi(token=token)
    target = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk).repo_id
    if private and not api.repo_info(target, repo_type=repo_type).private:
        raise PermissionError(
            "it exists and is public, and a private one was asked for: make it private in its settings on the Hub, or "
            "choose another id"
        )
    if branch not in (None, "main") and not branch.startswith("refs/"):
        api.create_branch(target, branch=branch, repo_type=repo_type, exist_ok=True)
    return target
