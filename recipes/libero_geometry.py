"""
Derives what the Space needs to draw actions into LIBERO's pictures, `space/geometry.json`.

    python recipes/libero_geometry.py --output space/geometry.json

*Cameras*: for each of LIBERO's scenes, the 3×4 matrix that takes a point of the world (m) to the agent view, read off
the simulator: (x, y, z, 1) -> (u·w, v·w, w), with u from the left and v from the top in shares of the picture's side.

*Response*: how far the gripper goes when it is told to. One unit of translation asks for 5 cm in a twentieth of a
second, but the controller lags behind. Along each axis the step d(t) = p(t + 1) - p(t) is fitted by least squares on
the shipped demonstrations as d(t) = a·d(t - 1) + b·u(t), without those that are held out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hf_aegis.assets import DEMONSTRATIONS
from hf_aegis.atomic_files import write_text
from hf_aegis.data.libero_files import find_data_groups, open_libero_file
from hf_aegis.simulation.libero_environment import LiberoEnvironment
from hf_aegis.simulation.libero_tasks import find_task, import_simulator


# One task of each scene that LIBERO has.
SCENES = (
    ("libero_object", 0),
    ("libero_spatial", 0),
    ("libero_10", "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"),
    ("libero_10", "LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket"),
    ("libero_10", "STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    cameras = {}
    for suite, task in SCENES:
        with LiberoEnvironment(find_task(suite, task)) as environment:
            cameras[environment.env_arguments["problem_name"]] = agent_view(environment).round(6).tolist()
    with open_libero_file(DEMONSTRATIONS) as file:
        response = gripper_response(file)
    write_text(arguments.output, json.dumps({"cameras": cameras, "response": response}, indent=2) + "\n")


def agent_view(environment: LiberoEnvironment) -> np.ndarray:
    """The agent view's projection `(3, 4)` in the scene of a freshly made environment."""
    camera_utils = import_simulator("robosuite.utils.camera_utils")
    simulation = environment._libero.sim
    return camera_utils.get_camera_transform_matrix(simulation, "agentview", 1, 1)[:3]


def gripper_response(file: h5py.File) -> dict[str, Any]:
    """Coefficients a and b (m) for each axis, and the share of the steps' variance that they explain."""
    steps, before, asked = [], [], []
    for group in find_data_groups(file):
        for name in sorted(group)[:-1]:
            moved = np.diff(group[name]["obs/ee_pos"][:], axis=0)
            steps.append(moved[1:])
            before.append(moved[:-1])
            asked.append(group[name]["actions"][1:-1, :3])
    target, inputs = np.concatenate(steps), np.stack([np.concatenate(before), np.concatenate(asked)], axis=-1)
    fitted = np.stack([np.linalg.lstsq(inputs[:, axis], target[:, axis])[0] for axis in range(3)])
    error = target - np.einsum("nac,ac->na", inputs, fitted)
    explained = 1 - np.square(error).sum() / np.square(target - target.mean(axis=0)).sum()
    return {
        "a": fitted[:, 0].round(6).tolist(),
        "b": fitted[:, 1].round(6).tolist(),
        "explained": round(float(explained), 4),
    }


if __name__ == "__main__":
    main()
