import pytest
from matplotlib.figure import Figure

from hf_aegis.reports.trade_off import FLOW_MSE, Measure, plot_trade_off, plottable


LOSS = Measure("loss", "loss (nats)")
KEPT = Measure("kept", "kept (%)", 100.0)


def condition(**means):
    return {"runs": 2, "measures": {key: {"mean": mean, "std": std, "n": 2} for key, (mean, std) in means.items()}}


CONDITIONS = {
    "naive": condition(loss=(2.0, 0.5), kept=(0.25, None), flow_mse=(0.3, None)),
    "mine": condition(loss=(3.0, 0.0), kept=(0.75, 0.125)),
    "other": condition(loss=(3.0, 0.0)),
}


def test_conditions_without_a_measure_cannot_be_drawn():
    assert plottable(CONDITIONS, LOSS, KEPT) == ["naive", "mine"]
    assert plottable(CONDITIONS, FLOW_MSE, KEPT) == ["naive"]
    assert plottable(CONDITIONS) == []
    nothing = {"naive": condition(loss=(2.0, 0.5), kept=(0.0, None))}
    assert plottable(nothing, LOSS, KEPT) == ["naive"]
    assert plottable(nothing, LOSS, KEPT._replace(logarithmic=True)) == []


@pytest.mark.parametrize("before", [{"kept": 0.5, "loss": 9.0}, {"loss": 9.0}, None])
def test_any_two_measures_can_be_drawn_in_units_of_their_own(monkeypatch, tmp_path, before):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    plot_trade_off(CONDITIONS, ["naive", "mine"], before, tmp_path / "figure.png", LOSS, KEPT)
    (axis,) = figures[0].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("loss (nats)", "kept (%)")
    assert [container.lines[0].get_xydata().tolist() for container in axis.containers] == [[[2, 25]], [[3, 75]]]
    spread = [bars.get_segments()[0].tolist() for container in axis.containers for bars in container.lines[2]]
    assert spread == [[[1.5, 25], [2.5, 25]], [[3, 62.5], [3, 87.5]]]
    levels = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"]
    assert levels == ([50] if before and "kept" in before else [])


@pytest.mark.parametrize("axis", ["task", "retention"])
def test_bars_on_a_logarithmic_axis_are_as_long_to_both_sides(monkeypatch, tmp_path, axis):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    conditions = {
        "naive": condition(loss=(1.0, None), kept=(4.0, 12.0)),
        "mine": condition(loss=(2.0, None), kept=(2.0, 2.0)),
    }
    kept = Measure("kept", "kept (nats)", logarithmic=True)
    measures = {"task": LOSS, "retention": LOSS, axis: kept}
    plot_trade_off(conditions, ["naive", "mine"], {"kept": 0.0}, tmp_path / "figure.png", **measures)
    (drawn,) = figures[0].axes
    scales = {"task": drawn.get_xscale(), "retention": drawn.get_yscale()}
    assert scales == {"task": "linear", "retention": "linear", axis: "log"}
    side = ("task", "retention").index(axis)
    ends = [container.lines[2][0].get_segments()[0][:, side].tolist() for container in drawn.containers]
    assert ends == [[1.0, 16.0], [1.0, 4.0]]
    # A level of zero has no place on the axis.
    assert not [line for line in drawn.lines if line.get_linestyle() == ":"]
