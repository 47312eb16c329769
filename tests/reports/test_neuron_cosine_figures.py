import numpy as np
import pytest

from hf_aegis.reports.neuron_cosine_figures import plot_neuron_cosines, summed_counts


EDGES = [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_counts_are_summed_over_runs_group_by_group():
    one = {"edges": EDGES, "counts": {"embeddings": [1, 2, 3, 4], "layers.0": [1, 0, 0, 0]}, "steps": [1]}
    other = {"edges": EDGES, "counts": {"layers.0": [0, 5, 0, 0], "layers.1": [0, 0, 0, 2]}, "steps": [1]}
    edges, groups, counts = summed_counts([one, other])
    assert edges.tolist() == EDGES
    assert groups == ["layers.0", "layers.1", "embeddings"]
    assert counts.tolist() == [[1, 5, 0, 0], [0, 0, 0, 2], [1, 2, 3, 4]]


def test_other_bins_are_refused():
    one = {"edges": EDGES, "counts": {"layers.0": [1, 0, 0, 0]}}
    with pytest.raises(ValueError, match="different bins"):
        summed_counts([one, {"edges": [-1.0, 0.0, 1.0], "counts": {"layers.0": [1, 0]}}])


def test_conflict_is_what_lies_below_zero(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles, ticks = [], []
    title, yticks = Axes.set_title, Axes.set_yticks
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **k: titles.append(text) or title(self, text, **k))
    monkeypatch.setattr(
        Axes, "set_yticks", lambda self, at, names=None, **k: ticks.append(names) or yticks(self, at, names, **k)
    )
    edges = [2 * index / 200 - 1 for index in range(201)]
    counts = np.zeros(200, dtype=int)
    # The bin that begins at zero is agreement.
    counts[[99, 100]] = 30, 70
    silent = {"edges": edges, "counts": {"layers.0": counts.tolist(), "layers.1": [0] * 200}, "steps": [1]}
    plot_neuron_cosines([silent], tmp_path / "neurons.png")
    assert titles == ["all neurons: 30.0 % in conflict"]
    assert ["30.0 %", "0.0 %"] in ticks


def test_each_run_has_an_outline_and_a_share(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles, outlines = [], []
    title, stairs = Axes.set_title, Axes.stairs
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **k: titles.append(text) or title(self, text, **k))
    monkeypatch.setattr(
        Axes, "stairs", lambda self, values, *a, **k: outlines.append(values.tolist()) or stairs(self, values, *a, **k)
    )
    runs = [{"edges": EDGES, "counts": {"layers.0": counts}} for counts in ([1, 0, 1, 2], [2, 1, 1, 0], [0, 0, 0, 0])]
    plot_neuron_cosines(runs, tmp_path / "neurons.png")
    assert titles == ["all neurons: 50.0 % (25.0 to 75.0 % by run) in conflict"]
    # Filled and outlined for all, and outlined for the runs that counted.
    together = [37.5, 12.5, 25.0, 25.0]
    assert outlines == [together, [25.0, 0, 25.0, 50.0], [50.0, 25.0, 25.0, 0], together]
