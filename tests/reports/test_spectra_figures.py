import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from hf_aegis.reports.spectra_figures import mean_concentration, mean_spectra, plot_concentration, plot_spectra


def spectra(**matrices):
    """One layer, with the same values for both losses unless a pair is given."""
    pairs = {name: values if isinstance(values, tuple) else (values, values) for name, values in matrices.items()}
    layer = {name: {"cross_entropy": pair[0], "flow": pair[1]} for name, pair in pairs.items()}
    return {"samples": 4, "layers": [{"name": "layers.0", "matrices": layer}]}


def test_matrices_of_any_size_and_scale_are_averaged_geometrically():
    # Both straight lines in the logarithm: from 1 to 1e-2 and from 1 to 1e-4, so 1e-3 at the end.
    short = (7 * np.logspace(0, -2, 5)).tolist()
    long = (1e-6 * np.logspace(0, -4, 33)).tolist()
    found = mean_spectra([spectra(q=short), spectra(q=long)], "flow")
    np.testing.assert_allclose(found[0], np.logspace(0, -3, 101), rtol=1e-9)
    np.testing.assert_allclose(mean_spectra([spectra(q=short, k=long)], "flow"), found)


def test_rounding_is_drawn_at_the_floor():
    assert mean_spectra([spectra(q=[1.0, 0.0])], "flow")[0, -1] == pytest.approx(1e-7)


def test_concentration_of_one_direction_and_of_a_twentieth():
    flat = [1.0] * 40
    assert mean_concentration([spectra(q=flat)], "flow")[0] == pytest.approx(1 / 40)
    assert mean_concentration([spectra(q=flat)], "flow", 0.05)[0] == pytest.approx(2 / 40)
    assert mean_concentration([spectra(q=flat, k=[3.0, 0.0])], "flow")[0] == pytest.approx((1 / 40 + 1) / 2)


def test_concentration_scatters_over_runs():
    # Each with one matrix of two directions: shares of the first are 1/2, 9/10 and, of a run without gradient, none.
    runs = [spectra(q=[1.0, 1.0]), spectra(q=[3.0, 1.0]), spectra(q=([1.0, 1.0], [0.0, 0.0]))]
    mean, deviation = mean_concentration(runs, "flow")
    assert (mean.item(), deviation.item()) == (pytest.approx(0.7), pytest.approx(0.2 * math.sqrt(2)))
    assert np.isnan(mean_concentration(runs[:1], "flow")[1]).all()


def test_runs_are_a_band_around_the_spectra_and_bars_at_the_ratios(tmp_path, monkeypatch):
    drawn = []
    fill, bars = Axes.fill_between, Axes.errorbar
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, *y, **k: drawn.append(y) or fill(self, x, *y, **k))
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, *a, yerr=None, **k: drawn.append(yerr) or bars(self, *a, yerr=yerr, **k)
    )
    runs = [spectra(q=[1.0, low]) for low in (0.1, 0.01, 0.5)]
    plot_spectra(runs, tmp_path / "spectra.png")
    low, high = drawn[0]
    assert (low[-1], high[-1]) == (pytest.approx(0.01), pytest.approx(0.5))
    drawn.clear()
    plot_concentration(runs, tmp_path / "concentration.png")
    assert [bar.item() for bar in drawn[:1]] == [pytest.approx(100 * mean_concentration(runs, "flow")[1].item())]
    drawn.clear()
    plot_concentration(runs[:1], tmp_path / "concentration.png")
    assert drawn == [None] * 4


def test_layers_that_a_loss_does_not_reach_are_left_out(tmp_path):
    stopped = [spectra(q=([2.0, 1.0], [0.0, 0.0]), k=([1.0], [0.0]))]
    assert np.isnan(mean_spectra(stopped, "flow")).all()
    assert np.isnan(mean_concentration(stopped, "flow")).all()
    assert mean_concentration(stopped, "cross_entropy")[0] == pytest.approx((0.8 + 1) / 2)
    for plot in (plot_spectra, plot_concentration):
        plot(stopped, tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as image:
            assert image.format == "PNG"
