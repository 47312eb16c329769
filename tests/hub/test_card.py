from pathlib import Path

import pytest
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from hf_aegis.hub import card, find_template, render_card


ROOT = Path(__file__).parents[2]
TEMPLATE = "---\n{{ card_data }}\n---\n\n# {{ title }}\n{# for authors only #}\n{{ license }}: {{ count }}\n"


@pytest.fixture
def template(tmp_path):
    def write(text):
        (tmp_path / "card.md").write_text(text)
        return tmp_path / "card.md"

    return write


def test_metadata_and_values_are_filled_in(template):
    data = DatasetCardData(license="mit", tags=["x", "y"], size_categories="n<1K")
    text = render_card(template(TEMPLATE), data, title="A title: <b>", count=3)
    assert text == "---\nlicense: mit\nsize_categories: n<1K\ntags:\n- x\n- y\n---\n\n# A title: <b>\nmit: 3\n"


def test_eval_results_survive(template):
    result = EvalResult(
        task_type="visual-question-answering",
        dataset_type="easy-vqa",
        dataset_name="easy-VQA",
        metric_type="accuracy",
        metric_value=0.9,
    )
    data = ModelCardData(license="mit", model_name="name", eval_results=[result])
    text = render_card(template(TEMPLATE), data, title="", count=0)
    assert "model-index:" in text and "value: 0.9" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEMPLATE.replace("title", "missing"), "'missing' is undefined"),
        (TEMPLATE + "{% if %}", "Expected an expression"),
        (TEMPLATE + "<!-- a comment -->", "still holds '<!--'"),
        (TEMPLATE + "[More Information Needed]", "still holds '.More Information Needed.'"),
        (TEMPLATE + "{% raw %}{{ left }}{% endraw %}", "still holds '{{ '"),
        (TEMPLATE.replace("---", "", 1), "front matter says {}"),
        (TEMPLATE.replace("{{ card_data }}", "license: apache-2.0"), "front matter says .*apache-2.0"),
        (TEMPLATE.replace("{{ card_data }}", "- a"), "front matter is not valid"),
    ],
)
def test_a_card_that_is_not_whole_is_refused(template, text, message):
    with pytest.raises(ValueError, match=rf"card\.md: .*{message}"):
        render_card(template(text), DatasetCardData(license="mit"), title="", count=0)


def test_templates_are_found_in_a_checkout_and_in_a_wheel(monkeypatch, tmp_path):
    assert find_template("anchor.md") == ROOT / "model_cards" / "anchor.md"
    installed = tmp_path / "model_cards" / "anchor.md"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(card, "_TEMPLATE_FOLDERS", (tmp_path / "model_cards", ROOT / "model_cards"))
    assert find_template("anchor.md") == installed
    with pytest.raises(FileNotFoundError, match=r"no template 'nothing\.md'"):
        find_template("nothing.md")


def test_a_file_of_the_working_directory_is_no_template(monkeypatch, tmp_path):
    # As in the output folder of a comparison.
    (tmp_path / "results.md").write_text("| condition |")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model_cards/results\.md: .* is undefined"):
        render_card("results.md", DatasetCardData())


def test_a_wheel_carries_the_templates():
    from hatchling.builders.wheel import WheelBuilder

    # Building one takes seconds, most of them for the embedded data.
    sources = WheelBuilder(str(ROOT)).config.force_include
    assert sources[str(ROOT / "model_cards")] == "hf_aegis/model_cards"
