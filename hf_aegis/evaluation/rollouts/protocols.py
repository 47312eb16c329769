"""The step limits that success rates on LIBERO are published with."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RolloutProtocol:
    """
    How long a policy may try.

    Args:
        name (`str`): By which results say what they are of.
        source (`str`): Whose it is.
        max_steps (`Mapping[str, int]`): By suite, the actions after which an episode has failed; the idle steps in
            which objects settle do not count.
    """

    name: str
    source: str
    max_steps: Mapping[str, int]


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        RolloutProtocol(
            "openpi",
            "examples/libero/main.py of github.com/Physical-Intelligence/openpi",
            {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400},
        ),
        RolloutProtocol(
            "lerobot",
            "lerobot/envs/libero.py of github.com/huggingface/lerobot",
            {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400},
        ),
    )
}
"""By name. Both let objects settle for 10 idle steps and start from the suites' 50 fixed states per task."""
