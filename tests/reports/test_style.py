from pathlib import Path

import pytest
import yaml

from hf_aegis.reports.style import (
    CONDITION_STYLES,
    condition_order,
    condition_panels,
    condition_styles,
    group_labels,
    group_order,
    split_ablations,
)


NAMES = [name for name in CONDITION_STYLES if name != "pretrained"]


def test_conditions_of_a_panel_differ_in_colour_in_line_and_in_marker():
    for panel in condition_panels(NAMES):
        shown = [CONDITION_STYLES[name] for name in {*panel.conditions, *panel.references}]
        for trait in ("color", "linestyle", "marker", "label"):
            assert len({str(style[trait]) for style in shown}) == len(shown), (panel, trait)


def test_markers_and_colours_tell_all_conditions_apart():
    looks = {(CONDITION_STYLES[name]["color"], CONDITION_STYLES[name]["marker"]) for name in NAMES}
    assert len(looks) == len(NAMES)


def test_every_condition_is_in_one_panel_beside_naive_and_aegis():
    panels = condition_panels([*NAMES, "mine", "yours"])
    shown = [name for panel in panels for name in panel.conditions]
    assert sorted(shown) == sorted([*NAMES, "mine", "yours"])
    assert panels[0].conditions[:2] == ["naive", "aegis"]
    assert all(panel.references == ["naive", "aegis"] for panel in panels[1:])
    assert max(len(panel.conditions) for panel in panels) <= 6


def test_few_conditions_share_one_panel():
    assert [panel.conditions for panel in condition_panels(["aegis", "ewc", "naive"])] == [["naive", "aegis", "ewc"]]
    assert condition_panels(["lora", "mine"])[0].references == []


def test_references_get_a_panel_where_no_condition_of_the_paper_is_there():
    panels = condition_panels(["naive", "aegis", "ewc", "l2sp", "a_gem", "pcgrad", "graddrop"])
    assert [panel.conditions for panel in panels] == [
        ["naive", "aegis"],
        ["ewc", "l2sp"],
        ["a_gem", "pcgrad", "graddrop"],
    ]


def test_unknown_conditions_get_different_looks():
    styles = condition_styles(["one_more", "another", "naive"])
    assert styles["one_more"]["label"] == "one more"
    assert styles["one_more"]["color"] != styles["another"]["color"]
    assert styles["naive"] is CONDITION_STYLES["naive"]


def test_colours_of_few_conditions_all_differ():
    names = ["naive", "aegis", "lora", "l2sp", "pairs_90", "feature_distillation"]
    assert len({CONDITION_STYLES[name]["color"] for name in names}) < len(names)
    styles = condition_styles(names)
    for trait in ("color", "linestyle", "marker"):
        assert len({str(style[trait]) for style in styles.values()}) == len(names), trait
    # A condition keeps its own colour where it can.
    assert all(styles[name] is CONDITION_STYLES[name] for name in names[:4])


def test_variants_of_aegis_are_set_apart():
    assert split_ablations(["aegis_eps", "ewc", "aegis", "naive", "aegis_lora"]) == (
        ["naive", "aegis", "ewc", "aegis_lora"],
        ["naive", "aegis", "aegis_eps"],
    )
    assert split_ablations(["naive", "ewc"]) == (["naive", "ewc"], [])


def test_ablations_alone_are_all_together():
    names = ["naive", "aegis", "aegis_mine", "aegis_global", "aegis_eps", "transport_loss", "transport_loss_10"]
    methods, ablations = split_ablations(names)
    assert methods == []
    assert sorted(ablations) == sorted(names)
    panels = {panel.title: panel.conditions for panel in condition_panels([*names, "mine"])}
    assert panels == {
        "naive and AEGIS": ["naive", "aegis"],
        "AEGIS: what is projected": ["aegis_global"],
        "AEGIS: damped, or its penalty as a loss": ["aegis_eps", "transport_loss", "transport_loss_10"],
        "AEGIS: other variants": ["aegis_mine"],
        "others": ["mine"],
    }
    assert condition_styles(["aegis_mine"])["aegis_mine"]["label"] == "AEGIS, mine"
    # AEGIS with LoRA is a method of its own.
    assert "AEGIS: other variants" not in {panel.title for panel in condition_panels(["aegis_lora", *names[:3]])}


@pytest.mark.parametrize("recipe", ["compare_embedded", "ablations_embedded", "why_embedded", "study_embedded"])
def test_conditions_of_shipped_comparisons_have_looks(recipe):
    path = Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml"
    names = yaml.safe_load(path.read_text())["conditions"].keys()
    assert names <= set(NAMES)
    methods, ablations = split_ablations(names)
    assert not (methods and ablations)


def test_orders_are_those_of_the_tables():
    assert condition_order(["zebra", "lora", "aegis", "apple", "naive"]) == [
        "naive",
        "aegis",
        "lora",
        "apple",
        "zebra",
    ]
    groups = group_order({"multi_modal_projector", "layers.10", "layers.2", "embeddings"})
    assert groups == ["layers.2", "layers.10", "embeddings", "multi_modal_projector"]
    assert group_labels(groups) == ["layer 2", "layer 10", "embeddings", "projector"]


def test_figures_need_matplotlib(monkeypatch):
    import sys

    from hf_aegis.reports.style import figure_style

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf-aegis\[demo\]"), figure_style():
        pass
