"""Damaged messages over a real socket: each is answered, and the next client finds the server as it was."""

from random import Random

import pytest


pytest.importorskip("websockets")

from network_readers.messages import messages, mutate_message
from websockets.sync.client import connect

from hf_aegis.serving.messages import pack, unpack


def test_every_damaged_message_is_answered(running, policy, libero_openpi):
    sound, told, answered = messages().seeds[1], 0, 0
    with running(policy) as server:
        address = f"ws://127.0.0.1:{server.port}"
        with connect(address, compression=None) as client:
            client.recv(timeout=10)
            for index in range(200):
                client.send(mutate_message(sound, Random(index)))
                answer = client.recv(timeout=10)
                if isinstance(answer, str):
                    told += 1
                    assert 0 < len(answer) < 2000
                else:
                    answered += 1
                    assert unpack(answer)["actions"].shape == (2, 7)
        with connect(address, compression=None) as other:
            other.recv(timeout=10)
            other.send(pack(libero_openpi))
            assert unpack(other.recv(timeout=10))["actions"].shape == (2, 7)
    assert told > 20 and answered > 20
