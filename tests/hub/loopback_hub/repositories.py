"""Repositories: made, deleted, moved, described; their branches, tags, history and trees."""

from urllib.parse import parse_qs

import yaml

from loopback_hub.server import Answer, Request
from loopback_hub.store import Blob, Commit, HubError, Repository, Store


_DATE = "2025-01-01T00:00:00.000Z"


def whoami(store: Store, request: Request) -> Answer:
    user = store.user(request.token)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    role = "write" if user.may_write else "read"
    return Answer.of(
        {
            "type": "user",
            "name": user.name,
            "fullname": user.name,
            "orgs": [{"type": "org", "name": name, "roleInOrg": role} for name in user.organisations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}},
        }
    )


def create(store: Store, request: Request) -> Answer:
    user, wanted = store.user(request.token), request.json()
    if user is None:
        raise HubError(401, "Invalid username or password.")
    kind, namespace = wanted.get("type") or "model", wanted.get("organization") or user.name
    repo_id = f"{namespace}/{wanted['name']}"
    url = f"{request.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if not user.may_write or namespace not in user.namespaces:
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    if (kind, repo_id) in store.repositories:
        return Answer.of({"error": f"You already created this {kind} repo", "url": url}, 409)
    store.repositories[kind, repo_id] = Repository(
        kind, repo_id, private=wanted.get("visibility") == "private", sdk=wanted.get("sdk"), large=store.large
    )
    return Answer.of({"url": url, "name": repo_id, "id": repo_id})


def delete(store: Store, request: Request) -> Answer:
    user, wanted = store.user(request.token), request.json()
    kind = wanted.get("type") or "model"
    repo_id = f"{wanted.get('organization') or getattr(user, 'name', None)}/{wanted['name']}"
    store.writable(kind, repo_id, user)
    del store.repositories[kind, repo_id]
    return Answer()


def move(store: Store, request: Request) -> Answer:
    wanted = request.json()
    repository = store.writable(wanted["type"], wanted["fromRepo"], store.user(request.token))
    if (target := (wanted["type"], wanted["toRepo"])) in store.repositories:
        raise HubError(409, f"{wanted['toRepo']} exists already")
    del store.repositories[wanted["type"], wanted["fromRepo"]]
    repository.repo_id = wanted["toRepo"]
    store.repositories[target] = repository
    return Answer.of({})


def settings(store: Store, request: Request, kind: str, repo_id: str) -> Answer:
    repository, wanted = store.writable(kind, repo_id, store.user(request.token)), request.json()
    repository.private = wanted.get("visibility", "private" if repository.private else "public") == "private"
    repository.gated = bool(wanted.get("gated", repository.gated))
    return Answer.of({})


def info(store: Store, request: Request, kind: str, repo_id: str, revision: str = "main") -> Answer:
    repository = store.find(kind, repo_id, store.user(request.token))
    commit = repository.resolve(revision)
    card = _front_matter(commit)
    described = {
        "_id": commit.oid[:24],
        "id": repo_id,
        **({"modelId": repo_id} if kind == "model" else {}),
        "author": repo_id.split("/")[0],
        "sha": commit.oid,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": _DATE,
        "lastModified": _DATE,
        "tags": card.get("tags") or [],
        "cardData": card,
        **{name: card[name] for name in ("library_name", "pipeline_tag") if name in card},
        **({"sdk": repository.sdk} if repository.sdk else {}),
        "siblings": [
            {"rfilename": name, **(_described(name, blob) if "blobs" in request.query else {})}
            for name, blob in sorted(commit.files.items())
        ],
    }
    return Answer.of(described)


def branch(store: Store, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = store.writable(kind, repo_id, store.user(request.token))
    if request.method == "DELETE":
        if repository.branches.pop(revision, None) is None:
            raise HubError(404, f"Reference does not exist: {revision}", "RevisionNotFound")
        return Answer()
    if revision in repository.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{revision}")
    repository.branches[revision] = repository.resolve(request.json().get("startingPoint") or "main").oid
    return Answer.of({}, 201)


def tag(store: Store, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = store.writable(kind, repo_id, store.user(request.token))
    if request.method == "DELETE":
        if repository.tags.pop(revision, None) is None:
            raise HubError(404, f"Reference does not exist: {revision}", "RevisionNotFound")
        return Answer()
    name = request.json()["tag"]
    if name in repository.tags:
        raise HubError(409, f"Tag reference exists already: {name}")
    repository.tags[name] = repository.resolve(revision).oid
    return Answer.of({}, 201)


def refs(store: Store, request: Request, kind: str, repo_id: str) -> Answer:
    repository = store.find(kind, repo_id, store.user(request.token))

    def described(prefix: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": oid} for name, oid in names.items()]

    return Answer.of(
        {
            "branches": described("refs/heads/", repository.branches),
            "converts": [],
            "tags": described("refs/tags/", repository.tags),
            "pullRequests": described("", repository.pulls),
        }
    )


def commits(store: Store, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = store.readable(kind, repo_id, store.user(request.token))
    return Answer.of(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": "",
                "date": _DATE,
                "authors": [{"user": commit.author, "avatar": ""}],
            }
            for commit in repository.history(revision)
        ]
    )


def tree(store: Store, request: Request, kind: str, repo_id: str, revision: str, path: str = "") -> Answer:
    repository = store.readable(kind, repo_id, store.user(request.token))
    commit = repository.resolve(revision)
    start = f"{path.strip('/')}/" if path.strip("/") else ""
    below = {name: blob for name, blob in sorted(commit.files.items()) if name.startswith(start)}
    if start and not below:
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries = [_entry(name, blob) for name, blob in below.items() if recursive or "/" not in name[len(start) :]]
    folders = {
        start + "/".join(parts[: depth + 1])
        for parts in (name[len(start) :].split("/") for name in below)
        for depth in range(len(parts) - 1)
        if recursive or depth == 0
    }
    return Answer.of(
        [{"type": "directory", "path": folder, "oid": commit.oid, "size": 0} for folder in sorted(folders)] + entries,
        headers={"X-Repo-Commit": commit.oid},
    )


def paths_info(store: Store, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = store.readable(kind, repo_id, store.user(request.token))
    commit = repository.resolve(revision)
    if "json" in request.headers.get("content-type", ""):
        paths = request.json()["paths"]
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    entries = []
    for path in paths:
        if path in commit.files:
            entries.append(_entry(path, commit.files[path]))
        elif any(name.startswith(f"{path}/") for name in commit.files):
            entries.append({"type": "directory", "path": path, "oid": commit.oid, "size": 0})
    return Answer.of(entries)


def _entry(name: str, blob: Blob) -> dict[str, object]:
    commit = {"id": "0" * 40, "title": "", "date": _DATE}
    return {"type": "file", "path": name, "lastCommit": commit, **_described(name, blob)}


def _described(name: str, blob: Blob) -> dict[str, object]:
    large = {"oid": blob.sha256, "sha256": blob.sha256, "size": len(blob.data), "pointerSize": 130}
    return {"size": len(blob.data), "oid": blob.oid, "blobId": blob.oid, **({"lfs": large} if blob.large else {})}


def _front_matter(commit: Commit) -> dict[str, object]:
    text = commit.files["README.md"].data.decode() if "README.md" in commit.files else ""
    parts = text.split("---\n", 2)
    return (yaml.safe_load(parts[1]) or {}) if len(parts) == 3 and not parts[0].strip() else {}
