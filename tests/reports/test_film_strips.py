"""Strips of films: which episodes are chosen, and that each row is one."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_aegis.evaluation.rollouts.film import Film
from hf_aegis.reports.film_strips import filmed_episodes, plot_film_strips
from hf_aegis.reports.run_logs import RunLogs


class Scene:
    """Pictures of one colour."""

    def __init__(self, colour):
        self.colour = colour

    def render(self, camera, size):
        return np.full((size, size, 3), self.colour, np.uint8)


def run(folder, condition, seed, colours):
    """A run's folder with an episode for each start; those with a colour were filmed."""
    logs = RunLogs(condition, seed, folder / condition / f"seed_{seed}")
    logs.folder.mkdir(parents=True)
    lines = [{"settings": {}}]
    for start, colour in reversed(colours.items()):
        lines.append({"suite": "s", "task": "t", "start": start, "success": start % 2 == 0, "steps": 10 * start})
        if colour is not None:
            film = Film("do it")
            for step in (0, 4, 8):
                film.add(Scene(colour), step)
            film.save(logs.folder / "libero.json.films" / "s" / f"t_start_{start}.webp", "success")
    path = logs.folder / "libero.json.episodes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return logs


def test_the_episode_is_one_that_most_conditions_have_on_film(tmp_path):
    logs = {
        "naive": [run(tmp_path, "naive", 0, {0: 10, 1: 20, 2: 30, 3: None})],
        "aegis": [run(tmp_path, "aegis", 0, {3: None}), run(tmp_path, "aegis", 1, {1: 40, 2: 50})],
        "none": [RunLogs("none", 0, tmp_path / "nothing")],
    }
    episodes = filmed_episodes(logs, {"naive": "Naive", "aegis": "AEGIS", "none": "None"})
    assert [(one.label, one.episode["start"], one.outcome) for one in episodes] == [
        ("Naive", 1, "failure"),
        ("AEGIS", 1, "failure"),
    ]
    assert episodes[1].film.parts[-5] == "aegis" and episodes[1].film.parts[-4] == "seed_1"
    assert filmed_episodes({"none": logs["none"]}, {"none": "None"}) == []

    plot_film_strips(episodes, tmp_path / "strips.tmp")
    with Image.open(tmp_path / "strips.tmp") as sheet:
        picture = np.asarray(sheet, dtype=float)
    height = picture.shape[0] // 2
    for row, colour in enumerate((20, 40)):
        scene = picture[row * height + 60, 10]
        assert scene == pytest.approx([colour] * 3, abs=6)
