"""HTTP on the loopback interface: reads requests, meets faults, and sends what the routes answer."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback_hub.faults import Faults
from loopback_hub.store import HubError, Store


@dataclass(frozen=True)
class Request:
    """`path` is as it was sent: a revision such as `refs/pr/1` has its slashes encoded there."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    url: str

    @property
    def token(self) -> str | None:
        value = self.headers.get("authorization")
        return value.removeprefix("Bearer ") if value else None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Answer":
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def error(cls, error: HubError) -> "Answer":
        headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
        return cls.of({"error": error.message}, error.status, headers)


class LoopbackServer:
    """
    A server in a thread of its own, on a free port.

    Args:
        store ([`Store`]): What is served.
        respond (`Callable`): Answers one request; may raise [`HubError`].
    """

    def __init__(self, store: Store, respond: Callable[[Store, Request], Answer]):
        self.faults = Faults()
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[tuple[str, str | None]] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Small answers should not wait for more.
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                address = urlsplit(self.path)
                body = self._read_body()
                server.requests.append((self.command, self.path))
                fault = server.faults.take(self.command, address.path)
                if fault is not None and fault.kind == "drop":
                    self.close_connection = True
                    return
                request = Request(
                    self.command,
                    address.path,
                    parse_qs(address.query, keep_blank_values=True),
                    {name.lower(): value for name, value in self.headers.items()},
                    body,
                    server.url,
                )
                server.tokens.append((request.path, request.token))
                try:
                    if fault is not None and fault.kind == "status":
                        raise HubError(fault.status, fault.message)
                    with lock:
                        answer = respond(store, request)
                except HubError as error:
                    answer = Answer.error(error)
                if fault is not None:
                    answer = fault.change(answer)
                self._send(answer, cut=fault is not None and fault.kind == "cut")

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one  # noqa: N815

            def _read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    chunks = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        chunks.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(chunks)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _send(self, answer: Answer, *, cut: bool) -> None:
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
                self.close_connection |= cut

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "LoopbackServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
