"""What clients send becomes what the policy was trained to see, or a sentence that says why not."""

import numpy as np
import pytest

from hf_aegis.cli import serve
from hf_aegis.serving import CLIENTS, MessageError, ObservationReader


CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
JOINTS = ("joint_states", "gripper_states")
POSE = ("ee_pos", "ee_ori", "gripper_states")


def test_the_command_offers_all_clients():
    assert serve.CLIENTS == CLIENTS


def test_openpi_libero_is_mirrored_and_its_state_taken_apart(libero_openpi):
    instruction, observation = ObservationReader("libero-openpi", CAMERAS, JOINTS).read(libero_openpi, step=3)
    assert instruction == "pick up the red cup" and observation.step == 3
    np.testing.assert_array_equal(observation.images["agentview_rgb"], libero_openpi["observation/image"][:, ::-1])
    np.testing.assert_array_equal(
        observation.images["eye_in_hand_rgb"], libero_openpi["observation/wrist_image"][:, ::-1]
    )
    state = observation.proprioception
    np.testing.assert_array_equal(state["ee_pos"], [0, 1, 2])
    np.testing.assert_array_equal(state["ee_ori"], [3, 4, 5])
    np.testing.assert_array_equal(state["gripper_states"], [6, 7])
    np.testing.assert_array_equal(state["joint_states"], np.arange(10, 17))


def test_a_policy_of_poses_needs_no_joints(libero_openpi):
    del libero_openpi["observation/joint_position"]
    _, observation = ObservationReader("libero-openpi", CAMERAS, POSE).read(libero_openpi)
    np.testing.assert_array_equal(np.concatenate([observation.proprioception[name] for name in POSE]), np.arange(8))
    with pytest.raises(MessageError, match=r"missing keys \['observation/joint_position'\]"):
        ObservationReader("libero-openpi", CAMERAS, JOINTS).read(libero_openpi)


def test_what_a_policy_does_not_look_at_need_not_be_sent(libero_openpi):
    message = {"prompt": "go", "observation/image": libero_openpi["observation/image"]}
    reader = ObservationReader("libero-openpi", ("agentview_rgb",), ())
    assert set(reader.expected) == set(message)
    _, observation = reader.read(message)
    assert set(observation.images) == {"agentview_rgb"} and not observation.proprioception


def test_native_is_as_recorded(libero_openpi):
    image = libero_openpi["observation/image"]
    message = {
        "prompt": "go",
        "observation/agentview_rgb": image,
        "observation/eye_in_hand_rgb": image[::2],
        "observation/joint_states": list(range(7)),
        "observation/gripper_states": np.array([1, -1], dtype=np.int8),
        "somebody/elses": object(),
    }
    _, observation = ObservationReader("native", CAMERAS, JOINTS).read(message)
    np.testing.assert_array_equal(observation.images["agentview_rgb"], image)
    np.testing.assert_array_equal(observation.images["eye_in_hand_rgb"], image[::2])
    np.testing.assert_array_equal(observation.proprioception["joint_states"], np.arange(7.0))
    assert observation.proprioception["gripper_states"].dtype == np.float64


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt", "", "'prompt', the instruction, is empty, or all of it is invisible: ''"),
        ("prompt", " \n\0\u200b\u202e", "is empty, or all of it is invisible"),
        ("prompt", b"go", "found a bytes"),
        ("prompt", "go " * 1000, "'prompt', the instruction, has 3000 characters, expected at most 1000"),
        ("observation/image", None, "'observation/image' is a NoneType: expected a uint8 array"),
        ("observation/image", np.zeros((3, 24, 24), np.uint8), r"is uint8 of shape \(3, 24, 24\): expected a uint8"),
        ("observation/image", np.zeros((24, 24, 3)), r"is float64 of shape \(24, 24, 3\): expected a uint8"),
        ("observation/image", np.zeros((24, 24, 4), np.uint8), "expected a uint8 array"),
        ("observation/image", np.zeros((24, 0, 3), np.uint8), "expected a uint8 array"),
        ("observation/image", np.zeros((1, 24, 24, 3), np.uint8), "expected a uint8 array"),
        ("observation/image", np.zeros((1, 4097, 3), np.uint8), "expected at most 4096 pixels a side"),
        ("observation/state", np.full(8, 1e39), r"is 1e\+39 in column 0: expected finite"),
        ("observation/state", np.zeros(9), r"is float64 of shape \(9,\): expected 8 numbers, shape \(8,\)"),
        ("observation/state", np.zeros((1, 8)), "expected 8 numbers"),
        ("observation/state", np.zeros(8, bool), "is bool of shape"),
        ("observation/state", [0.0] * 7, r"is float64 of shape \(7,\): expected 8 numbers"),
        ("observation/state", [0.0] * 7 + ["1"], "is a list: expected 8 numbers"),
        ("observation/state", {"a": 1}, "is a dict: expected 8 numbers"),
        ("observation/state", np.array([0, 1, np.nan, 3, 4, 5, np.inf, 7]), "is nan in column 2: expected finite"),
        ("observation/joint_position", np.full(7, -np.inf, np.float32), "is -inf in column 0: expected finite"),
    ],
)
def test_wrong_values_are_named(libero_openpi, key, value, message):
    libero_openpi[key] = value
    with pytest.raises(MessageError, match=message) as told:
        ObservationReader("libero-openpi", CAMERAS, JOINTS).read(libero_openpi)
    assert repr(key)[1:-1] in str(told.value)


@pytest.mark.parametrize("message", [None, [], "text", 3, np.zeros(3)])
def test_only_dictionaries(message):
    with pytest.raises(MessageError, match="an observation is a dictionary; found a"):
        ObservationReader("native", CAMERAS, JOINTS).read(message)


def test_missing_keys_are_named():
    with pytest.raises(MessageError, match=r"missing keys \['prompt', .*; found \['image'\], expected \['prompt'"):
        ObservationReader("native", CAMERAS, JOINTS).read({"image": 1, b"\xff": 2, 3.5: 3})


@pytest.mark.parametrize(
    ("client", "cameras", "features", "message"),
    [
        ("aloha", CAMERAS, JOINTS, "client must be one of libero-openpi, native; found 'aloha'"),
        ("native", ("overhead",), JOINTS, r"send images of .*; the policy needs \['overhead'\]"),
        ("libero-openpi", CAMERAS, ("robot_states",), r"send the state as .*; the policy needs \['robot_states'\]"),
    ],
)
def test_policies_that_clients_cannot_ask_are_refused(client, cameras, features, message):
    with pytest.raises(ValueError, match=message):
        ObservationReader(client, cameras, features)
