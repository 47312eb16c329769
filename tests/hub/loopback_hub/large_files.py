"""Uploads of large files, after git-lfs: where to send each one that is missing, the content, and a check."""

import hashlib

from loopback_hub.server import Answer, Request
from loopback_hub.store import HubError, Store


def batch(store: Store, request: Request, kind: str, repo_id: str) -> Answer:
    # Whoever may open a pull request may send files for it.
    store.writable(kind, repo_id, store.user(request.token), pull_request=True)

    def action(found: dict) -> dict:
        address = f"{request.url}/lfs/{found['oid']}"
        actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
        return {**found, "authenticated": True, **({} if found["oid"] in store.large else {"actions": actions})}

    return Answer.of({"transfer": "basic", "objects": [action(found) for found in request.json()["objects"]]})


def receive(store: Store, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the announced SHA-256.")
    store.large[oid] = request.body
    return Answer()


def verify(store: Store, request: Request, oid: str) -> Answer:
    if len(store.large.get(oid, b"")) != request.json()["size"]:
        raise HubError(404, "No such object of that size.")
    return Answer.of({})
