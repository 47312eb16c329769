"""Messages of a policy's clients, as far as the observation that a policy is asked with."""

from random import Random

import msgpack
import numpy as np
from fuzz_engine import mutate_bytes, mutate_value

from hf_aegis.evaluation.rollouts.policy import FEATURE_WIDTHS
from hf_aegis.serving.clients import ObservationReader
from hf_aegis.serving.messages import MessageError, pack, unpack
from network_readers.case import Case


def messages() -> Case:
    cameras, native = ("agentview_rgb", "eye_in_hand_rgb"), tuple(FEATURE_WIDTHS)
    openpi = ("ee_pos", "ee_ori", "gripper_states", "joint_states")
    readers = [ObservationReader("native", cameras, native), ObservationReader("libero-openpi", cameras, openpi)]

    def read(data: bytes) -> None:
        message, refused = unpack(data), []
        for reader in readers:
            try:
                instruction, observation = reader.read(message)
            except MessageError as error:
                refused.append(error)
                continue
            assert instruction.strip()
            for image in observation.images.values():
                assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
            for values in observation.proprioception.values():
                assert np.isfinite(values.astype(np.float32)).all()
        assert all(len(str(error)) < 2000 for error in refused)
        if len(refused) == len(readers):
            raise refused[0]

    pixels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    seeds = [
        {"prompt": "pick up the milk"}
        | {f"observation/{name}": pixels for name in cameras}
        | {f"observation/{name}": np.linspace(-1, 1, width) for name, width in FEATURE_WIDTHS.items()},
        {
            "observation/image": pixels,
            "observation/wrist_image": pixels,
            "observation/state": np.arange(8, dtype=np.float32),
            "observation/joint_position": [0.1, 2, -3.5, 4, 5, 6, 7],
            "prompt": "go",
            "observation/time": np.float16(0.5),
            "more": {"list": [1, [2.5, None], {"a": True}]},
        },
    ]
    return Case(read, [pack(seed) for seed in seeds], (MessageError,), (mutate_message,) * 2)


def mutate_message(data: bytes, random: Random) -> bytes:
    """A message with one place in it changed; or, where msgpack cannot hold that, with some of its bytes changed."""
    try:
        value = mutate_value(msgpack.unpackb(data, strict_map_key=False), random)
        return msgpack.packb(value, unicode_errors="surrogatepass")
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
        return mutate_bytes(data, random)
