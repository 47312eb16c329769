"""How routing and spectra of experts are summed up for their figures."""

import math

import numpy as np
import pytest

from hf_aegis.reports.expert_figures import layer_group, plot_expert_spectra, plot_routing, summed_routing


EVEN = {"load": [0.5] * 4, "probability": [0.25] * 4, "entropy": math.log(4)}
ONE_SIDED = {"load": [1.0, 1.0, 0.0, 0.0], "probability": [0.5, 0.5, 0.0, 0.0], "entropy": math.log(2)}


def line(step, **layers):
    names = {"first": "model.layers.0.q_proj", "second": "model.layers.0.up_proj", "upper": "model.layers.1.q_proj"}
    return {"step": step, "layers": {names[name]: figures for name, figures in layers.items()}}


def test_linear_layers_belong_to_decoder_layers():
    assert layer_group("model.language_model.layers.12.self_attn.q_proj") == "layers.12"
    assert layer_group("model.vision_tower.encoder.layers.3.mlp.fc1") == "vision layers.3"
    assert layer_group("model.multi_modal_projector.linear") == "model.multi_modal_projector.linear"


def test_routing_is_averaged_over_linears_and_runs():
    one = [line(10, first=EVEN, second=ONE_SIDED, upper=EVEN), line(20, first=EVEN, second=EVEN, upper=EVEN)]
    # Another run, stopped earlier.
    other = [line(10, first=ONE_SIDED, second=ONE_SIDED, upper=EVEN)]
    routing = summed_routing([one, other])
    assert routing.steps.tolist() == [10]
    assert routing.groups == ["layers.0", "layers.1"]
    # Three of four are one-sided: half of the entropy, twice the load.
    np.testing.assert_allclose(routing.entropy, [[0.625], [1.0]])
    np.testing.assert_allclose(routing.busiest, [[1.75], [1.0]])


def test_one_expert_is_always_even():
    alone = {"load": [1.0], "probability": [1.0], "entropy": 0.0}
    routing = summed_routing([[line(1, first=alone)]])
    assert routing.entropy.tolist() == [[1.0]] and routing.busiest.tolist() == [[1.0]]


def test_runs_without_a_common_step_are_refused():
    with pytest.raises(ValueError, match="no step in common"):
        summed_routing([[line(1, first=EVEN)], [line(2, first=EVEN)]])


def test_the_difference_is_relative_to_the_experts_before(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **k: drawn.append(list(y)) or errorbar(self, x, y, **k))
    entries = [
        {"name": "model.layers.0.q_proj", "before": [3.0, 0.0], "after": [3.0, 1.0], "update": [1.0, 0.0]},
        {"name": "model.layers.0.k_proj", "before": [4.0, 0.0], "after": [4.0, 1.0], "update": [2.0, 2.0]},
        {"name": "model.layers.1.q_proj", "before": [1.0], "after": [1.0], "update": [0.0]},
    ]
    plot_expert_spectra([{"layers": entries}], tmp_path / "spectra.png")
    assert drawn == [pytest.approx([60.0, 0.0])]
    plot_routing([[line(1, first=EVEN, upper=ONE_SIDED)]], tmp_path / "routing.png", "vla_gse")
    assert (tmp_path / "routing.png").stat().st_size > 1000
