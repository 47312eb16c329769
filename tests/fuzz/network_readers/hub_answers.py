"""Answers of the Hub, as far as the checkpoint that a training is resumed from."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import httpx2
from fuzz_engine import JSON, mutate_bytes, mutate_value
from huggingface_hub import set_client_factory
from huggingface_hub.utils import close_session
from loopback_hub.routes import respond
from loopback_hub.server import Request
from loopback_hub.store import Blob, Repository, Store

from hf_aegis.hub import HubDownloadError
from hf_aegis.training.hub_checkpoint import download_checkpoint
from network_readers.case import Case


def hub_answers(folder: Path, cache: Path) -> Case:
    """
    A checkpoint is downloaded from answers that are one JSON document: for each kind of request status, headers and
    body. Everything is huggingface_hub's own but the socket.

    Args:
        folder (`Path`): All that may be written to.
        cache (`Path`): The cache of downloads in it.
    """
    store = Store({})
    repository = store.repositories["model", "org/name"] = Repository("model", "org/name", large=store.large)
    files = {"last-checkpoint/trainer_state.json": b'{"global_step": 1}', "last-checkpoint/model.safetensors": b"abc"}
    blobs = {name: Blob(content, name.endswith("safetensors")) for name, content in files.items()}
    store.large |= {blob.sha256: blob.data for blob in blobs.values()}
    commit = repository.add(blobs, "first", None, "somebody")
    repository.branches["main"] = commit.oid
    url = "http://127.0.0.1:1"

    def answer(method: str, path: str) -> dict[str, Any]:
        found = respond(store, Request(method, path, {}, {}, b"", url))
        return {"status": found.status, "headers": found.headers, "body": found.body.decode("latin-1")}

    base = f"/org/name/resolve/{commit.oid}/last-checkpoint"
    kinds = {"GET /api/": "/api/models/org/name", "HEAD .json": f"{base}/trainer_state.json"}
    kinds |= {"GET .json": f"{base}/trainer_state.json", "HEAD .safetensors": f"{base}/model.safetensors"}
    kinds |= {"GET /lfs/": f"/lfs/{blobs['last-checkpoint/model.safetensors'].sha256}"}
    sound = {kind: answer(kind.split()[0], path) for kind, path in kinds.items()}
    current: dict[str, Any] = {}

    def transport(request: httpx2.Request) -> httpx2.Response:
        for kind, found in current.items():
            method, part = kind.split()
            if request.method == method and part in str(request.url):
                headers = {"Content-Length": str(len(found["body"])), **found["headers"]}
                body = b"" if method == "HEAD" else found["body"].encode("latin-1")
                return httpx2.Response(found["status"], headers=headers, content=body)
        return httpx2.Response(404, json={"error": "Entry not found"})

    def read(data: bytes) -> None:
        # What no server can send is no answer.
        try:
            answers = json.loads(data)
            current.clear()
            for kind in kinds:
                found = answers[kind]
                body = found["body"] if isinstance(found["body"], str) else json.dumps(found["body"])
                body.encode("latin-1")
                headers = {str(name): str(value) for name, value in found["headers"].items()}
                httpx2.Response(found["status"], headers=headers)
                current[kind] = {"status": int(found["status"]), "headers": headers, "body": body}
        except Exception as error:
            raise HubDownloadError("no answers") from error
        shutil.rmtree(cache, ignore_errors=True)
        before = _tree(folder)
        set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(transport), follow_redirects=True))
        try:
            checkpoint = download_checkpoint("org/name", folder / "out")
            # A list of files may leave one out, and an answer may say that another one is meant.
            for name in files:
                path = checkpoint.parent / name
                read = not path.exists() or path.read_bytes() in files.values()
                assert read, f"{name} is not what the Hub announced"
        finally:
            close_session()
            escaped = {path for path in _tree(folder) - before if not {"out", cache.parent.name} & {path.parts[0]}}
            assert not escaped, f"written elsewhere: {escaped}"

    return Case(read, [json.dumps(sound).encode()], (HubDownloadError,), (mutate_answer, mutate_answer, *JSON))


def _tree(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


SENDABLE = ("", "..", "../../x", "/tmp/x", "9" * 30, "-1", "http://127.0.0.1:1/", "W/", '"', "bytes */3", "\u00e9")
"""Values of headers that a server can send, and should not."""


def mutate_answer(data: bytes, random: Random) -> bytes:
    """An answer's body or header changed, or its status another."""
    try:
        answers = json.loads(data)
        found = answers[random.choice(list(answers))]
        kind = random.randrange(4)
        if kind == 0:
            found["status"] = random.choice((200, 204, 206, 301, 302, 304, 400, 401, 403, 404, 416, 429, 500, 503))
        elif kind == 1:
            name = random.choice([*found["headers"], "Location", "Content-Length", "X-Repo-Commit", "ETag"])
            found["headers"][name] = random.choice(SENDABLE)
        elif kind == 2 and found["body"].startswith("{"):
            found["body"] = json.dumps(mutate_value(json.loads(found["body"]), random))
        else:
            found["body"] = mutate_bytes(found["body"].encode("latin-1"), random).decode("latin-1")
        return json.dumps(answers).encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return mutate_bytes(data, random)
