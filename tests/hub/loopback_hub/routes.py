"""Which request is for what: patterns of paths, and the answers."""

import re
from collections.abc import Callable
from urllib.parse import unquote

from loopback_hub.commits import commit, preupload
from loopback_hub.files import download_large, resolve
from loopback_hub.large_files import batch, receive, verify
from loopback_hub.metadata import validate
from loopback_hub.repositories import (
    branch,
    commits,
    create,
    delete,
    info,
    move,
    paths_info,
    refs,
    settings,
    tag,
    tree,
    whoami,
)
from loopback_hub.server import Answer, Request
from loopback_hub.store import HubError, Store


_API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
_REPO = r"/(?:(?P<prefix>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"

_ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("DELETE", r"/api/repos/delete", delete),
    ("POST", r"/api/repos/move", move),
    ("POST", r"/api/validate-yaml", validate),
    ("GET", _API, info),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", info),
    ("PUT", rf"{_API}/settings", settings),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", commit),
    ("POST", rf"{_API}/branch/(?P<revision>[^/]+)", branch),
    ("DELETE", rf"{_API}/branch/(?P<revision>[^/]+)", branch),
    ("POST", rf"{_API}/tag/(?P<revision>[^/]+)", tag),
    ("DELETE", rf"{_API}/tag/(?P<revision>[^/]+)", tag),
    ("GET", rf"{_API}/refs", refs),
    ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", commits),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", receive),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", verify),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", download_large),
    ("HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", download_large),
    ("GET", rf"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ("HEAD", rf"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
)


def respond(store: Store, request: Request) -> Answer:
    """Answers one request; a revision is decoded only after the path was split."""
    for method, pattern, answer in _ROUTES:
        if method == request.method and (found := re.fullmatch(pattern, request.path)):
            values = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
            if "prefix" in found.groupdict():
                values["kind"] = values.pop("prefix", "models").removesuffix("s")
            return answer(store, request, **values)
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")
