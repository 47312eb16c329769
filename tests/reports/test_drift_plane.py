import numpy as np
import pytest

from hf_aegis.reports.drift_plane import drift_plane, plot_drift


def along(*components):
    return np.asarray([*components, *[0.0] * (6 - len(components))])


@pytest.fixture
def base():
    return np.random.default_rng(0).normal(size=(50, 6))


def test_the_plane_holds_both_mean_displacements(base):
    random = np.random.default_rng(1)
    naive = base + along(3) + random.normal(0, 0.1, base.shape)
    aegis = base + along(1, 1) + random.normal(0, 0.1, base.shape)
    plane = drift_plane(base, naive, aegis)
    centroids = {name: points.mean(0) for name, points in plane.points.items()}
    np.testing.assert_allclose(centroids["pretrained"], 0, atol=1e-12)
    for name, states in (("naive", naive), ("aegis", aegis)):
        length = np.linalg.norm((states - base).mean(0))
        assert plane.drifts[name] == pytest.approx(length)
        assert np.linalg.norm(centroids[name]) == pytest.approx(length)
    assert centroids["naive"][1] == pytest.approx(0, abs=1e-12)
    # The angle between both drifts is kept: 45 degrees but for noise.
    assert centroids["aegis"][0] / np.linalg.norm(centroids["aegis"]) == pytest.approx(np.sqrt(0.5), abs=0.05)
    assert plane.second_axis == "aegis"
    # 9 + 1 and 1 of 11, but for the noise in six dimensions.
    np.testing.assert_allclose(plane.shares, (10 / 11, 1 / 11), atol=0.02)
    assert sum(plane.shares) < 1


def test_parallel_drifts_get_the_leading_residual_as_second_axis(base):
    wave = np.sin(np.arange(len(base)))[:, None] * along(0, 0, 0, 1)
    naive = base + along(2) + wave - wave.mean(0)
    aegis = base + along(0.5)
    plane = drift_plane(base, naive, aegis)
    assert plane.second_axis == "residual"
    moved = plane.points["naive"] - plane.points["pretrained"]
    np.testing.assert_allclose(np.abs(moved[:, 1]), np.abs((wave - wave.mean(0))[:, 3]), atol=1e-9)
    assert sum(plane.shares) == pytest.approx(1)


def test_one_model_that_did_not_move_still_has_a_plane(base):
    naive = base + along(0, 1) + np.random.default_rng(2).normal(0, 0.1, base.shape)
    for pair, moved in (((naive, base), "naive"), ((base, naive), "aegis")):
        plane = drift_plane(base, *pair)
        assert all(np.isfinite(points).all() for points in plane.points.values())
        assert plane.shares[0] > 0.9
        assert (plane.first_axis, plane.second_axis) == (moved, "residual")


@pytest.mark.parametrize("axis", range(6))
def test_a_drift_without_any_residual_still_has_a_plane(base, axis):
    # All samples move alike and along one direction, whichever it is.
    moved = base + 2 * np.eye(6)[axis]
    plane = drift_plane(base, moved, base)
    np.testing.assert_allclose(plane.points["naive"] - plane.points["pretrained"], [[2, 0]] * len(base), atol=1e-9)
    assert plane.shares == (pytest.approx(1), pytest.approx(0))


def test_a_small_drift_of_its_own_is_a_direction(base):
    # Short beside naive's, but all of AEGIS's.
    plane = drift_plane(base, base + along(1000), base + along(0, 1))
    assert plane.second_axis == "aegis"


def test_axes_say_what_they_are(base, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    labels = []
    for name in ("set_xlabel", "set_ylabel"):
        set_label = getattr(Axes, name)
        monkeypatch.setattr(
            Axes, name, lambda self, text, set_label=set_label, **k: labels.append(text) or set_label(self, text, **k)
        )
    planes = {0: drift_plane(base, base + along(3), base + along(0, 4)), 1: drift_plane(base, base, base + along(3))}
    plot_drift(planes, tmp_path / "drift.png")
    assert labels == [
        "naive's drift (36 %)",
        "AEGIS's drift,\northogonal to naive's (64 %)",
        "AEGIS's drift (100 %)",
        "principal residual (0 %)",
    ]


def test_no_drift_and_other_samples_are_refused(base):
    with pytest.raises(ValueError, match="neither model have moved"):
        drift_plane(base, base, base)
    with pytest.raises(ValueError, match=r"one shape, found \(50, 6\), \(49, 6\)"):
        drift_plane(base, base[1:], base)
