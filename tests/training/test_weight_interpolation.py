import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_aegis.training.weight_interpolation import STEPS, WeightPath


def path_from_zero_to_one():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    return WeightPath({"w": parameter}, {"w": torch.tensor([0.0, 0.0])}), parameter


def test_path_is_straight_and_exact_at_its_ends():
    torch.manual_seed(0)
    start, end = torch.randn(2, 5, 3)
    parameter = torch.nn.Parameter(end.clone())
    path = WeightPath({"w": parameter}, {"w": start})
    for share in (0.25, 0.0, 1.0, 0.7):
        path.go_to(share)
        torch.testing.assert_close(parameter.detach(), (1 - share) * start + share * end)
    path.go_to(0.0)
    assert torch.equal(parameter, start)
    path.go_to(1.0)
    assert torch.equal(parameter, end)


@given(st.floats(0.0, 2.0), st.floats(0.1, 4.0))
def test_largest_share_within_the_tolerance_is_found(tolerance, power):
    path, parameter = path_from_zero_to_one()

    def loss_at(share):
        return 1.0 + share**power

    share = path.keep_within(lambda: loss_at(parameter[0].item()), tolerance)
    assert parameter.tolist() == [share, share]
    assert share == max(s / STEPS for s in range(STEPS + 1) if loss_at(s / STEPS) <= (1 + tolerance) * loss_at(0.0))


def test_loss_is_asked_for_six_times_at_most_and_nan_counts_as_too_much():
    path, parameter = path_from_zero_to_one()
    asked = []

    def loss():
        asked.append(parameter[0].item())
        return math.nan if asked[-1] > 0.5 else 1.0

    assert path.keep_within(loss, 0.05) == 0.5
    assert len(asked) <= 6


def test_what_cannot_be_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="no pre-trained weights of 'w'"):
        WeightPath({"w": parameter}, {})
    path = WeightPath({"w": parameter}, {"w": torch.ones(2)})
    for share in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], found"):
            path.go_to(share)
    with pytest.raises(ValueError, match=r"must not be negative, found -0\.1"):
        path.keep_within(lambda: 1.0, -0.1)
