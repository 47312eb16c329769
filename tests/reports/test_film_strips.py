"""Strips of films: which episodes are chosen, and that each row is one."""

import html
import json

import numpy as np
import pytest
from PIL import Image

from hf_aegis.evaluation.rollouts.film import Film
from hf_aegis.functional.wilson import wilson_interval
from hf_aegis.reports.comparison_report import write_report
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


def test_the_report_shows_success_and_films(tmp_path, write_comparison):
    conditions = {"naive": (1.4, 0.61, 0.332), "aegis": (0.84, 0.71, 0.328)}
    folder = write_comparison(tmp_path / "comparison", conditions, seeds=(0,), layers=2, analyses=False)
    for successes, (name, colour) in enumerate((("naive", 60), ("aegis", 200)), start=3):
        (folder / "elsewhere" / name).mkdir(parents=True)
        logs = run(folder / "elsewhere" / name, name, 0, {0: colour})
        for path in sorted(logs.folder.iterdir()):
            path.rename(folder / "runs" / name / "seed_0" / path.name)
        score = {"episodes": 10, "successes": successes, "crashed": 0, "success_rate": successes / 10}
        scores = {**score, "by_suite": {"s": score}}
        (folder / "runs" / name / "seed_0" / "libero.json").write_text(json.dumps(scores))
    settings = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps({**settings, "libero": {"suite": ["s"], "episodes": 10}}))
    text = write_report(folder).read_text()
    low, high = wilson_interval(3, 10)
    assert f"30.0 [{100 * low:.1f}, {100 * high:.1f}]" in text
    assert "Asked for: suite ['s']; episodes 10." in html.unescape(text)
    assert "fixed start 0, the same for all conditions" in text
    with Image.open(folder / "figures" / "film_strips.png") as sheet:
        assert sheet.size == (8 * 130 - 2, 2 * 150)
    # Of a comparison in which nothing acts, nothing is missing.
    for path in folder.glob("runs/*/*/libero.json*"):
        path.rename(path.with_name(f"other_{path.name}"))
    text = write_report(folder).read_text()
    assert "LIBERO simulator" not in text
