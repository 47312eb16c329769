"""Where to take an object and where to let it go: geometry from bounding boxes, without a simulator."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np


Bounds = tuple[np.ndarray, np.ndarray]
"""Lowest and highest world coordinates, `((3,), (3,))`, m."""

HAND_HALF_LENGTH = 0.105
HAND_HALF_WIDTH = 0.033
HAND_ABOVE_FINGERTIPS = 0.035
"""Panda hand: half extents along and across the fingers' closing axis, and its lower edge above the grasp point, m."""

COMFORTABLE_CLEARANCE = 0.012
FINGER_DEPTH = 0.03
FLOOR_CLEARANCE = 0.012
RIM_DEPTH = 0.025
RIM_INSET = 0.0055
SET_DOWN_MARGIN = 0.012
CARRY_CLEARANCE = 0.035
BOWL_LIFT = 0.075
DRAWER_LIFT = 0.13

ITEM_OFFSETS = (0.0, 0.01, -0.01, 0.02, -0.02)
ITEM_YAWS = tuple(np.radians([0.0, 12.0, -12.0, 24.0, -24.0]))
BOWL_YAWS = tuple(np.radians([0.0, 180.0, 30.0, -30.0, 60.0, -60.0, 150.0, -150.0, 90.0, -90.0, 120.0, -120.0]))


@dataclass(frozen=True)
class PickAndPlace:
    """
    Geometry of one pick-and-place motion; all points are places of the hand, world frame, m.

    Args:
        grasp (`np.ndarray` of shape `(3,)`): Where fingers close.
        release (`np.ndarray` of shape `(3,)`): Where they open.
        carry_height (`float`): Height at which the hand travels.
        yaw (`float`, *optional*, defaults to 0.0): The hand's turn about the vertical, rad; at 0 its fingers close
            along the world's y axis.
        hover_height (`float`, *optional*, defaults to 0.08): Height above the grasp from which the hand descends.
        lift_tolerance (`float`, *optional*, defaults to 0.05):
            The hand begins to travel when it is this close to its carrying height, cutting the corner, m.
    """

    grasp: np.ndarray
    release: np.ndarray
    carry_height: float
    yaw: float = 0.0
    hover_height: float = 0.08
    lift_tolerance: float = 0.05

    def varied(self, generator: np.random.Generator) -> "PickAndPlace":
        """A motion with another hover and carry height and a slightly shifted release."""
        shift = generator.uniform(-0.008, 0.008, size=2)
        return replace(
            self,
            release=self.release + np.array([shift[0], shift[1], 0.0]),
            carry_height=self.carry_height + generator.uniform(0.0, 0.03),
            hover_height=self.hover_height + generator.uniform(-0.015, 0.02),
        )


def finger_axis(yaw: float) -> np.ndarray:
    """The direction `(3,)` along which the fingers of a hand that points down close."""
    return np.array([-np.sin(yaw), np.cos(yaw), 0.0])


def hand_clearance(grasp: np.ndarray, yaw: float, obstacles: Iterable[Bounds]) -> float:
    """
    How far, seen from above, a hand at a grasp stays away from things that stand higher than its lower edge.

    Args:
        grasp (`np.ndarray` of shape `(3,)`): Where fingers close, m.
        yaw (`float`): The hand's turn about the vertical, rad.
        obstacles (iterable of bounds): Everything but what is grasped.

    Returns:
        `float`: Smallest gap between the two rectangles along a separating axis, m; negative where they overlap,
        infinite without an obstacle in reach.
    """
    along = finger_axis(yaw)[:2]
    across = np.array([along[1], -along[0]])
    clearance = np.inf
    for low, high in obstacles:
        if high[2] < grasp[2] + HAND_ABOVE_FINGERTIPS:
            continue
        towards = (low + high)[:2] / 2.0 - grasp[:2]
        half = (high - low)[:2] / 2.0
        # Two rectangles are apart if a side of either of them separates them.
        gaps = []
        for axis in (along, across, np.array([1.0, 0.0]), np.array([0.0, 1.0])):
            hand = HAND_HALF_LENGTH * abs(axis @ along) + HAND_HALF_WIDTH * abs(axis @ across)
            gaps.append(abs(axis @ towards) - hand - np.abs(axis) @ half)
        clearance = min(clearance, max(gaps))
    return float(clearance)


def most_comfortable(candidates: list[tuple[np.ndarray, float]], obstacles: list[Bounds]) -> tuple[np.ndarray, float]:
    """
    The first of the candidates `(grasp, yaw)`, listed in order of preference, with room for the hand; where none has,
    the one with the most.
    """
    best, best_clearance = candidates[0], -np.inf
    for grasp, yaw in candidates:
        clearance = hand_clearance(grasp, yaw, obstacles)
        if clearance >= COMFORTABLE_CLEARANCE:
            return grasp, yaw
        if clearance > best_clearance:
            best, best_clearance = (grasp, yaw), clearance
    return best


def plan_into_basket(item: Bounds, basket: Bounds, obstacles: list[Bounds]) -> PickAndPlace:
    """
    Take an upright box, can or bottle near its centre and drop it into a basket.

    Args:
        item (bounds): The item.
        basket (bounds): The basket.
        obstacles (list of bounds): What else stands around.
    """
    low, high = item
    centre = (low + high) / 2.0
    # Fingers reach a little way down tall things, and stop short of the floor beside flat ones.
    height = max(centre[2], high[2] - FINGER_DEPTH, low[2] + FLOOR_CLEARANCE)
    room = max((high - low)[0] / 2.0 - 0.015, 0.0)
    offsets = [offset for offset in ITEM_OFFSETS if abs(offset) <= room]
    candidates = [(np.array([centre[0] + offset, centre[1], height]), yaw) for yaw in ITEM_YAWS for offset in offsets]
    grasp, yaw = most_comfortable(candidates, obstacles)
    hanging = height - low[2]
    rim = basket[1][2]
    middle = (basket[0] + basket[1]) / 2.0
    # The hand is wider than the basket: only fingers go in.
    release_height = max(rim - FINGER_DEPTH, basket[0][2] + hanging + 0.02)
    release = np.array([middle[0] + grasp[0] - centre[0], middle[1], release_height])
    return PickAndPlace(grasp, release, carry_height=rim + hanging + CARRY_CLEARANCE, yaw=yaw)


def plan_onto_plate(bowl: Bounds, plate: Bounds, obstacles: list[Bounds]) -> PickAndPlace:
    """
    Take a bowl by its rim and set it down on the middle of a plate.

    Args:
        bowl (bounds): The bowl.
        plate (bounds): The plate.
        obstacles (list of bounds): What else stands around.
    """
    low, high = bowl
    centre = (low + high) / 2.0
    radius = (high - low)[0] / 2.0 - RIM_INSET
    base = np.array([centre[0], centre[1], high[2] - RIM_DEPTH])
    # A hand turned by half a turn is the same hand: what differs is the side of the bowl that it takes.
    candidates = [(base + radius * finger_axis(yaw), _half_turn(yaw)) for yaw in BOWL_YAWS]
    grasp, yaw = most_comfortable(candidates, obstacles)
    middle = (plate[0] + plate[1]) / 2.0
    release = np.array([middle[0], middle[1], plate[1][2] + SET_DOWN_MARGIN]) + (grasp - [*centre[:2], low[2]])
    enclosed = any(np.all(centre > lower) and np.all(centre < upper) for lower, upper in obstacles)
    # Out of a drawer the way leads straight up, until the bowl has cleared its walls.
    lift, tolerance = (DRAWER_LIFT, 0.02) if enclosed else (BOWL_LIFT, 0.05)
    carry_height = max(grasp[2], release[2] - SET_DOWN_MARGIN) + lift
    return PickAndPlace(grasp, release, carry_height, yaw=yaw, lift_tolerance=tolerance)


def _half_turn(yaw: float) -> float:
    """An angle brought into [-90°, 90°) by half turns."""
    return float((yaw + np.pi / 2.0) % np.pi - np.pi / 2.0)
