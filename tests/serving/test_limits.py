"""What one client can take from the others, over real sockets: places, time, memory and turns."""

import itertools
import logging
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest


pytest.importorskip("websockets")

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from hf_aegis.serving import ObservationReader, PolicyServer, places, server
from hf_aegis.serving.messages import pack, unpack


def client_of(running_server, **options):
    return connect(f"ws://127.0.0.1:{running_server.port}", compression=None, **options)


def answered(client, message):
    client.send(pack(message))
    return unpack(client.recv(timeout=10))


def bare(running_server, said=b""):
    """A TCP connection, and what a client says of itself before it says no more."""
    connection = socket.create_connection(("127.0.0.1", running_server.port), timeout=10)
    connection.sendall(said)
    return connection


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def is_closed(connection):
    """Reads what is left, which takes no longer than the connection's timeout."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def sent_until_it_stops(client, message, most):
    for count in range(most):
        try:
            client.send(message)
        except (TimeoutError, ConnectionClosed):
            return count
    return most


def test_it_listens_on_this_machine_alone_unless_told_otherwise(policy):
    assert PolicyServer(policy, ObservationReader("native", policy.cameras, ())).loopback


def test_who_comes_when_all_places_are_taken_is_turned_away(running, policy, libero_openpi, caplog):
    with running(policy, max_clients=2) as served, client_of(served) as first:
        first.recv(timeout=10)
        with client_of(served) as second:
            second.recv(timeout=10)
            with pytest.raises(InvalidStatus) as refused:
                client_of(served)
            assert refused.value.response.status_code == 503
            assert refused.value.response.body == b"2 clients are connected, the most\n"
            # Whether it is well can be asked all the same.
            with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/healthz", timeout=10) as health:
                assert health.status == 200
            assert answered(first, libero_openpi)["actions"].shape == (2, 7)
        # A place that was left is free.
        for _ in range(3):
            with client_of(served) as third:
                third.recv(timeout=10)
                assert answered(third, libero_openpi)["actions"].shape == (2, 7)
    assert "a client is turned away: there are 2, the most" in caplog.text


# A half of a request, nothing at all, another protocol.
SILENT = (b"GET / HTTP/1.1\r\nHost:", b"", b"\x16\x03\x01")


def test_connections_that_say_nothing_are_closed(running, policy, libero_openpi, monkeypatch):
    monkeypatch.setattr(server, "OPEN_TIMEOUT", 0.3)
    with running(policy, max_clients=1) as served:
        silent = [bare(served, said) for said in SILENT]
        with client_of(served) as client:
            client.recv(timeout=10)
            assert answered(client, libero_openpi)["actions"].shape == (2, 7)
        for connection in silent:
            assert is_closed(connection)
            connection.close()


def test_connections_beyond_those_that_may_wait_are_closed_at_once(running, policy, libero_openpi, monkeypatch):
    monkeypatch.setattr(places, "MAX_OPENING", 2)
    with running(policy, max_clients=1) as served:
        waiting = [bare(served, said) for said in SILENT]
        beyond = bare(served)
        assert is_closed(beyond)
        waiting[0].settimeout(0.1)
        with pytest.raises(TimeoutError):
            waiting[0].recv(1)
        for connection in (*waiting, beyond):
            connection.close()
        # As soon as the server has seen that they are gone.
        deadline = time.monotonic() + 10
        while len(served._places._connections) > 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with client_of(served) as client:
            client.recv(timeout=10)
            assert answered(client, libero_openpi)["actions"].shape == (2, 7)


@pytest.mark.parametrize("said", [b"\0" * 9000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200, b"GET /" + b"a" * 9000])
def test_endless_headers_are_not_read_to_their_end(running, policy, said):
    with running(policy) as served:
        connection = bare(served, said)
        assert is_closed(connection)
        connection.close()


def test_a_silent_client_gives_its_place_to_others(running, policy, libero_openpi, caplog):
    with caplog.at_level(logging.INFO, "hf_aegis.serving"), running(policy, max_clients=1, idle_seconds=0.3) as served:
        with client_of(served) as silent:
            silent.recv(timeout=10)
            with pytest.raises(ConnectionClosed) as closed:
                silent.recv(timeout=10)
            assert closed.value.rcvd.code == 1001 and closed.value.rcvd.reason == "nothing was asked for 0.3 s"
        with client_of(served) as client:
            client.recv(timeout=10)
            assert answered(client, libero_openpi)["actions"].shape == (2, 7)
    assert "client 0 has asked nothing for 0.3 s" in caplog.text


def test_waiting_for_the_policy_is_not_being_idle(running, policy, libero_openpi):
    with running(policy, idle_seconds=0.2) as served, client_of(served) as client:
        client.recv(timeout=10)
        client.send(pack({**libero_openpi, "prompt": "block"}))
        assert policy.blocked.wait(10)
        time.sleep(0.5)
        policy.release.set()
        assert unpack(client.recv(timeout=10))["actions"].shape == (2, 7)


def test_a_message_that_trickles_in_does_not_hold_a_place(running, policy, libero_openpi):
    def trickle():
        for piece in itertools.repeat(b"\0"):
            yield piece
            time.sleep(0.02)

    with running(policy, max_clients=1, idle_seconds=0.3) as served:
        began = time.monotonic()
        with client_of(served) as client:
            client.recv(timeout=10)
            with pytest.raises(ConnectionClosed):
                client.send(trickle())
        assert time.monotonic() - began < 5
        with client_of(served) as client:
            client.recv(timeout=10)
            # In pieces is not wrong by itself.
            data = pack(libero_openpi)
            client.send(iter([data[:100], data[100:5000], data[5000:]]))
            assert unpack(client.recv(timeout=10))["actions"].shape == (2, 7)


def test_a_client_that_answers_no_pings_is_gone(running, policy, caplog):
    options = {"ping_interval": 0.1, "ping_timeout": 0.2}
    with caplog.at_level(logging.INFO, "hf_aegis.serving"), running(policy, max_clients=1, **options) as served:
        # Its machine was switched off: it says nothing, and nothing says so.
        connection = bare(served, HANDSHAKE)
        assert is_closed(connection)
        connection.close()
        with client_of(served) as client:
            client.recv(timeout=10)
    assert "client 0 is gone" in caplog.text


def test_a_client_that_asks_ahead_waits_for_its_own_turn(running, policy, libero_openpi):
    """However much one sends, another one waits for one answer at most."""
    ahead = 20
    with running(policy, max_batch_size=1) as served, client_of(served) as greedy, client_of(served) as modest:
        for client in (greedy, modest):
            client.recv(timeout=10)
        greedy.send(pack({**libero_openpi, "prompt": "block"}))
        assert policy.blocked.wait(10)
        with ThreadPoolExecutor(1) as thread:
            # It cannot even be sent before it is read.
            sending = thread.submit(
                lambda: [greedy.send(pack({**libero_openpi, "prompt": "more"})) for _ in range(ahead)]
            )
            modest.send(pack({**libero_openpi, "prompt": "mine"}))
            deadline = time.monotonic() + 10
            while served._queue._waiting.qsize() < 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert served._queue._waiting.qsize() == 1
            policy.release.set()
            assert unpack(modest.recv(timeout=10))["actions"].shape == (2, 7)
            for _ in range(ahead + 1):
                assert unpack(greedy.recv(timeout=10))["actions"].shape == (2, 7)
            sending.result(10)
    asked = [batch[0].instruction for batch in policy.batches]
    assert asked[:2] == ["block", "mine"] and asked[2:] == ["more"] * ahead


def test_what_is_sent_ahead_stays_with_its_sender(running, policy, libero_openpi):
    """A client's messages are read one by one: the server does not hold a hundred megabytes of them."""
    with running(policy) as served, client_of(served) as client:
        client.recv(timeout=10)
        client.send(pack({**libero_openpi, "prompt": "block"}))
        assert policy.blocked.wait(10)
        # TCP's own buffers take a few megabytes.
        client.socket.settimeout(0.5)
        assert sent_until_it_stops(client, np.zeros(2**20, np.uint8).tobytes(), most=100) < 30
        policy.release.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_clients": 0}, "max_clients must be at least 1; found 0"),
        ({"idle_seconds": 0.0}, "idle_seconds must be positive"),
        ({"idle_seconds": float("nan")}, "idle_seconds must be positive"),
        ({"ping_interval": 0.0}, "ping_interval must be positive"),
        ({"ping_timeout": -1.0}, "ping_timeout must be positive"),
    ],
)
def test_numbers_out_of_range(policy, options, message):
    with pytest.raises(ValueError, match=message):
        PolicyServer(policy, ObservationReader("native", policy.cameras, ()), **options)
