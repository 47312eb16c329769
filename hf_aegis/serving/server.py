"""
A policy behind a websocket, for the clients of openpi's policy servers.

On connection the server sends a message about itself. Then each binary message is an observation, and its answer holds
`actions` and `server_timing`. An answer in text is an error, which openpi's client raises; the connection stays open.
`GET /healthz` answers 200 as soon as the policy can be asked, and 503 while it is stuck in a call.

What one client can take from the others is bounded. A client has one question in line at a time: what it sends before
it is answered stays in its own connection. It has a place until it is gone, silent for too long or does not answer
pings, and there are so many places; its messages have a largest size.
"""

import asyncio
import contextlib
import functools
import http
import itertools
import logging
import signal
import time
import traceback
from typing import Any

import numpy as np

from hf_aegis import __version__
from hf_aegis.evaluation.rollouts.policy import BatchedPolicy, PolicyRequest
from hf_aegis.functional.loopback import is_loopback
from hf_aegis.serving.clients import ObservationReader
from hf_aegis.serving.inference_queue import Answer, InferenceError, InferenceQueue
from hf_aegis.serving.messages import INSTALL_HINT, MessageError, pack, unpack


try:
    import msgpack  # noqa: F401 (the messages need it; better told before a client comes)
    from websockets.asyncio.server import Request, Response, ServerConnection, serve
    from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
    from websockets.frames import CloseCode

    from hf_aegis.serving.places import CountedConnection, Places
except ModuleNotFoundError as error:
    raise ImportError(f"{INSTALL_HINT} (missing module: {error.name})") from error


HEALTH_PATH = "/healthz"
MAX_MESSAGE_BYTES = 16 * 2**20
"""Two pictures of 1024 x 1024 pixels take 6 MiB."""
OPEN_TIMEOUT = 10.0
"""Seconds that a client has to say what it wants."""
PING_INTERVAL = PING_TIMEOUT = 20.0
"""Seconds between pings, and until one has to be answered."""
CLOSE_TIMEOUT = 3.0
"""Seconds that a client has to take leave when the server stops."""
MAX_UNREAD = 1
"""Frames that are read ahead of a client's turn; the rest waits on its side."""

logger = logging.getLogger(__name__)


class PolicyServer:
    """
    Serves one policy to any number of clients.

    Each client's `n`-th question is asked as step `n` of an episode whose seed follows from the server's and the
    client's number, so that the same clients in the same order get the same answers. The policy keeps no state between
    questions: a client that is gone leaves nothing behind.

    Args:
        policy (`BatchedPolicy`): The policy.
        reader ([`~serving.ObservationReader`]): How the clients' messages are to be read.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Where to listen. There is no authentication: whoever can
            reach the port can ask.
        port (`int`, *optional*, defaults to `8000`): 0 for any that is free.
        seed (`int`, *optional*, defaults to `0`): Of what the policy draws.
        max_batch_size (`int`, *optional*, defaults to `8`): Waiting questions that the policy is given at once.
        max_seconds (`float`, *optional*, defaults to `300`): After so long a call of the policy is taken for stuck,
            and clients are told.
        max_message_bytes (`int`, *optional*, defaults to 16 MiB): A longer message closes its connection.
        max_clients (`int`, *optional*, defaults to `64`): Who comes then is turned away with status 503.
        idle_seconds (`float`, *optional*, defaults to `3600`): A client that has asked nothing for so long, or does
            not finish a message, gives its place to others.
        ping_interval, ping_timeout (`float`, *optional*, defaults to `20`): Seconds between pings, and until one has
            to be answered; a client that does not is gone.
        metadata (`dict`, *optional*): More for the first message.

    Raises:
        ImportError: If the `serve` extra is not installed.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        policy: BatchedPolicy,
        reader: ObservationReader,
        host: str = "127.0.0.1",
        port: int = 8000,
        seed: int = 0,
        max_batch_size: int = 8,
        max_seconds: float = 300.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_clients: int = 64,
        idle_seconds: float = 3600.0,
        ping_interval: float = PING_INTERVAL,
        ping_timeout: float = PING_TIMEOUT,
        metadata: dict[str, Any] | None = None,
    ):
        for name, value, lowest in (("port", port, 0), ("seed", seed, 0), ("max_message_bytes", max_message_bytes, 1)):
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}; found {value}")
        for name, seconds in (
            ("idle_seconds", idle_seconds),
            ("ping_interval", ping_interval),
            ("ping_timeout", ping_timeout),
        ):
            if not seconds > 0:
                raise ValueError(f"{name} must be positive; found {seconds}")
        if port > 65535:
            raise ValueError(f"port must be at most 65535; found {port}")
        self.reader = reader
        self.host, self.port = host, port
        self.seed = seed
        self.max_message_bytes = max_message_bytes
        self.idle_seconds = idle_seconds
        self.ping_interval, self.ping_timeout = ping_interval, ping_timeout
        self.metadata = {
            "server": f"hf-aegis {__version__}",
            "client": reader.client,
            "expects": dict(reader.expected),
            "actions": "(h, 7): translation, rotation, gripper (-1 opens, +1 closes), to be clipped to [-1, 1]",
            **(metadata or {}),
        }
        self._queue = InferenceQueue(policy, max_batch_size, max_seconds)
        self._client_numbers = itertools.count()
        self._places = Places(max_clients)
        self._stopping = asyncio.Event()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    async def run(self, started: asyncio.Event | None = None, signals: bool = False) -> None:
        """
        Serves until [`stop`] is called.

        Args:
            started (`asyncio.Event`, *optional*): Is set when clients can connect; `port` is then the one in use.
            signals (`bool`, *optional*, defaults to `False`):
                Whether to stop on SIGINT and SIGTERM. A second one has its usual effect.

        Raises:
            OSError: If the address cannot be bound.
        """
        if not self.loopback:
            logger.warning(
                "listening on %s without authentication: whoever can reach this machine can ask the policy", self.host
            )
        worker = asyncio.create_task(self._queue.run())
        worker.add_done_callback(lambda _: self._stopping.set())
        try:
            async with serve(
                self._serve_client,
                self.host,
                self.port,
                process_request=self._let_in,
                create_connection=functools.partial(CountedConnection, self._places),  # type: ignore[arg-type]
                # Web pages cannot reach a policy through the browser of whoever runs it: what they send has an origin.
                origins=[None],
                # A small message cannot become a large one.
                compression=None,
                open_timeout=OPEN_TIMEOUT,
                ping_interval=self.ping_interval,
                ping_timeout=self.ping_timeout,
                close_timeout=CLOSE_TIMEOUT,
                max_size=self.max_message_bytes,
                max_queue=MAX_UNREAD,
                logger=logging.getLogger(f"{__name__}.websockets"),
            ) as server:
                self.port = next(iter(server.sockets)).getsockname()[1]
                if signals:
                    self._stop_on_signals()
                logger.info("serving on ws://%s:%d", self.host, self.port)
                if started is not None:
                    started.set()
                await self._stopping.wait()
                logger.info("stopping")
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    def stop(self) -> None:
        """Ends [`run`], from the event loop's own thread."""
        self._stopping.set()

    def _stop_on_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            loop.remove_signal_handler(number)
            self.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)

    def _let_in(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == HEALTH_PATH:
            if self._queue.stuck:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "the policy does not come back\n")
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._places.take(connection):
            logger.warning("a client is turned away: there are %d, the most", self._places.max_clients)
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE, f"{self._places.max_clients} clients are connected, the most\n"
            )
        return None

    async def _serve_client(self, connection: ServerConnection) -> None:
        client = next(self._client_numbers)
        logger.info("client %d connected", client)
        answered = failed = 0
        try:
            await connection.send(pack(self.metadata))
            seed = int(np.random.SeedSequence([self.seed, client]).generate_state(1)[0])
            total: float | None = None
            while (data := await self._receive(connection, client)) is not None:
                began = time.perf_counter()
                try:
                    answer = await self._answer(connection, data, answered + failed, seed)
                except (MessageError, InferenceError) as error:
                    failed += 1
                    await connection.send(str(error))
                    continue
                if answer is None:
                    break
                answered += 1
                await connection.send(pack({"actions": answer.actions, "server_timing": _timing(answer, total)}))
                total = time.perf_counter() - began
        except ConnectionClosed as closed:
            logger.info("client %d is gone: %s", client, "no closing" if closed.rcvd is None else closed.rcvd.code)
        except Exception as error:
            # The connection closes with 1011. An error's text may hold what a client sent, which is not for the log.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("client %d cannot be served any longer: %s, at\n%s", client, type(error).__name__, where)
            raise
        finally:
            logger.info("client %d: %d answers, %d errors", client, answered, failed)

    async def _receive(self, connection: ServerConnection, client: int) -> str | bytes | None:
        """The next message; `None` if the client has taken its leave, or is asked to."""
        try:
            async with asyncio.timeout(self.idle_seconds):
                return await connection.recv()
        except ConnectionClosedOK:
            return None
        except TimeoutError:
            logger.info("client %d has asked nothing for %g s", client, self.idle_seconds)
            await connection.close(CloseCode.GOING_AWAY, f"nothing was asked for {self.idle_seconds:g} s")
            return None

    async def _answer(self, connection: ServerConnection, data: str | bytes, step: int, seed: int) -> Answer | None:
        """The answer to one message; `None` if the client is gone before."""
        if isinstance(data, str):
            raise MessageError("expected a binary message, an observation in msgpack; found text")
        instruction, observation = self.reader.read(unpack(data), step)
        question = asyncio.ensure_future(self._queue.infer(PolicyRequest(instruction, observation, seed)))
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            await asyncio.wait((question, gone), return_when=asyncio.FIRST_COMPLETED)
            return await question if question.done() else None
        finally:
            question.cancel()
            gone.cancel()


def _timing(answer: Answer, previous_total: float | None) -> dict[str, Any]:
    """openpi's fields, `infer_ms` and `prev_total_ms`, and how long the question waited, beside how many others."""
    timing: dict[str, Any] = {
        "infer_ms": 1000.0 * answer.inferred,
        "queue_ms": 1000.0 * answer.waited,
        "batch_size": answer.batch_size,
    }
    if previous_total is not None:
        timing["prev_total_ms"] = 1000.0 * previous_total
    return timing
