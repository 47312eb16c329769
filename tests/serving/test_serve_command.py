"""`hf-aegis serve`: a saved model, asked by openpi's client from another process; and in the simulator."""

import json
import logging
import os
import re
import signal
import sys
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch


pytest.importorskip("websockets")
openpi = pytest.importorskip("openpi_client.websocket_client_policy")

from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM  # noqa: E402
from hf_aegis.cli import main  # noqa: E402
from hf_aegis.evaluation.rollouts import ModelPolicy, PolicyRequest  # noqa: E402
from hf_aegis.evaluation.weight_files import hash_weights  # noqa: E402
from hf_aegis.serving import ObservationReader  # noqa: E402


# What websockets 17.1 and later have to say about openpi-client.
pytestmark = pytest.mark.filterwarnings("ignore:connect\\(\\) must be used as a context manager:DeprecationWarning")

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")


@pytest.fixture(scope="module")
def acting_model(tmp_path_factory):
    """The embedded model with a small expert that was never trained, in the units of the shipped demonstrations."""
    from hf_aegis import LiberoDataset, PaliGemmaFlowForAction, PaliGemmaFlowProcessor

    folder = tmp_path_factory.mktemp("acting")
    dataset = LiberoDataset(DEMONSTRATIONS, short_demonstrations="pad")
    torch.manual_seed(0)
    model = PaliGemmaFlowForAction.from_vlm(
        EMBEDDED_VLM,
        expert_hidden_size=32,
        expert_num_layers=1,
        expert_num_heads=2,
        expert_intermediate_size=48,
        chunk_size=6,
    )
    torch.nn.init.normal_(model.action_expert.action_out_proj.weight, std=0.05)
    model.save_pretrained(folder)
    PaliGemmaFlowProcessor.from_vlm_processor(
        EMBEDDED_VLM, dataset.statistics, CAMERAS, pictures=dataset.pictures
    ).save_pretrained(folder)
    return folder


class Port(logging.Handler):
    """Waits for the log to say where the server listens."""

    def __init__(self):
        super().__init__()
        self.found = Future()

    def emit(self, entry):
        if match := re.search(r"serving on ws://127\.0\.0\.1:(\d+)", entry.getMessage()):
            self.found.set_result(int(match[1]))


def test_a_saved_model_is_served_until_interrupted(acting_model, libero_openpi, capsys):
    listening = Port()

    def ask():
        try:
            port = listening.found.result(60)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
                assert answer.status == 200
            client = openpi.WebsocketClientPolicy(host="127.0.0.1", port=port)
            told = client.get_server_metadata()
            assert (told["action_horizon"], told["model"]) == (6, hash_weights(acting_model))
            assert told["pictures"] == {"image_size": 64, "supersampling": 3, "rendering": "fast"}
            answers = [client.infer(libero_openpi)["actions"] for _ in range(2)]
            with pytest.raises(RuntimeError, match="missing keys"):
                client.infer({"prompt": "go"})
        finally:
            # As Ctrl-C does it; the command runs in the main thread.
            os.kill(os.getpid(), signal.SIGINT)
        return answers

    logging.getLogger("hf_aegis.serving").addHandler(listening)
    try:
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(ask)
            command = ("serve", "--model", str(acting_model), "--port", "0", "--seed", "3", "--device", "cpu")
            assert main(command) == 0
            answers = asked.result(10)
    finally:
        logging.getLogger("hf_aegis.serving").removeHandler(listening)
    log = capsys.readouterr().err
    assert "clients send observation/joint_position: (7,): joint_states" in log
    assert "stopping" in log and "client 0: 2 answers, 1 errors" in log and "Traceback" not in log

    policy = ModelPolicy.from_pretrained(acting_model)
    reader = ObservationReader("libero-openpi", policy.cameras, policy.state_features)
    seed = int(np.random.SeedSequence([3, 0]).generate_state(1)[0])
    for step, answered in enumerate(answers):
        assert answered.shape == (6, 7)
        (expected,) = policy.act_together([PolicyRequest(*reader.read(libero_openpi, step), seed)])
        np.testing.assert_allclose(answered, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(*answers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the following arguments are required: --model"),
        (("--model", str(EMBEDDED_VLM)), "without an action expert: it cannot act"),
        (("--model", "x", "--client", "aloha"), "invalid choice: 'aloha'"),
        (("--model", "x", "--port", "nine"), "invalid int value: 'nine'"),
    ],
)
def test_errors_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(("serve", *options)))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-aegis serve: error: ") and message in line


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets.asyncio.server", None)
    monkeypatch.delitem(sys.modules, "hf_aegis.serving.server", raising=False)
    assert main(("serve", "--model", "x")) == 2
    assert 'pip install "hf-aegis[serve]" (missing module: websockets.asyncio.server)' in capsys.readouterr().err


@pytest.mark.simulator
def test_the_stock_client_drives_a_rollout(running, acting_model):
    """As openpi's LIBERO example does it: its pictures, its state, its replanning, a few steps of it."""
    from hf_aegis.simulation import LiberoEnvironment, find_task

    asked = []

    class Recording(ModelPolicy):
        def act_together(self, requests):
            asked.extend(requests)
            return super().act_together(requests)

    policy = Recording.from_pretrained(acting_model)
    task = find_task("libero_object", 0)
    with LiberoEnvironment(task, image_size=64) as environment, running(policy) as server:
        client = openpi.WebsocketClientPolicy(host="127.0.0.1", port=server.port)
        environment.reset(0)
        start = environment.state
        for _ in range(2):
            state = environment.proprioception()
            # The simulator's own pictures have the bottom row first.
            raw = {name: image[::-1] for name, image in environment.images().items()}
            actions = client.infer(
                {
                    "observation/image": np.ascontiguousarray(raw["agentview_rgb"][::-1, ::-1]),
                    "observation/wrist_image": np.ascontiguousarray(raw["eye_in_hand_rgb"][::-1, ::-1]),
                    "observation/state": np.concatenate([state["ee_pos"], state["ee_ori"], state["gripper_states"]]),
                    "observation/joint_position": state["joint_states"],
                    "prompt": task.language,
                }
            )["actions"]
            seen = asked[-1].observation
            for name in CAMERAS:
                np.testing.assert_array_equal(seen.images[name], raw[name][::-1])
            for name in ("joint_states", "gripper_states", "ee_pos", "ee_ori"):
                np.testing.assert_array_equal(seen.proprioception[name], state[name])
            for action in actions[:3]:
                environment.step(action)
        client._ws.close()
        assert np.abs(environment.state - start).max() > 1e-3
    assert [request.observation.step for request in asked] == [0, 1]
    assert {request.instruction for request in asked} == {task.language}


@pytest.mark.slow
@pytest.mark.simulator
def test_openpi_libero_pictures_are_those_of_stock_libero():
    """What openpi's example makes of stock LIBERO's observations reads as what our environment shows."""
    from hf_aegis.simulation import LiberoEnvironment, find_task
    from hf_aegis.simulation.libero_tasks import import_simulator

    task = find_task("libero_spatial", 0)
    with LiberoEnvironment(task, image_size=64, rendering="standard") as environment:
        environment.reset(0, settling_steps=0)
        images, state = environment.images(), environment.proprioception()
    wrapper = import_simulator("libero.libero.envs.env_wrapper")
    stock = wrapper.OffScreenRenderEnv(bddl_file_name=str(task.bddl_file), camera_heights=64, camera_widths=64)
    try:
        stock.seed(0)
        stock.reset()
        observation = stock.set_init_state(task.init_states()[0])
    finally:
        stock.close()
    transforms = import_simulator("robosuite.utils.transform_utils")
    message = {
        "observation/image": np.ascontiguousarray(observation["agentview_image"][::-1, ::-1]),
        "observation/wrist_image": np.ascontiguousarray(observation["robot0_eye_in_hand_image"][::-1, ::-1]),
        "observation/state": np.concatenate(
            [
                observation["robot0_eef_pos"],
                transforms.quat2axisangle(observation["robot0_eef_quat"].copy()),
                observation["robot0_gripper_qpos"],
            ]
        ),
        "observation/joint_position": observation["robot0_joint_pos"],
        "prompt": json.dumps(task.language),
    }
    features = ("joint_states", "gripper_states", "ee_pos", "ee_ori", "ee_states")
    _, read = ObservationReader("libero-openpi", CAMERAS, features).read(message)
    for name in features:
        np.testing.assert_allclose(read.proprioception[name], state[name], atol=1e-6)
    for name in CAMERAS:
        # Fixtures stand by a seed of their own: most of the picture is equal, and little of it when it is turned.
        near = np.abs(read.images[name].astype(int) - images[name]).max(axis=-1) <= 8
        assert near.mean() > 0.9, name
        for turned in (images[name][:, ::-1], images[name][::-1]):
            assert (np.abs(read.images[name].astype(int) - turned).max(axis=-1) <= 8).mean() < 0.7, name
