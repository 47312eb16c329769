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


def test_bars_on_a_logarithmic_axis_stay_above_zero(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    conditions = {
        "naive": condition(loss=(1.0, 0.5), kept=(4.0, 6.0)),
        "mine": condition(loss=(2.0, 0.5), kept=(2.0, 1.0)),
    }
    kept = Measure("kept", "kept (nats)", logarithmic=True)
    for before, floor in ((None, 2.0), ({"kept": 0.25}, 0.25), ({"kept": 0.0}, 2.0)):
        plot_trade_off(conditions, ["naive", "mine"], before, tmp_path / "figure.png", LOSS, kept)
        (axis,) = figures.pop().axes
        assert (axis.get_xscale(), axis.get_yscale()) == ("linear", "log")
        ends = [container.lines[2][1].get_segments()[0][:, 1].tolist() for container in axis.containers]
        assert ends == [[floor, 10.0], [1.0, 3.0]]
