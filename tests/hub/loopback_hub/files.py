"""Downloads: small files from the repository's address, large ones from another host."""

import re

from loopback_hub.server import Answer, Request
from loopback_hub.store import HubError, Store


def resolve(store: Store, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
    repository = store.readable(kind, repo_id, store.user(request.token))
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if path not in commit.files:
        missing = {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Answer(404, b"Entry not found", missing)
    blob = commit.files[path]
    if blob.large:
        # Another host name: on one and the same the client would follow at once, and not see the commit.
        address = f"{request.url.replace('127.0.0.1', 'localhost')}/lfs/{blob.sha256}"
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data)), "Location": address}
        return Answer(302, b"", {**headers, **linked})
    return _content(request, blob.data, {**headers, "ETag": f'"{blob.etag}"'})


def download_large(store: Store, request: Request, oid: str) -> Answer:
    if oid not in store.large:
        raise HubError(404, "No such object.")
    return _content(request, store.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    headers = {"Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Answer(200, data, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
    if start >= len(data):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
