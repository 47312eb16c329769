"""A chunk of actions drawn into what the robot sees, and over time."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from acting import follow, gripper_closes, project
from figures import Line, chart, legend
from observations import Episode, Observation
from PIL import Image
from settings import ShownModel


_DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_STEPS_PER_SECOND = 20
_SIDE = 100
_PIXELS = (512, 512)
DEMONSTRATION = ("demonstration", "Demonstrated")


def scene(episode: Episode, observation: Observation, predictions: Mapping[ShownModel, np.ndarray]) -> str:
    """
    The agent view with the gripper's demonstrated path and those that the predicted actions lead along, and beside it
    what the camera in the hand sees.
    """
    paths, labels = "", []
    demonstrated = project(observation.positions, episode.scene)
    if demonstrated is not None:
        paths += _path(DEMONSTRATION[0], demonstrated, gripper_closes(observation.actions))
        labels.append(DEMONSTRATION)
        for shown, actions in predictions.items():
            points = project(follow(actions, observation), episode.scene)
            assert points is not None
            paths += _path(shown.key, points, gripper_closes(actions))
            labels.append((shown.key, shown.label))
        x, y = _SIDE * demonstrated[0]
        paths += f'<circle class="now" cx="{x:.2f}" cy="{y:.2f}" r="1.9"/>'
        note = (
            '<p class="note">Open dots: the fingers open; full dots: they close. The ring is where the gripper is. '
            "Predicted paths follow the controller’s measured response; contacts are not simulated.</p>"
        )
    else:
        note = f'<p class="note">No camera is known for the scene “{escape(episode.scene)}”: paths are not drawn.</p>'
    described = _describe(observation, predictions)
    agent, hand = (_picture(image) for image in observation.images)
    return (
        '<div class="scene">'
        f'<figure><svg viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="The robot’s view. {escape(described)}">'
        f'<image href="{agent}" width="{_SIDE}" height="{_SIDE}"/>{paths}</svg>'
        "<figcaption>What the robot sees, and where it would go</figcaption></figure>"
        f'<figure class="hand"><img src="{hand}" alt="The view of the camera in the robot’s hand"/>'
        f"<figcaption>Camera in the hand</figcaption></figure></div>{legend(labels)}{note}"
        f'<p class="outcome">{escape(described)}</p>'
    )


def time_curves(observation: Observation, predictions: Mapping[ShownModel, np.ndarray]) -> str:
    """The seven dimensions of the actions over time, in robot units."""
    charts = []
    for index, name in enumerate(_DIMENSIONS):
        lines = [_course(*DEMONSTRATION, observation.actions[:, index])]
        lines += [_course(shown.key, shown.label, actions[:, index]) for shown, actions in predictions.items()]
        lines = [line for line in lines if len(line.x) > 1]
        if not lines:
            continue
        limits = (-1.0, 1.0) if index in (0, 1, 2, 6) else (-0.5, 0.5)
        lowest, highest = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
        limits = (min(limits[0], lowest), max(limits[1], highest))
        means = "; ".join(f"{line.label} {np.mean(line.y):.2f} on average" for line in lines)
        charts.append(
            chart(lines, name, "seconds", f"{name} over time: {means}.", limits, size=(260, 150), markers=False)
        )
    return (
        '<p class="note">Actions as the robot gets them, twenty a second: one unit of x, y, z asks for 5 cm, one of '
        "roll, pitch, yaw for half a radian; the gripper opens at −1 and closes at +1.</p>"
        f'<div class="charts small">{"".join(charts)}</div>'
    )


def _course(key: str, label: str, values: Sequence[float]) -> Line:
    seconds = [step / _STEPS_PER_SECOND for step in range(len(values))]
    return Line(key, label, seconds, [float(value) for value in values])


def _path(key: str, points: np.ndarray, closes: np.ndarray) -> str:
    """A line along the points, over a pale one that sets it off from the picture, and a dot for every fifth action."""
    scaled = _SIDE * points
    line = " ".join(f"{x:.2f},{y:.2f}" for x, y in scaled)
    dots = "".join(
        f'<circle class="{"closes" if closes[step] else "opens"}" cx="{x:.2f}" cy="{y:.2f}" r="0.95"/>'
        for step, (x, y) in enumerate(scaled[: len(closes)])
        if step % 5 == 0 and step > 0
    )
    return f'<g class="line path {key}"><polyline class="halo" points="{line}"/><polyline points="{line}"/>{dots}</g>'


def _describe(observation: Observation, predictions: Mapping[ShownModel, np.ndarray]) -> str:
    """How far apart the predicted and the demonstrated way are, in words."""
    if not predictions:
        return f"The demonstrator’s next {len(observation.actions)} actions are drawn."
    last = len(observation.positions) - 1
    distances = []
    for shown, actions in predictions.items():
        apart = np.linalg.norm(follow(actions, observation)[: last + 1][-1] - observation.positions[-1])
        distances.append(f"{shown.label} {100 * apart:.0f} cm")
    return f"How far from the demonstrator after {last / _STEPS_PER_SECOND:.1f} s: {', '.join(distances)}."


def _picture(image: np.ndarray) -> str:
    """A frame as a data address, so large that browsers, which enlarge more coarsely, need not."""
    buffer = io.BytesIO()
    Image.fromarray(image).resize(_PIXELS, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
