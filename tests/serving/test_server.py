"""The server on loopback, asked by openpi's own client and by clients that misbehave."""

import asyncio
import logging
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest


pytest.importorskip("websockets")
openpi = pytest.importorskip("openpi_client.websocket_client_policy")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from hf_aegis.serving import ObservationReader, PolicyServer, inference_queue  # noqa: E402
from hf_aegis.serving.messages import pack, unpack  # noqa: E402


# What websockets 17.1 and later have to say about openpi-client.
pytestmark = pytest.mark.filterwarnings("ignore:connect\\(\\) must be used as a context manager:DeprecationWarning")


def stock_client(server):
    return openpi.WebsocketClientPolicy(host="127.0.0.1", port=server.port)


def raw(server, **options):
    return connect(f"ws://127.0.0.1:{server.port}", compression=None, **options)


def close(client):
    client._ws.close()


def test_the_stock_client_is_answered(running, policy, libero_openpi):
    with running(policy, metadata={"action_horizon": 2}) as server:
        client = stock_client(server)
        metadata = client.get_server_metadata()
        assert metadata["client"] == "libero-openpi" and metadata["action_horizon"] == 2
        assert set(metadata["expects"]) == set(libero_openpi)
        for step in range(3):
            answer = client.infer(libero_openpi)
            np.testing.assert_array_equal(answer["actions"], [np.arange(10, 17), np.full(7, step)])
            timing = answer["server_timing"]
            assert timing["infer_ms"] >= 0 and timing["queue_ms"] >= 0 and timing["batch_size"] == 1
            assert ("prev_total_ms" in timing) == (step > 0)
        client.reset()
        close(client)
    seen = policy.batches[0][0].observation.images["agentview_rgb"]
    np.testing.assert_array_equal(seen, libero_openpi["observation/image"][:, ::-1])


def test_seeds_follow_from_the_client_and_the_server(running, policy, libero_openpi):
    def seeds(**options):
        policy.batches.clear()
        with running(policy, **options) as server:
            for _ in range(2):
                client = stock_client(server)
                client.infer(libero_openpi)
                client.infer(libero_openpi)
                close(client)
        return [batch[0].seed for batch in policy.batches]

    first = seeds()
    assert first[0] == first[1] != first[2] == first[3]
    assert seeds() == first
    assert set(seeds(seed=1)).isdisjoint(first)


def test_health(running, policy):
    with running(policy) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=10) as answer:
            assert answer.status == 200 and answer.read() == b"OK\n"
        with (
            pytest.raises(urllib.error.HTTPError) as refused,
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/elsewhere", timeout=10),
        ):
            pass
        assert refused.value.code == 426
        refused.value.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation/state": None}, "'observation/state' is a NoneType: expected 8 numbers"),
        ({"observation/state": np.full(8, np.nan)}, "'observation/state' is nan in column 0: expected finite numbers"),
        ({"observation/image": np.zeros((3, 8, 8), np.uint8)}, r"'observation/image' is uint8 of shape \(3, 8, 8\)"),
        ({"prompt": "refuse"}, "the policy cannot answer: the policy looks through one eye only"),
        ({"prompt": "fail"}, "the policy failed with RuntimeError; the server's log says where"),
        ({"prompt": "objects"}, "the policy failed with TypeError"),
        ({"prompt": "nonsense"}, "the policy cannot answer: action 3 of the chunk is nan in column 0"),
    ],
    ids=str,
)
def test_the_client_is_told_and_may_go_on(running, policy, libero_openpi, change, message):
    with running(policy) as server:
        client = stock_client(server)
        with pytest.raises(RuntimeError, match=message):
            client.infer({**libero_openpi, **change})
        answer = client.infer(libero_openpi)
        assert answer["actions"].shape == (2, 7)
        close(client)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hello", "expected a binary message, an observation in msgpack; found text"),
        (b"hello", "expected a msgpack message; these 5 bytes are none"),
        (b"", "expected a msgpack message; these 0 bytes are none"),
        (pack({}), "missing keys ['prompt', 'observation/image'"),
        (pack([1, 2]), "an observation is a dictionary; found a list"),  # type: ignore[arg-type]
        (b"\x82\xabobservation", "expected a msgpack message"),
    ],
)
def test_malformed_messages(running, policy, libero_openpi, data, message):
    with running(policy) as server, raw(server) as client:
        unpack(client.recv(timeout=10))
        client.send(data)
        told = client.recv(timeout=10)
        assert isinstance(told, str) and told.startswith(message), told
        client.send(pack(libero_openpi))
        assert unpack(client.recv(timeout=10))["actions"].shape == (2, 7)


def test_a_message_that_is_too_large_closes_its_connection_only(running, policy, libero_openpi):
    with running(policy, max_message_bytes=50_000) as server, raw(server) as other:
        other.recv(timeout=10)
        with raw(server) as client:
            client.recv(timeout=10)
            client.send(bytes(50_001))
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(timeout=10)
            assert closed.value.rcvd.code == 1009 and "50001 bytes" in closed.value.rcvd.reason
        other.send(pack(libero_openpi))
        assert unpack(other.recv(timeout=10))["actions"].shape == (2, 7)


def test_web_pages_are_turned_away(running, policy):
    with running(policy) as server, pytest.raises(InvalidStatus) as refused:
        raw(server, additional_headers={"Origin": "https://example.com"})
    assert refused.value.response.status_code == 403


def test_clients_that_wait_together_are_answered_together(running, policy, libero_openpi):
    def ask(index):
        client = stock_client(server)
        answer = client.infer({**libero_openpi, "observation/joint_position": np.full(7, float(index))})
        close(client)
        return answer

    with running(policy, max_batch_size=3) as server, ThreadPoolExecutor(6) as threads:
        first = stock_client(server)
        blocked = threads.submit(first.infer, {**libero_openpi, "prompt": "block"})
        assert policy.blocked.wait(10)
        others = [threads.submit(ask, index) for index in range(4)]
        deadline = time.monotonic() + 10
        while server._queue._waiting.qsize() < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        policy.release.set()
        for index, other in enumerate(others):
            answer = other.result(10)
            np.testing.assert_array_equal(answer["actions"][0], np.full(7, index))
            assert answer["server_timing"]["queue_ms"] > 0
        blocked.result(10)
        close(first)
    assert [len(batch) for batch in policy.batches] == [1, 3, 1]


def test_a_bad_question_does_not_spoil_its_neighbours(running, policy, libero_openpi):
    with running(policy) as server, ThreadPoolExecutor(3) as threads:
        clients = [stock_client(server) for _ in range(3)]
        prompts = ("block", "fail", "go")
        answers = []
        for client, prompt in zip(clients, prompts, strict=True):
            answers.append(threads.submit(client.infer, {**libero_openpi, "prompt": prompt}))
            assert policy.blocked.wait(10)
        while server._queue._waiting.qsize() < 2:
            time.sleep(0.01)
        policy.release.set()
        assert answers[0].result(10)["actions"].shape == (2, 7)
        with pytest.raises(RuntimeError, match="the policy failed with RuntimeError"):
            answers[1].result(10)
        assert answers[2].result(10)["actions"].shape == (2, 7)
        for client in clients:
            close(client)
    assert [len(batch) for batch in policy.batches] == [1, 2, 1, 1]


def test_a_client_that_disappears_is_not_waited_for(running, policy, libero_openpi):
    with running(policy) as server, ThreadPoolExecutor(1) as threads:
        blocking = stock_client(server)
        blocked = threads.submit(blocking.infer, {**libero_openpi, "prompt": "block"})
        assert policy.blocked.wait(10)
        for index in range(3):
            client = stock_client(server)
            client._ws.send(pack({**libero_openpi, "prompt": "nobody waits"}))
            while server._queue._waiting.qsize() <= index:
                time.sleep(0.01)
            # No closing handshake: as if the machine were switched off.
            client._ws.socket.shutdown(2)
        deadline = time.monotonic() + 10
        while not all(waiting.answer.done() for waiting in server._queue._waiting._queue):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        policy.release.set()
        blocked.result(10)
        assert blocking.infer(libero_openpi)["actions"].shape == (2, 7)
        close(blocking)
    asked = [request.instruction for batch in policy.batches for request in batch]
    assert asked == ["block", "pick up the red cup"]


def test_a_client_that_disappears_while_the_policy_computes(running, policy, libero_openpi):
    with running(policy) as server:
        client = stock_client(server)
        client._ws.send(pack({**libero_openpi, "prompt": "block"}))
        assert policy.blocked.wait(10)
        client._ws.socket.shutdown(2)
        other = stock_client(server)
        policy.release.set()
        assert other.infer(libero_openpi)["actions"].shape == (2, 7)
        close(other)


def test_pings_are_answered_while_the_policy_computes(running, policy, libero_openpi):
    with running(policy) as server, raw(server) as client:
        client.recv(timeout=10)
        client.send(pack({**libero_openpi, "prompt": "block"}))
        assert policy.blocked.wait(10)
        assert client.ping().wait(10)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=10) as answer:
            assert answer.status == 200
        policy.release.set()
        assert unpack(client.recv(timeout=10))["actions"].shape == (2, 7)


def test_a_policy_that_is_stuck_keeps_nobody_waiting(running, policy, libero_openpi):
    health = "http://127.0.0.1:{}/healthz"
    stuck = "the policy has not come back from a call for 1 s or more"
    with running(policy, max_seconds=1.0, max_batch_size=1) as server, ThreadPoolExecutor(2) as threads:
        clients = [stock_client(server) for _ in range(3)]
        first = threads.submit(clients[0].infer, {**libero_openpi, "prompt": "block"})
        assert policy.blocked.wait(10)
        second = threads.submit(clients[1].infer, libero_openpi)
        for told in (first, second):
            with pytest.raises(RuntimeError, match=stuck):
                told.result(10)
        with pytest.raises(RuntimeError, match=stuck):
            clients[2].infer(libero_openpi)
        with (
            pytest.raises(urllib.error.HTTPError) as refused,
            urllib.request.urlopen(health.format(server.port), timeout=10),
        ):
            pass
        assert refused.value.code == 503
        refused.value.close()
        policy.release.set()
        deadline = time.monotonic() + 10
        while server._queue.stuck:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for client in clients:
            assert client.infer(libero_openpi)["actions"].shape == (2, 7)
            close(client)
        with urllib.request.urlopen(health.format(server.port), timeout=10) as answer:
            assert answer.status == 200
    # Who was told is not asked for again.
    assert [batch[0].instruction for batch in policy.batches] == ["block", *["pick up the red cup"] * 3]


def test_a_policy_that_is_stuck_does_not_keep_the_server_from_ending(
    running, policy, libero_openpi, caplog, monkeypatch
):
    monkeypatch.setattr(inference_queue, "LEAVE_SECONDS", 0.2)
    with ThreadPoolExecutor(1) as threads:
        with running(policy) as server:
            client = stock_client(server)
            asked = threads.submit(client.infer, {**libero_openpi, "prompt": "block"})
            assert policy.blocked.wait(10)
        # The server is gone, and its thread is not.
        assert not policy.release.is_set()
        with pytest.raises(ConnectionClosed):
            asked.result(10)
        policy.release.set()
    assert "has not come back from its last call, and is left behind" in caplog.text


def test_what_ends_a_connection_is_logged(running, policy, libero_openpi, caplog, monkeypatch):
    def broken(*arguments):
        raise KeyError("red cup")

    with running(policy) as server:
        client = stock_client(server)
        monkeypatch.setattr(server.reader, "read", broken)
        with pytest.raises(ConnectionClosed) as closed:
            client.infer(libero_openpi)
        assert closed.value.rcvd.code == 1011
    assert "client 0 cannot be served any longer: KeyError, at" in caplog.text


def test_stopping_takes_leave_of_clients(running, policy, libero_openpi):
    with running(policy) as server:
        client = stock_client(server)
        client.infer(libero_openpi)
    with pytest.raises(ConnectionClosed) as closed:
        client.infer(libero_openpi)
    assert closed.value.rcvd.code == 1001


def test_logs_hold_no_data(running, policy, libero_openpi, caplog):
    with caplog.at_level(logging.INFO, "hf_aegis.serving"), running(policy) as server:
        client = stock_client(server)
        client.infer(libero_openpi)
        for change in ({"prompt": "fail"}, {"observation/state": np.full(8, 0.123456)}, {"prompt": 3}):
            try:
                client.infer({**libero_openpi, **change})
            except RuntimeError:
                continue
        close(client)
    text = caplog.text
    assert "client 0: 2 answers, 2 errors" in text and "the policy failed with RuntimeError, at" in text
    assert "act_together" in text
    for datum in ("11., 12.", "red cup", "0.123456", "fail\n"):
        assert datum not in text


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_who_can_reach_it(policy, host, loopback):
    server = PolicyServer(policy, ObservationReader("native", policy.cameras, ()), host=host)
    assert server.loopback == loopback


def test_a_warning_beyond_loopback(running, policy, caplog):
    with running(policy, host="0.0.0.0"):
        pass
    assert "listening on 0.0.0.0 without authentication" in caplog.text


def test_an_address_in_use(policy, running):
    with running(policy) as server:
        reader = ObservationReader("native", policy.cameras, ())
        with pytest.raises(OSError, match="in use"):
            asyncio.run(PolicyServer(policy, reader, port=server.port).run())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": -1}, "port must be at least 0"),
        ({"port": 70_000}, "port must be at most 65535"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_message_bytes": 0}, "max_message_bytes must be at least 1"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_seconds": 0.0}, "max_seconds must be positive"),
    ],
)
def test_numbers_out_of_range(policy, options, message):
    with pytest.raises(ValueError, match=message):
        PolicyServer(policy, ObservationReader("native", policy.cameras, ()), **options)
