import contextlib
import copy
import json
import threading

import pytest
from PIL import Image
from settings import FOLDER, ShownModel


@pytest.fixture
def warned(app, monkeypatch):
    """What visitors were warned of."""
    messages = []
    monkeypatch.setattr(app.gr, "Warning", messages.append)
    return messages


def test_what_is_offered_to_programs_is_named(app):
    named = app.demo.get_api_info()["named_endpoints"]
    assert set(named) == {"/ask", "/act"}


def test_nothing_leaves_and_nothing_is_shared(app):
    assert app.LAUNCH["share"] is False
    assert app.LAUNCH["ssr_mode"] is False
    assert app.demo.analytics_enabled is False
    assert app.LAUNCH["theme"].font.startswith("system-ui")
    assert "http" not in (FOLDER / "style.css").read_text()


def test_each_model_answers(app, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    html = app.answer(str(tmp_path / "red.png"), "what color is the shape?")
    assert html.count("<section") == len(app.MODELS) == 4


def test_the_examples_are_answered_right_before_fine_tuning(app):
    for index, example in enumerate(app.EXAMPLES):
        file, question, html = app.answer_example(index)
        assert file == str(FOLDER / "examples" / example["image"])
        assert question == example["question"]
        before, naive = html.split('data-model="naive"')[0], html.split('data-model="naive"')[1]
        assert "✓ right" in before
        # As `recipes/space_examples.py` chose them.
        assert naive.split("<section")[0].count("✗ wrong") == (index in (1, 4, 5))


def test_one_model_that_cannot_be_loaded_does_not_silence_the_others(app, monkeypatch, warned, tmp_path):
    missing = ShownModel("aegis", "AEGIS", "", str(tmp_path / "none"), embedded=False, acts=True)
    monkeypatch.setattr(app, "MODELS", [app.MODELS[0], missing])
    html = app.answer_example(0)[2]
    assert 'data-model="base"' in html
    assert 'data-model="aegis"' not in html
    assert warned == ["The model “AEGIS” cannot be loaded at the moment."]
    monkeypatch.setattr(app, "MODELS", [missing])
    with pytest.raises(app.gr.Error, match="None of the models"):
        app.answer_example(0)


def test_a_chunk_is_drawn_for_the_chosen_policies(app):
    view, curves = app.act(0, 10, "pick up the milk", ["AEGIS"], 3)
    assert "path aegis" in view
    assert "path naive" not in view
    assert curves.count('role="img"') == 7
    assert view != app.act(0, 10, "pick up the milk", ["AEGIS"], 4)[0]


def test_a_policy_that_was_trained_on_something_else_is_told_of(app, warned, monkeypatch):
    load = app.load

    def load_with_one_camera(shown):
        loaded = load(shown)
        if shown.key != "naive":
            return loaded
        processor = copy.copy(loaded.processor)
        processor.cameras = ["agentview"]
        return loaded._replace(processor=processor)

    monkeypatch.setattr(app, "load", load_with_one_camera)
    view, _ = app.act(0, 10, "pick up the milk", ["Naive", "AEGIS"], 3)
    assert "path aegis" in view and "path naive" not in view
    assert warned == ["The model “Naive” was trained on other observations or actions than these."]


def test_only_the_first_visitor_warms_the_models_up(app, monkeypatch):
    """Though several come at once, and though it fails."""
    asked = []
    all_there = threading.Barrier(5)

    def fail(index):
        asked.append(index)
        raise app.gr.Error("none of the models can do this", print_exception=False)

    def visit():
        all_there.wait(10)
        with contextlib.suppress(app.gr.Error):
            app.warm_up()

    monkeypatch.setattr(app, "answer_example", fail)
    monkeypatch.setattr(app, "_first_visit", threading.Lock())
    visitors = [threading.Thread(target=visit) for _ in range(5)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(10)
    app.warm_up()
    assert asked == [0]


def test_whatever_runs_a_model_stands_in_one_line(app):
    found = {}
    for event in app.demo.fns.values():
        function = getattr(event.fn, "func", event.fn)
        in_line = event.queue is not False and event.concurrency_limit == 1 and event.concurrency_id == "model"
        found.setdefault(function.__name__, set()).add(in_line)
    assert {name for name, in_line in found.items() if in_line == {True}} == {
        "answer",
        "answer_example",
        "act",
    }
    # The last of these runs a model for the first visitor alone.
    assert {name for name, in_line in found.items() if in_line == {False}} == {
        "choose_episode",
        "look",
        "learning_page",
        "warm_up",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": None}, "choose a task"),
        ({"index": 10_000}, "choose a task"),
        ({"instruction": " "}, "write an instruction"),
        ({"instruction": "x" * 300}, "200 are the most"),
        ({"policies": []}, "at least one policy"),
        ({"policies": None}, "at least one policy"),
        ({"policies": ["nobody's"]}, "at least one policy"),
        ({"seed": None}, "whole number"),
        ({"seed": -1}, "whole number"),
        ({"seed": 0.5}, "whole number"),
        ({"seed": 2**40}, "whole number"),
    ],
)
def test_what_cannot_be_drawn_is_explained(app, change, message):
    inputs = {"index": 0, "step": 0, "instruction": "go", "policies": ["AEGIS"], "seed": 0} | change
    with pytest.raises(app.gr.Error) as caught:
        app.act(**inputs)
    assert message in caught.value.message


def test_a_moment_past_the_end_is_the_last_one(app):
    assert app.look(0, 10_000) == app.look(0, app.EPISODES[0].length - 1)
    slider, instruction, view, curves = app.choose_episode(1)
    assert slider.maximum == app.EPISODES[1].length - 1
    assert instruction == app.EPISODES[1].instruction
    assert (view.count("<svg") > 0, curves) == (True, "")


def test_the_examples_say_where_they_are_from():
    stored = json.loads((FOLDER / "examples" / "examples.json").read_text())
    assert all(each["from"].startswith("easy-vqa/test/") for each in stored)
    assert {path.name for path in (FOLDER / "examples").glob("*.png")} == {each["image"] for each in stored}
