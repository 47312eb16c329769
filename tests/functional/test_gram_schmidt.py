import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from hf_aegis.functional.gram_schmidt import one_sided_coefficient, project_one_sided, shed_energy


FINITE = st.floats(-100, 100, allow_nan=False, width=32)
ANYTHING = st.floats(allow_nan=True, allow_infinity=True, width=32)


def vectors(elements, count=2):
    size = st.integers(1, 8)
    return size.flatmap(lambda n: st.tuples(*[numpy_strategies.arrays("float64", n, elements=elements)] * count))


@settings(deadline=None)
@given(vectors(FINITE), st.sampled_from([1e-12, 1e-3, 1.0, 50.0]))
def test_what_is_left_of_a_conflict(pair, eps):
    gradient, reference = (torch.from_numpy(vector) for vector in pair)
    dot, squared = gradient @ reference, reference @ reference
    projected = project_one_sided(gradient, reference, eps)
    if dot < 0:
        left = dot * eps / (squared + eps)
        scale = gradient.norm() * reference.norm()
        torch.testing.assert_close(projected @ reference, left, rtol=1e-9, atol=float(scale) * 1e-13)
        assert projected.norm() <= gradient.norm() * (1 + 1e-12)
    else:
        assert torch.equal(projected, gradient)


@settings(deadline=None)
@given(vectors(st.floats(-100, 100).map(lambda x: round(x, 3))))
def test_norm_loses_the_squared_cosine(pair):
    gradient, reference = (torch.from_numpy(vector) for vector in pair)
    projected = project_one_sided(gradient, reference, eps=1e-30)
    if gradient @ reference < 0:
        cosine = gradient @ reference / (gradient.norm() * reference.norm())
        expected = (gradient @ gradient) * (1 - cosine**2)
        torch.testing.assert_close(projected @ projected, expected, rtol=1e-9, atol=1e-9 * float(gradient @ gradient))


@settings(deadline=None)
@given(vectors(FINITE), st.sampled_from([1e-12, 1e-3, 10.0]))
def test_shed_energy_is_what_the_norm_loses(pair, eps):
    gradient, reference = (torch.from_numpy(vector) for vector in pair)
    dot, task, squared = gradient @ reference, gradient @ gradient, reference @ reference
    shed = shed_energy(dot, task, squared, one_sided_coefficient(dot, squared, eps))
    projected = project_one_sided(gradient, reference, eps)
    expected = 1 - (projected @ projected) / task if task > 0 else torch.zeros_like(task)
    torch.testing.assert_close(shed, expected, rtol=0, atol=1e-9)
    assert 0 <= shed <= 1 + 1e-12


@settings(deadline=None, max_examples=200)
@given(vectors(ANYTHING), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_nothing_makes_a_nan(pair, dtype):
    gradient, reference = (torch.from_numpy(vector).to(dtype) for vector in pair)
    projected = project_one_sided(gradient, reference)
    assert projected.dtype == dtype
    assert projected.shape == gradient.shape
    assert torch.isfinite(projected).all()
    if not torch.isfinite(gradient).all():
        assert not projected.any()
    elif not torch.isfinite(reference).all():
        assert torch.equal(projected, gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_arguments(value):
    good, bad = torch.tensor([1.0, -2.0]), torch.tensor([value, 1.0])
    assert torch.equal(project_one_sided(bad, good), torch.zeros(2))
    assert torch.equal(project_one_sided(good, bad), good)
    finite = torch.tensor([-1.0, -1.0, -1.0])
    dots = torch.tensor([-1.0, value, value])
    squares = torch.tensor([value, 1.0, value]).abs()
    assert torch.equal(one_sided_coefficient(dots, squares, 1e-12), torch.zeros(3))
    assert torch.equal(shed_energy(dots, finite.abs(), squares, torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zeros_and_right_angles(dtype):
    zero, vector = torch.zeros(3, dtype=dtype), torch.tensor([-0.0, 3.0, -5.0], dtype=dtype)
    for gradient, reference in ((vector, zero), (zero, vector), (zero, zero)):
        assert torch.equal(project_one_sided(gradient, reference), gradient)
    right = torch.tensor([2.0, 5.0, 3.0], dtype=dtype)
    assert torch.equal(project_one_sided(vector, right), vector)
    assert shed_energy(*torch.zeros(4, 1)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)]
)
def test_precision_follows_the_dtype(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(10_000, generator=generator, dtype=torch.float64).to(dtype)
    gradient = (torch.randn(10_000, generator=generator, dtype=torch.float64) - 0.5 * reference.double()).to(dtype)
    exact = project_one_sided(gradient.double(), reference.double())
    projected = project_one_sided(gradient, reference)
    assert projected.dtype == dtype
    assert (projected.double() - exact).norm() <= tolerance * exact.norm()
    # Far below what the gradient itself had: the sum must not have been rounded to half precision on the way.
    before = gradient.double() @ reference.double()
    assert abs(projected.double() @ reference.double()) < max(tolerance, 1e-6) * abs(before)


def test_hand_computed_case():
    # d = -3, ‖r‖² = 5, ε = 1: α = -1/2.
    gradient, reference = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 2.0])
    assert project_one_sided(gradient, reference, eps=1.0).tolist() == [1.5, -1.0]
    dot, task, squared = torch.tensor(-3.0), torch.tensor(5.0), torch.tensor(5.0)
    alpha = one_sided_coefficient(dot, squared, eps=1.0)
    assert alpha.item() == -0.5
    assert shed_energy(dot, task, squared, alpha).item() == pytest.approx(1 - 3.25 / 5)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, found \(2,\) and \(3,\)"):
        project_one_sided(torch.zeros(2), torch.zeros(3))
