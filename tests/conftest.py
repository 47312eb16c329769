"""Shared set-up: no network, no leftovers of optional trackers, small thread pools."""

import os


# Before torch and huggingface_hub are imported anywhere. Test processes share the cores: one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MUJOCO_GL", "osmesa")
os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")


# The Hub that tests may talk to: one on the loopback interface.
pytest_plugins = ["loopback_hub.fixture"]
