import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from answer_view import answer_cards, percent
from answers import Answer, Answers
from figures import Line, chart, legend, nice_ticks
from learning_view import learning_page
from observations import held_out_episodes, observe
from rollout_view import scene, time_curves
from settings import ShownModel, demonstrations, shown_models

from hf_aegis.assets import DEMO_CHECKPOINTS
from hf_aegis.hub import push_folder


HOSTILE = "<script>alert('x')</script>"


def parsed(html):
    """The page's parts are also XML, which a missing or extra bracket is not."""
    return ElementTree.fromstring(f"<div>{html}</div>")


def policy(source="nowhere/at/all", label="Naive"):
    return ShownModel("naive", label, "summary", source, embedded=False, acts=True)


def test_what_models_and_visitors_write_is_text():
    answers = Answers(Answer(HOSTILE, 0.5), [Answer(HOSTILE, 0.5), Answer("", 0.2)])
    html = answer_cards([(policy(label=HOSTILE), answers)], HOSTILE, expected=HOSTILE)
    assert "<script>" not in html
    assert "".join(parsed(html).itertext()).count("alert('x')") >= 4


def test_cards_say_who_is_right():
    cards = [(policy(), Answers(Answer("red", 0.9), [Answer("red", 0.9)]))]
    assert "✓ right" in answer_cards(cards, "?", "red")
    assert "✗ wrong" in answer_cards(cards, "?", "blue")
    assert "verdict" not in answer_cards(cards, "?")


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "> 99.9 %"), (0.9994, "99.9 %"), (0.5, "50.0 %"), (0.001, "0.1 %"), (1e-9, "< 0.1 %")]
)
def test_shares_are_not_more_certain_than_they_are(share, text):
    assert percent(share) == text


@pytest.mark.parametrize("limits", [(0, 1.53), (0, 300), (-1, 1), (0.011, 0.0112), (5, 5), (-3e-4, 2e3)])
def test_ticks_enclose_and_are_few(limits):
    ticks = nice_ticks(*limits)
    assert ticks[0] <= limits[0] <= limits[1] <= ticks[-1]
    assert len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_a_chart_says_what_it_shows_and_stays_inside():
    line = Line("aegis", "AEGIS", [0, 1, 2], [0.0, 2.0, -1.0])
    figure = parsed(chart([line], "a < b", "step", 'from "0" to -1'))
    svg = figure.find(".//svg")
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == 'from "0" to -1'
    points = [tuple(map(float, point.split(","))) for point in figure.find(".//polyline").get("points").split()]
    assert all(0 <= x <= 420 and 0 <= y <= 250 for x, y in points)
    assert points[1][1] < points[0][1] < points[2][1]
    assert "AEGIS" in "".join(parsed(legend([("aegis", "AEGIS")])).itertext())


def test_the_curves_are_those_of_the_runs():
    html = learning_page(shown_models())
    assert len(parsed(html).findall(".//svg[@role='img']")) == 3
    for folder in DEMO_CHECKPOINTS.values():
        accuracy = json.loads((folder / "evaluation.json").read_text())["vqa"]["accuracy"]
        assert f"{100 * accuracy:.1f} %" in html
    assert "61.1 %" in html


def test_a_model_without_a_log_is_named(tmp_path):
    shutil.copytree(DEMO_CHECKPOINTS["naive"], tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "run" / "evaluation.json").unlink()
    (tmp_path / "empty").mkdir()
    html = learning_page([policy(str(tmp_path / "run")), policy(str(tmp_path / "empty"), "Bare")])
    assert "Without a log of their training: Bare" in html
    assert "<table" not in html
    assert "None of the models" in learning_page([policy(str(tmp_path / "empty"))])


def test_logs_come_from_the_hub_where_the_model_is(hub, tmp_path):
    (tmp_path / "run").mkdir()
    lines = [{"step": step, "vqa_accuracy": 1 - step / 100} for step in (0, 50)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    push_folder(tmp_path / "run", "org/run")
    assert "from 100 to 50" in learning_page([policy("org/run")])
    assert "None of the models" in learning_page([policy("org/other")])


def test_another_s_evaluation_is_no_table(tmp_path):
    shutil.copytree(DEMO_CHECKPOINTS["naive"], tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"accuracy": 0.5}))
    html = learning_page([policy(str(tmp_path / "run"))])
    assert "<svg" in html and "<table" not in html


def test_paths_are_drawn_over_the_picture():
    episode = held_out_episodes(demonstrations())[0]
    seen = observe(episode, 20, 50)
    actions = np.repeat([[0, 0, 0, 0, 0, 0, 1.0]], 50, axis=0)
    view = parsed(scene(episode, seen, {policy(): actions}))
    assert [group.get("class") for group in view.findall(".//figure/svg/g")] == [
        "line path demonstration",
        "line path naive",
    ]
    assert view.find(".//image").get("href").startswith("data:image/jpeg;base64,")
    assert {dot.get("class") for dot in view.findall(".//g[@class='line path naive']/circle")} == {"closes"}
    assert "cm" in view.find(".//p[@class='outcome']").text
    assert view.find(".//img").get("alt")
    curves = parsed(time_curves(seen, {policy(): actions}))
    assert [each.text for each in curves.findall(".//figcaption")] == [
        "x",
        "y",
        "z",
        "roll",
        "pitch",
        "yaw",
        "gripper",
    ]


def test_the_last_moment_can_be_drawn():
    episode = held_out_episodes(demonstrations())[0]
    seen = observe(episode, episode.length - 1, 50)
    parsed(scene(episode, seen, {policy(): np.zeros((50, 7))}))
    parsed(time_curves(seen, {}))
