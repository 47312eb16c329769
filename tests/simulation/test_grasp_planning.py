import numpy as np
import pytest

from hf_aegis.simulation.grasp_planning import (
    COMFORTABLE_CLEARANCE,
    HAND_HALF_LENGTH,
    HAND_HALF_WIDTH,
    PickAndPlace,
    finger_axis,
    hand_clearance,
    most_comfortable,
    plan_into_basket,
    plan_onto_plate,
)


def box(centre, size):
    centre, half = np.array(centre, dtype=float), np.array(size, dtype=float) / 2
    return centre - half, centre + half


BASKET = box([0.0, 0.26, 0.07], [0.157, 0.17, 0.141])
PLATE = box([0.05, 0.2, 0.9095], [0.137, 0.137, 0.019])
BOWL = box([-0.06, 0.2, 0.9255], [0.107, 0.107, 0.051])


def test_clearance_of_an_unturned_hand_is_the_gap_along_x():
    obstacle = box([0.1, 0.0, 0.05], [0.04, 0.04, 0.1])
    expected = 0.1 - 0.02 - HAND_HALF_WIDTH
    assert hand_clearance(np.array([0.0, 0.0, 0.01]), 0.0, [obstacle]) == pytest.approx(expected)


def test_clearance_of_a_hand_turned_by_a_right_angle_uses_its_length():
    obstacle = box([0.2, 0.0, 0.05], [0.04, 0.04, 0.1])
    expected = 0.2 - 0.02 - HAND_HALF_LENGTH
    assert hand_clearance(np.array([0.0, 0.0, 0.01]), np.pi / 2, [obstacle]) == pytest.approx(expected)


@pytest.mark.parametrize("yaw", np.linspace(-1.5, 1.5, 7))
def test_clearance_sign_agrees_with_points_of_the_two_rectangles(yaw):
    generator = np.random.default_rng(0)
    along = finger_axis(yaw)[:2]
    across = np.array([along[1], -along[0]])
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41)), axis=-1).reshape(-1, 2)
    hand = grid[:, :1] * HAND_HALF_LENGTH * along + grid[:, 1:] * HAND_HALF_WIDTH * across
    for _ in range(40):
        low, high = box([*generator.uniform(-0.2, 0.2, 2), 0.1], [*generator.uniform(0.05, 0.1, 2), 0.2])
        overlap = np.any(np.all((hand > low[:2]) & (hand < high[:2]), axis=1))
        clearance = hand_clearance(np.zeros(3), yaw, [(low, high)])
        if overlap:
            assert clearance < 0
        elif clearance < 0:
            # The grid of points is coarse: only a sliver may have escaped it.
            assert clearance > -0.012


def test_low_things_are_no_obstacles():
    assert hand_clearance(np.zeros(3), 0.0, [box([0.0, 0.0, 0.01], [0.1, 0.1, 0.02])]) == np.inf


def test_a_hand_evades_a_can_beside_a_flat_box():
    cheese = box([0.055, -0.103, 0.009], [0.081, 0.043, 0.018])
    can = box([0.1, -0.2, 0.038], [0.063, 0.062, 0.076])
    straight = np.array([0.055, -0.103, 0.012])
    assert hand_clearance(straight, 0.0, [can]) < 0
    motion = plan_into_basket(cheese, BASKET, [can, BASKET])
    assert hand_clearance(motion.grasp, motion.yaw, [can, BASKET]) >= COMFORTABLE_CLEARANCE
    # Still on the box, and the fingers still close across its narrow side.
    assert np.all(motion.grasp[:2] > cheese[0][:2])
    assert np.all(motion.grasp[:2] < cheese[1][:2])
    assert abs(motion.yaw) < np.radians(30)


def test_where_no_candidate_has_room_the_roomiest_is_taken():
    wall = box([0.05, 0.0, 0.1], [0.02, 1.0, 0.2])
    candidates = [(np.array([x, 0.0, 0.0]), 0.0) for x in (0.03, 0.0, 0.01)]
    grasp, _ = most_comfortable(candidates, [wall])
    assert grasp[0] == 0.0


def test_a_bowl_is_taken_at_its_rim_and_its_middle_lands_on_the_plates_middle():
    motion = plan_onto_plate(BOWL, PLATE, [])
    bowl_middle, plate_middle = (BOWL[0] + BOWL[1]) / 2, (PLATE[0] + PLATE[1]) / 2
    offset = motion.grasp[:2] - bowl_middle[:2]
    assert np.linalg.norm(offset) == pytest.approx(0.048, abs=1e-6)
    # Fingers close across the rim: along the radius.
    assert abs(offset @ finger_axis(motion.yaw)[:2]) == pytest.approx(0.048, abs=1e-6)
    assert motion.release[:2] - offset == pytest.approx(plate_middle[:2])
    hanging = motion.grasp[2] - BOWL[0][2]
    assert 0.0 < motion.release[2] - hanging - PLATE[1][2] < 0.02
    assert motion.carry_height > motion.release[2]


def test_a_bowl_in_a_drawer_is_lifted_straight_up_and_higher():
    drawer = box([-0.06, 0.2, 0.95], [0.3, 0.3, 0.2])
    free, enclosed = plan_onto_plate(BOWL, PLATE, []), plan_onto_plate(BOWL, PLATE, [drawer])
    assert enclosed.carry_height > free.carry_height + 0.05
    assert enclosed.lift_tolerance < free.lift_tolerance


@pytest.mark.parametrize("height", [0.018, 0.076, 0.146])
def test_what_hangs_from_the_hand_passes_over_the_basket_and_is_let_go_inside(height):
    item = box([0.05, -0.1, height / 2], [0.05, 0.05, height])
    motion = plan_into_basket(item, BASKET, [])
    hanging = motion.grasp[2] - item[0][2]
    assert motion.carry_height - hanging > BASKET[1][2]
    assert BASKET[0][2] < motion.release[2] - hanging < BASKET[1][2]
    assert np.all(motion.release[:2] > BASKET[0][:2])
    assert np.all(motion.release[:2] < BASKET[1][:2])
    # Fingertips stay above the floor.
    assert motion.grasp[2] >= item[0][2] + 0.009


def test_variations_keep_the_grasp_and_depend_on_the_generator_alone():
    motion = plan_onto_plate(BOWL, PLATE, [])
    first, again, other = (motion.varied(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert isinstance(first, PickAndPlace)
    assert np.array_equal(first.grasp, motion.grasp)
    assert np.array_equal(first.release, again.release)
    assert not np.array_equal(first.release, other.release)
    assert np.abs(first.release - motion.release).max() <= 0.008
