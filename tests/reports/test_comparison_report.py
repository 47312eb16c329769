"""The whole report of small comparisons: what is drawn, what is left out and said to be, and what the page holds."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image

from hf_aegis.cli import main
from hf_aegis.reports.comparison_report import write_report


FEW = {
    "naive": (1.4, 0.61, 0.332),
    "aegis": (0.84, 0.71, 0.328),
    "a_gem": (0.1, 0.95, 0.333),
    "vla_gse": (0.1, 0.95, 0.34),
    "mine<b>": (0.2, 0.9, 0.34),
}
EVERYTHING = [
    "trade_off",
    "cross_entropy",
    "cost",
    "vqa",
    "flow",
    "gradient_spectra",
    "gradient_concentration",
    "drift",
    "projection_aegis",
    "projection_a_gem",
    "neuron_cosines",
    "experts_vla_gse",
    "expert_spectra_vla_gse",
]


class Page(HTMLParser):
    """The page's text, its images and links, after every tag is checked to be closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.targets, self.ids, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes["src"])
            assert attributes["alt"]
        self.targets += [attributes[name] for name in ("href", "src") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def without_data(axis):
    """Whether an axis is shown on which there is nothing finite."""
    place = axis.get_position().bounds
    twin = any(other is not axis and other.get_position().bounds == place for other in axis.figure.axes)
    if not axis.axison or not axis.get_visible() or twin:
        return False
    # Levels across the whole axis are no data of it.
    values = [line.get_ydata() for line in axis.lines if line.get_transform() == axis.transData]
    values += [image.get_array() for image in (*axis.images, *axis.collections)]
    values += [collection.get_offsets() for collection in axis.collections]
    values += [patch.get_data().values for patch in axis.patches if isinstance(patch, StepPatch)]
    filled = (np.ma.filled(np.ma.asarray(found, dtype=float), np.nan) for found in values if found is not None)
    return not any(np.isfinite(found).any() for found in filled)


@pytest.fixture(scope="module")
def empty_axes():
    """Figure and label of the axes without data among all that are written."""
    found = []
    save = Figure.savefig

    def noting(self, path, **settings):
        save(self, path, **settings)
        found.extend((path.name, axis.get_ylabel()) for axis in self.axes if without_data(axis))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", noting)
        yield found


def drawn(folder):
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("L"))
        # As wide as it is shown, or a little more.
        assert 800 <= pixels.shape[1] <= 1300
        assert 0.005 < (pixels < 200).mean() < 0.6, path
    return sorted(path.stem for path in (folder / "figures").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_comparison, empty_axes):
    folder = write_comparison(tmp_path_factory.mktemp("whole"), FEW, layers=2)
    # As in the shipped recipes, which measure it at the end.
    for path in folder.glob("runs/*/*/metrics.jsonl"):
        path.write_text(re.sub(r', "vqa_accuracy": [^,}]*', "", path.read_text()))
    assert write_report(folder) == folder / "report.html"
    return folder


def test_all_figures_are_drawn(whole):
    assert drawn(whole) == sorted(EVERYTHING)


def test_no_axis_is_empty_or_explained(whole, empty_axes):
    assert empty_axes == []
    text = Page((whole / "report.html").read_text()).text
    assert "Shown: cross-entropy of the correct answers" in text
    assert "accuracy of the generated answers" not in text
    # Of the flow's figure, which has both.
    assert "Left: on the batches that are trained on" in text


def test_the_page_is_whole_and_loads_nothing(whole):
    text = (whole / "report.html").read_text()
    page = Page(text)
    assert len(page.images) == len(EVERYTHING)
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    inside = [target for target in page.targets if not target.startswith("data:")]
    assert inside
    assert all(target.startswith("#") and target[1:] in page.ids for target in inside)
    assert not re.search(r"https?://|@import|<script|<link|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert "prefers-color-scheme: dark" in text


def test_names_are_escaped(whole):
    text = (whole / "report.html").read_text()
    assert "mine<b>" not in text
    assert "mine&lt;b&gt;" in text


def test_the_page_tells_what_was_run_and_measured(whole):
    page = Page((whole / "report.html").read_text())
    assert "15 finished training runs of 5 conditions" in page.text
    assert "Seeds: 0, 1, 2." in page.text
    assert "Model: embedded." in page.text
    assert "answers 99.7 % of the final questions" in page.text
    assert "hf-aegis compare --config comparison.yaml" in page.text
    assert "VQA accuracy (%)" in page.text
    results = [
        json.loads((whole / "runs/naive" / f"seed_{seed}" / "result.json").read_text())["vqa_accuracy"] * 100
        for seed in range(3)
    ]
    assert f"{np.mean(results):.1f} ± {np.std(results, ddof=1):.1f}" in page.text
    for kind in ("color (%)", "shape (%)", "yes/no (%)"):
        assert kind in page.text
    assert "AEGIS on PaliGemma2-3B, as reported (arXiv 2604.16067)" in page.text
    assert "2.15" in page.text
    assert "What is missing" not in page.text


def test_what_was_not_logged_is_left_out_and_said_so(tmp_path, write_comparison):
    outcomes = {name: FEW[name] for name in ("naive", "aegis")}
    folder = write_comparison(
        tmp_path, outcomes, seeds=(0, 1), layers=2, analyses=False, unfinished=[("naive", 1), ("aegis", 0)]
    )
    (folder / "pretrained.json").unlink()
    (folder / "runs/aegis/seed_1/projection.jsonl").unlink()
    (folder / "failures.json").write_text(
        json.dumps([{"condition": "aegis", "seed": 0, "error": "ran <out> of memory"}])
    )
    (folder / "figures").mkdir()
    # Of an earlier report, whose data are gone.
    (folder / "figures/drift.png").write_bytes(b"stale")
    write_report(folder)
    assert drawn(folder) == ["cost", "cross_entropy", "flow", "trade_off", "vqa"]
    page = Page((folder / "report.html").read_text())
    missing = page.text[page.text.index("What is missing") :]
    for sentence in (
        "no finished run has analysis/gradient_spectra.json",
        "no seed has analysis/hidden_states.safetensors of both naive and AEGIS",
        "no finished run of aegis has a projection.jsonl",
        "no finished run has a neuron_cosines.json",
    ):
        assert sentence in missing
    assert "Not finished, and left out everywhere: naive, seed 1; aegis, seed 0." in page.text
    assert "Failed: aegis, seed 0: ran <out> of memory" in page.text
    assert "One seed: how far runs scatter is unknown." in page.text
    assert "Diagnostics of the projection" not in page.text
    assert "before fine-tuning" not in page.text.split("Retention")[0]


def test_different_data_are_pointed_out(tmp_path, write_comparison):
    folder = write_comparison(tmp_path, {"naive": FEW["naive"]}, seeds=(0, 1), layers=1, analyses=False)
    path = folder / "runs/naive/seed_1/result.json"
    result = json.loads(path.read_text())
    result["fingerprints"]["held_out"] = "other"
    result["versions"]["torch"] = "2.16"
    path.write_text(json.dumps(result))
    write_report(folder)
    text = Page((folder / "report.html").read_text()).text
    assert "Careful: the runs do not share their held-out demonstrations (2 different fingerprints)" in text
    assert "Packages changed between runs" in text


def test_folders_without_a_comparison_are_refused(tmp_path, write_comparison, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no compare.json" in capsys.readouterr().err
    folder = write_comparison(tmp_path / "fresh", {"naive": FEW["naive"]}, seeds=(0,), unfinished=[("naive", 0)])
    with pytest.raises(ValueError, match="holds no finished run"):
        write_report(folder)


def test_the_command_says_where_the_page_is(tmp_path, write_comparison, capsys):
    folder = write_comparison(tmp_path, {"naive": FEW["naive"]}, seeds=(0,), layers=1, analyses=False)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_variants_of_aegis_have_figures_of_their_own(tmp_path, write_comparison):
    outcomes = dict.fromkeys(("aegis", "transport_loss", "transport_loss_10", "aegis_eps"), FEW["aegis"])
    folder = write_comparison(tmp_path, {"naive": FEW["naive"], **outcomes}, seeds=(0,), layers=1, analyses=False)
    write_report(folder)
    ablations = [f"{name}_ablations" for name in ("trade_off", "cross_entropy", "cost", "vqa", "flow")]
    assert drawn(folder) == sorted([*ablations, "projection_aegis"])
    # A figure of methods without any would show naive and AEGIS once more.
    text = Page((folder / "report.html").read_text()).text
    assert "Retention against plasticity: variants of AEGIS" in text
    assert "Retention against plasticity:" not in text[text.index("What is missing") :]


def test_types_of_answer_are_told_rather_than_of_question(tmp_path, write_comparison):
    folder = write_comparison(tmp_path, {"naive": FEW["naive"]}, seeds=(0,), layers=1, analyses=False)
    path = folder / "runs/naive/seed_0/result.json"
    result = json.loads(path.read_text()) | {"vqa_accuracy_by_answer_type": {"number": 0.25}, "action_mse": 0.125}
    path.write_text(json.dumps(result))
    write_report(folder)
    text = Page((folder / "report.html").read_text()).text
    assert "number (%)" in text
    assert "shape (%)" not in text
    assert "open-loop action MSE" in text
    assert "mean squared error of sampled action chunks" in text
    assert "FAST head" not in text
    path.write_text(json.dumps(result | {"fast_action_mse": None, "fast_decode_failures": 12}))
    write_report(folder)
    assert "FAST chunks not decodable" in Page((folder / "report.html").read_text()).text
