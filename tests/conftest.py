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
    """
    Runs a script in several processes that find each other as `torchrun`'s do, and gives what they say as errors;
    fails if one of them does, or ends with another than the expected of the `codes`.
    """

    def run(script, *arguments, size=2, timeout=300, codes=None):
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
        expected = [0] * size if codes is None else list(codes)
        assert [process.returncode for process in processes] == expected, "\n".join(errors)
        return errors

    return run


@pytest.fixture(scope="session")
def pi0_checkpoint(tmp_path_factory):
    """A folder with a random π0 of three layers that fits the embedded model's tokenizer and pictures; chunks of 8."""
    import torch
    from transformers import AutoProcessor, PaliGemmaConfig, PI0Config, PI0ForConditionalGeneration

    from hf_aegis.assets import EMBEDDED_VLM

    torch.manual_seed(0)
    tokenizer = AutoProcessor.from_pretrained(EMBEDDED_VLM).tokenizer
    text = {
        "model_type": "gemma",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(tokenizer),
        # Small random weights would leave every hidden state alike.
        "initializer_range": 0.2,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 16,
        "vision_use_head": False,
    }
    vlm = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=16,
    )
    expert = {**text, "hidden_size": 8, "intermediate_size": 12}
    folder = tmp_path_factory.mktemp("pi0") / "pi0_tiny"
    PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=8)).save_pretrained(folder)
    return folder
