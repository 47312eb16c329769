"""Commits, as huggingface_hub sends them: a question how each file is to come, and then lines of JSON."""

import base64
import json

from loopback_hub.server import Answer, Request
from loopback_hub.store import LARGE_SUFFIXES, Blob, HubError, Store


def preupload(store: Store, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    asked = bool(request.query.get("create_pr"))
    repository = store.writable(kind, repo_id, store.user(request.token), pull_request=asked)
    files = repository.resolve(revision).files
    return Answer.of(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file) else "regular",
                    "shouldIgnore": False,
                    "oid": files[file["path"]].etag if file["path"] in files else None,
                }
                for file in request.json()["files"]
            ]
        }
    )


def commit(store: Store, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    user = store.user(request.token)
    asked = bool(request.query.get("create_pr"))
    repository = store.writable(kind, repo_id, user, pull_request=asked)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header, operations = lines[0]["value"], lines[1:]
    parent = repository.resolve(revision)
    if not asked and revision not in repository.branches and revision not in repository.pulls:
        raise HubError(400, f"Invalid reference for a commit: {revision}")
    if (expected := header.get("parentCommit")) and not parent.oid.startswith(expected):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for operation in operations:
        path = operation["value"]["path"]
        if operation["key"] == "file":
            files[path] = Blob(base64.b64decode(operation["value"]["content"]), large=False)
        elif operation["key"] == "lfsFile":
            if operation["value"]["oid"] not in store.large:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob(store.large[operation["value"]["oid"]], large=True)
        elif operation["key"] == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif operation["key"] == "deletedFolder":
            files = {name: blob for name, blob in files.items() if not name.startswith(f"{path.rstrip('/')}/")}
        else:
            raise HubError(400, f"Unknown operation {operation['key']}")
    made = repository.add(files, header["summary"], parent.oid, user.name)
    prefix = f"{request.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{prefix}/commit/{made.oid}"}
    if asked:
        number = len(repository.pulls) + 1
        repository.pulls[f"refs/pr/{number}"] = made.oid
        answer["pullRequestUrl"] = f"{prefix}/discussions/{number}"
    elif revision in repository.pulls:
        repository.pulls[revision] = made.oid
    else:
        repository.branches[revision] = made.oid
    return Answer.of(answer)


def _is_large(file: dict) -> bool:
    sample = base64.b64decode(file["sample"])
    return file["path"].endswith(LARGE_SUFFIXES) or file["size"] > 10_000_000 or b"\0" in sample
