"""The `hub` fixture: a clean server and a clean cache for one test, and this process's clients pointed to them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopback_hub.routes import respond
from loopback_hub.server import LoopbackServer
from loopback_hub.store import Repository, Store, User


# Of the shape of real ones, and valid nowhere else.
WRITE_TOKEN = "hf_" + "LoopbackWriter".ljust(34, "x")
READ_TOKEN = "hf_" + "LoopbackReader".ljust(34, "x")
STRANGER_TOKEN = "hf_" + "LoopbackStranger".ljust(34, "x")


class LoopbackHub:
    """
    What a test sees of the server. The process is logged in as `writer`, who may write in `writer/` and `org/`.

    Attributes:
        url: The server's address.
        token: May write; used where a call gives no token.
        read_only_token: Of a member of `org` who may only read.
        stranger_token: Of somebody who may write, but neither see nor write what `org` keeps private.
        cache: The cache of downloads, empty at first.
        faults: See [`Faults.add`].
        requests: Method and path of every request.
        tokens: Path and token of every request that was answered.
    """

    token = WRITE_TOKEN
    read_only_token = READ_TOKEN
    stranger_token = STRANGER_TOKEN
    bad_token = "hf_" + "LoopbackNobody".ljust(34, "x")

    def __init__(self, server: LoopbackServer, store: Store, home: Path, monkeypatch: pytest.MonkeyPatch):
        self.url = server.url
        self.faults = server.faults
        self.requests = server.requests
        self.tokens = server.tokens
        self.home = home
        self.cache = home / "hub"
        self._store = store
        self._monkeypatch = monkeypatch

    def repo(self, repo_id: str, kind: str = "model") -> Repository:
        """What the server has: `files()`, `history()`, `branches`, `tags`, `pulls`, `private`; `gated` can be set."""
        return self._store.repositories[kind, repo_id]

    def has_repo(self, repo_id: str, kind: str = "model") -> bool:
        return (kind, repo_id) in self._store.repositories

    def fail_next(self, method: str | None = None, path: str = "", **options: Any) -> None:
        """Makes requests fail; see [`Faults.add`]: `kind`, `status`, `message`, `after`, `times`."""
        self.faults.add(options.pop("kind", "status"), method=method, path=path, **options)

    @contextlib.contextmanager
    def offline(self) -> Iterator[None]:
        """As with `HF_HUB_OFFLINE=1`; the server must not be asked for anything."""
        before = len(self.requests)
        with self._monkeypatch.context() as patch:
            _set_offline(patch, True)
            yield
        assert self.requests[before:] == []

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        """As without a network: nobody listens at the Hub's address. An `HfApi` from before keeps its address."""
        with self._monkeypatch.context() as patch:
            _set_endpoint(patch, "http://127.0.0.1:1")
            yield

    def clear_cache(self) -> None:
        """As on another machine."""
        import shutil

        shutil.rmtree(self.cache, ignore_errors=True)

    def environment(self, *, offline: bool = False) -> dict[str, str]:
        """What a child process has to have in its environment to use this server and this cache."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
        }
        return {**os.environ, **own}


def pytest_configure(config: pytest.Config) -> None:
    # Of huggingface_hub's own uploads.
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A [`LoopbackHub`]: a server, and huggingface_hub, transformers and datasets that know no other."""
    home = tmp_path_factory.mktemp("hf-home")
    users = {
        WRITE_TOKEN: User("writer", ("org",)),
        READ_TOKEN: User("reader", ("org",), may_write=False),
        STRANGER_TOKEN: User("stranger"),
    }
    store = Store(users)
    with LoopbackServer(store, respond) as server:
        _point_clients(monkeypatch, server.url, home)
        yield LoopbackHub(server, store, home, monkeypatch)
        _close_clients()


def _point_clients(patch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """huggingface_hub and datasets read the environment when they are imported, which was long ago."""
    import time

    import datasets.config
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    _close_clients()
    _set_endpoint(patch, url)
    for name, value in {
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
    }.items():
        patch.setattr(constants, name, value)
    for module in (_http, file_download):
        # Retries wait for seconds.
        patch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    for name, value in {
        "HF_DATASETS_CACHE": home / "datasets",
        "HF_MODULES_CACHE": str(home / "modules"),
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
    }.items():
        patch.setattr(datasets.config, name, value)
    patch.setenv("HF_TOKEN", WRITE_TOKEN)
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    _set_offline(patch, False)


def _set_endpoint(patch: pytest.MonkeyPatch, url: str) -> None:
    import datasets.config
    import huggingface_hub.hf_api
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    # Behind the functions of the package, e.g. huggingface_hub.create_repo.
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    if "transformers.utils.hub" in sys.modules:
        # Made once, when it is first needed.
        patch.setattr("transformers.utils.hub._hf_api", None)
    patch.setattr(datasets.config, "HF_ENDPOINT", url)
    patch.setattr(datasets.config, "HUB_DATASETS_URL", url + "/datasets/{repo_id}/resolve/{revision}/{path}")


def _set_offline(patch: pytest.MonkeyPatch, offline: bool) -> None:
    import datasets.config
    from huggingface_hub import constants

    patch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", offline)


def _close_clients() -> None:
    """Connections and file systems that know another server."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import close_session

    close_session()
    HfFileSystem.clear_instance_cache()
