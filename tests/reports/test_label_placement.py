import numpy as np
import pytest

from hf_aegis.reports.label_placement import overlap, place_labels


FRAME = (0, 0, 900, 500)


def inside(box):
    return (box[:2] >= FRAME[:2]).all() and (box[2:] <= FRAME[2:]).all()


def test_overlap_is_the_area_that_is_shared():
    boxes = np.asarray([[0.0, 0, 4, 4], [5, 5, 6, 6]])
    others = np.asarray([[2.0, 1, 10, 3], [4, 0, 8, 4], [0, 0, 9, 9]])
    assert overlap(boxes, others).tolist() == [[4, 0, 16], [0, 0, 1]]


@pytest.mark.parametrize("spread", [0, 6, 20, 60])
def test_labels_of_a_crowd_overlap_neither_each_other_nor_markers(spread):
    points = {f"p{i}": (450 + spread * (i % 4 - 1.5), 250 + spread * (i // 4 - 1.5)) for i in range(12)}
    placed = place_labels(points, dict.fromkeys(points, (110, 18)), [], FRAME)
    assert placed.keys() == points.keys()
    boxes = np.stack([place.box for place in placed.values()])
    assert (overlap(boxes, boxes) - np.diag([110 * 18] * 12)).max() < 1e-6
    assert all(inside(box) for box in boxes)
    at = np.asarray([[x - 4, y - 4, x + 4, y + 4] for x, y in points.values()])
    assert overlap(boxes, at).max() == 0


def test_a_lonely_label_is_right_beside_its_point():
    box, leads = place_labels({"a": (400, 200)}, {"a": (60, 18)}, [], FRAME)["a"]
    assert not leads
    np.testing.assert_allclose(box, [410, 191, 470, 209])


def test_a_label_that_was_sent_away_has_a_line():
    around = (300, 150, 500, 250)
    box, leads = place_labels({"a": (400, 200)}, {"a": (60, 18)}, [around], FRAME)["a"]
    assert leads
    assert overlap(box[None], np.asarray([around])).item() < 60 * 18 / 2


@pytest.mark.parametrize("corner", [(899, 499), (1, 1), (899, 1), (1, 499)])
def test_labels_at_the_edge_turn_inwards(corner):
    assert inside(place_labels({"a": corner}, {"a": (100, 18)}, [], FRAME)["a"].box)


def test_an_error_bar_is_avoided_where_there_is_room():
    bar = (300, 195, 600, 205)
    box, _ = place_labels({"a": (400, 200)}, {"a": (60, 18)}, [bar], FRAME)["a"]
    assert overlap(box[None], np.asarray([bar])).item() == 0
