import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hf_aegis.reports import training_curves
from hf_aegis.reports.style import CONDITION_STYLES


@pytest.fixture
def lines(monkeypatch):
    """What is drawn as lines: label, colour, steps and values of each."""
    drawn = []
    plot = Axes.plot

    def noting(self, *arguments, **style):
        drawn.append((style.get("label"), style.get("color"), np.asarray(arguments[0]), np.asarray(arguments[1])))
        return plot(self, *arguments, **style)

    monkeypatch.setattr(Axes, "plot", noting)
    return drawn


def test_flow_is_the_logged_mse_or_else_the_unscaled_loss(tmp_path, lines):
    # A loss with a penalty in it, and the MSE alone; and a run that logged its loss only.
    runs = {
        "naive": [{"step": 1, "loss": 8.0}, {"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 6.0}],
        "aegis": [{"step": 1, "loss": 8.0, "flow_mse": 0.1}, {"step": 2, "eval_loss": 5.0, "eval_flow_mse": 0.2}],
    }
    training_curves.plot_flow(runs, 2.0, tmp_path / "flow.png")
    by_label = {}
    for label, _, steps, values in lines:
        if label is not None:
            by_label.setdefault(label, []).append((steps.tolist(), values.tolist()))
    assert by_label["naive"] == [([1, 2], [4.0, 2.0]), ([2], [3.0])]
    assert by_label["AEGIS"] == [([1], [0.1]), ([2], [0.2])]


def test_a_line_is_the_mean_over_seeds_and_its_band_their_spread(tmp_path, lines, monkeypatch):
    bands = []
    fill = Axes.fill_between

    def noting(self, steps, low, high, **style):
        bands.append((low, high))
        return fill(self, steps, low, high, **style)

    monkeypatch.setattr(Axes, "fill_between", noting)
    runs = {"naive": [[{"step": step, "vqa_accuracy": value} for step in (0, 9)] for value in (0.2, 0.5, 0.8)]}
    training_curves.plot_vqa_over_seeds(runs, tmp_path / "vqa.png")
    (drawn,) = [values for label, _, _, values in lines if label == "naive" and len(values)]
    np.testing.assert_allclose(drawn, [50, 50])
    low, high = bands[-1]
    np.testing.assert_allclose(low, [20, 20])
    np.testing.assert_allclose(high, [80, 80])


def test_many_conditions_are_shown_beside_the_references(tmp_path, lines):
    names = ("naive", "aegis", "ewc", "l2sp", "a_gem", "pcgrad", "graddrop")
    runs = {name: [[{"step": 0, "vqa_cross_entropy": 0.1}, {"step": 5, "vqa_cross_entropy": 0.2}]] for name in names}
    training_curves.plot_vqa_over_seeds(runs, tmp_path / "vqa.png")
    labels = [label for label, _, _, values in lines if len(values)]
    # Panels: the references alone, penalties, replay.
    assert labels.count("naive") == 1
    assert labels.count("naive (again)") == 2
    assert {CONDITION_STYLES[name]["label"] for name in names} <= set(labels)


def test_the_conflict_map_averages_over_seeds_and_backward_passes():
    one = [
        {"step": 1, "groups": ["layers.0", "embeddings"], "cosine": [0.4, 0.1]},
        {"step": 1, "groups": ["layers.0"], "cosine": [0.2]},
        {"step": 3, "groups": ["layers.0"], "cosine": [None]},
    ]
    other = [{"step": 1, "groups": ["layers.0"], "cosine": [-0.6]}]
    groups, cosines = training_curves.conflict_map([one, other])
    assert groups == ["layers.0", "embeddings"]
    np.testing.assert_allclose(cosines, [[0, np.nan, np.nan], [0.1, np.nan, np.nan]], atol=1e-12)


def test_a_replayed_reference_shows_its_own_loss(tmp_path, lines):
    projection = [{"step": 1, "groups": ["layers.0"], "cosine": [0.4]}]
    metrics = [{"step": 1, "throttle_rate": 0.5, "replay_loss": 0.125}]
    training_curves.plot_projection_over_seeds([metrics], [projection], tmp_path / "p.png", "a_gem")
    assert [0.125] in [values.tolist() for *_, values in lines]


@pytest.fixture
def axes(monkeypatch):
    """The axes of figures as they are written."""
    written = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *a, **k: written.extend(a for a in self.axes if a.axison) or save(self, *a, **k),
    )
    return written


def test_what_no_run_logged_has_no_column(tmp_path, axes):
    one = [{"step": 0, "vqa_cross_entropy": 0.1, "vqa_accuracy": None}, {"step": 5, "vqa_cross_entropy": 0.2}]
    training_curves.plot_vqa_over_seeds({"naive": [one]}, tmp_path / "vqa.png")
    assert [axis.get_ylabel() for axis in axes] == ["VQA cross-entropy\n(nats per token)"]
    axes.clear()
    # The panel of the penalties has no accuracy, the others have.
    both = [{**record, "vqa_accuracy": 0.5} for record in one]
    runs = {name: [both] for name in ("naive", "aegis", "lora", "a_gem", "pcgrad", "graddrop")} | {"ewc": [one]}
    runs["naive"] = runs["aegis"] = [one]
    training_curves.plot_vqa_over_seeds(runs, tmp_path / "vqa.png")
    assert [axis.get_title(loc="left") for axis in axes] == [
        *("the paper's conditions", ""),
        "penalties",
        *("replayed VQA data", ""),
    ]
    assert all(np.isfinite(line.get_ydata()).any() for axis in axes for line in axis.lines)


@pytest.mark.parametrize(("end", "scale"), [(0.2, "linear"), (20.0, "log")])
def test_conditions_that_differ_widely_are_on_a_logarithmic_scale(tmp_path, axes, end, scale):
    runs = {
        name: [[{"step": 0, "vqa_cross_entropy": 0.1}, {"step": 5, "vqa_cross_entropy": value}]]
        for name, value in (("naive", end), ("aegis", 0.1))
    }
    training_curves.plot_vqa_over_seeds(runs, tmp_path / "vqa.png")
    assert [axis.get_yscale() for axis in axes] == [scale]
    low, high = axes[0].get_ylim()
    assert low < 0.1
    assert high > end


def test_a_projection_shows_what_was_logged_and_missing_cosines_in_grey(tmp_path, axes):
    projection = [{"step": 1, "groups": ["layers.0"], "cosine": [0.0]}, {"step": 2, "groups": [], "cosine": []}]
    metrics = [{"step": 1, "throttle_rate": 0.5, "cosine": None}]
    training_curves.plot_projection_over_seeds([metrics], [projection], tmp_path / "p.png")
    rates, cells, bar = axes
    assert rates.get_ylabel() == "groups in\nconflict (%)"
    assert cells.images[0].get_array().mask.tolist() == [[False, True]]
    assert "grey" in bar.get_xlabel()
    with Image.open(tmp_path / "p.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    # What is missing is drawn unlike what is zero.
    assert (178, 178, 178) in colours
    assert (246, 246, 247) in colours
