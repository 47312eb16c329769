import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import pytest


@pytest.fixture
def libero_openpi():
    """A message of openpi's LIBERO example, with joints beside it."""
    generator = np.random.default_rng(0)
    return {
        "observation/image": generator.integers(0, 256, (24, 24, 3), dtype=np.uint8),
        "observation/wrist_image": generator.integers(0, 256, (24, 24, 3), dtype=np.uint8),
        "observation/state": np.arange(8.0),
        "observation/joint_position": np.arange(10.0, 17.0),
        "prompt": "pick up the red cup",
    }


@pytest.fixture
def running():
    """Serves in a thread of its own; what the server raised is raised again at the end."""

    @contextmanager
    def run(policy, **options):
        from hf_aegis.serving import ObservationReader, PolicyServer

        started, holder = threading.Event(), {}

        async def serve():
            client = options.pop("client", "libero-openpi")
            features = options.pop("state_features", ("joint_states", "gripper_states"))
            reader = ObservationReader(client, policy.cameras, features)
            server = PolicyServer(policy, reader, port=0, **options)
            event = asyncio.Event()
            holder.update(server=server, loop=asyncio.get_running_loop())
            running = asyncio.create_task(server.run(event))
            waiting = asyncio.create_task(event.wait())
            await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            started.set()
            await running

        def main():
            try:
                asyncio.run(serve())
            except BaseException as error:
                holder["error"] = error
            finally:
                started.set()

        thread = threading.Thread(target=main)
        thread.start()
        assert started.wait(20)
        try:
            if "error" not in holder:
                yield holder["server"]
        finally:
            if thread.is_alive():
                holder["loop"].call_soon_threadsafe(holder["server"].stop)
            thread.join(20)
            assert not thread.is_alive()
            if "error" in holder:
                raise holder["error"]

    return run


class EchoPolicy:
    """Answers with what it was asked, as far as seven columns hold it; does as its instruction says."""

    cameras = ("agentview_rgb", "eye_in_hand_rgb")

    def __init__(self):
        self.batches = []
        self.blocked = threading.Event()
        self.release = threading.Event()

    def act_together(self, requests):
        from hf_aegis.evaluation.rollouts.policy import PolicyError

        self.batches.append(list(requests))
        results = []
        for request in requests:
            if request.instruction == "fail":
                raise RuntimeError(f"of {request.observation.proprioception}")
            if request.instruction == "refuse":
                raise ValueError("the policy looks through one eye only")
            if request.instruction == "block":
                self.blocked.set()
                assert self.release.wait(20)
            if request.instruction == "nonsense":
                results.append(PolicyError("action 3 of the chunk is nan in column 0"))
                continue
            if request.instruction == "objects":
                results.append(np.array([[object()] * 7]))
                continue
            row = request.observation.proprioception["joint_states"]
            results.append(np.stack([row, np.full(7, float(request.observation.step))]))
        return results


@pytest.fixture
def policy():
    return EchoPolicy()
