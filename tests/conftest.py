"""Shared set-up: no network, no leftovers of optional trackers, small thread pools."""

import os
import socket
import subprocess
import sys

import pytest


# Before torch and huggingface_hub are imported anywhere. Test processes share the cores: one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MUJOCO_GL", "osmesa")
os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")


# The Hub that tests may talk to: one on the loopback interface.
pytest_plugins = ["loopback_hub.fixture"]


@pytest.fixture
def unused_port():
    """Gives the number of a port of the loopback interface that nothing listens on."""

    def find():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    return find


@pytest.fixture
def run_processes(unused_port):
    """Runs a script in several processes that find each other as `torchrun`'s do; fails if one of them does."""

    def run(script, *arguments, size=2, timeout=300):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "WORLD_SIZE": str(size)}
        shared["GLOO_SOCKET_IFNAME"] = "lo"
        command = [sys.executable, str(script), *map(str, arguments)]
        processes = []
        try:
            for rank in range(size):
                environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
            errors = [process.communicate(timeout=timeout)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)

    return run
