"""Each way to combine two gradients against its formula in NumPy, and against TorchJD's aggregators."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from torchjd import aggregation

from hf_aegis.gradients.combiners import COMBINERS, GradDrop, OneSidedGramSchmidt, PCGrad, group_scalars, make_combiner


EPS = 1e-12
NAMES = pytest.mark.parametrize("name", list(COMBINERS))
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
VECTORS = st.integers(1, 8).flatmap(
    lambda n: st.tuples(*[numpy_strategies.arrays("float64", n, elements=st.floats(-100, 100, width=32))] * 2)
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(dtype=torch.float64, shift=-0.5, size=60, seed=0):
    reference = torch.randn(size, generator=seeded(seed), dtype=torch.float64)
    task = torch.randn(size, generator=seeded(seed + 1), dtype=torch.float64) + shift * reference
    return task.to(dtype), reference.to(dtype)


def combine_flat(combiner, task, reference, seed=0):
    (update,) = combiner.combine([task], [reference], seeded(seed))
    return update


def expected(name, g, r, uniform):
    """The formulas, written out for flat vectors."""
    d = g @ r
    if name == "one_sided":
        return g - min(d, 0) / (r @ r + EPS) * r
    if name == "pcgrad":
        return (g - min(d, 0) / (r @ r + EPS) * r) + (r - min(d, 0) / (g @ g + EPS) * g)
    kept = np.zeros_like(g)
    for i in range(len(g)):
        total = abs(g[i]) + abs(r[i])
        purity = 0.5 * (1 + (g[i] + r[i]) / total) if total else 0.5
        kept[i] = sum(v for v in (g[i], r[i]) if (v > 0 and purity > uniform[i]) or (v < 0 and purity < uniform[i]))
    return kept


@NAMES
@settings(deadline=None, max_examples=60)
@given(vectors=VECTORS, seed=st.integers(0, 3))
def test_the_formulas(name, vectors, seed):
    task, reference = (torch.from_numpy(vector) for vector in vectors)
    uniform = torch.rand(len(task), generator=seeded(seed), dtype=torch.float64).numpy()
    found = combine_flat(make_combiner(name, EPS), task, reference, seed)
    np.testing.assert_allclose(found.numpy(), expected(name, *vectors, uniform), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [-0.5, 0.5])
@pytest.mark.parametrize(("name", "oracle"), [("pcgrad", aggregation.PCGrad()), ("graddrop", aggregation.GradDrop())])
def test_torchjd_gives_the_same(name, oracle, shift):
    """GradDrop draws its numbers from the global generator there, so the same seed gives the same numbers."""
    task, reference = pair(shift=shift)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = oracle(torch.stack([task, reference]))
    torch.testing.assert_close(combine_flat(make_combiner(name), task, reference, seed=5), theirs)


@settings(deadline=None, max_examples=60)
@given(vectors=VECTORS)
def test_one_sided_never_works_against_the_reference(vectors):
    task, reference = (torch.from_numpy(vector) for vector in vectors)
    update = combine_flat(OneSidedGramSchmidt(EPS), task, reference)
    dot, square = task @ reference, reference @ reference
    if dot >= 0:
        assert torch.equal(update, task)
    else:
        # What the damping leaves of a conflict, to rounding.
        left = dot * EPS / (square + EPS)
        assert abs(update @ reference - left) <= 1e-13 * task.norm() * reference.norm()


@settings(deadline=None, max_examples=60)
@given(vectors=VECTORS, share=st.sampled_from([0.1, 1.0, 5.0]))
def test_a_restoring_part_also_descends_along_the_reference(vectors, share):
    task, reference = (torch.from_numpy(vector) for vector in vectors)
    plain = combine_flat(OneSidedGramSchmidt(EPS), task, reference)
    update = combine_flat(OneSidedGramSchmidt(EPS, restoring=share), task, reference)
    if reference.norm() == 0:
        assert torch.equal(update, plain)
        return
    expected = plain + share * task.norm() * reference / reference.norm()
    torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-12)
    # The scale of the reference has no part in it where nothing is damped.
    undamped, scaled = (
        combine_flat(OneSidedGramSchmidt(1e-300, restoring=share), task, scale * reference) for scale in (1.0, 1e3)
    )
    torch.testing.assert_close(undamped, scaled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("restoring", [-0.1, float("inf"), float("nan")])
def test_restoring_must_be_a_length(restoring):
    with pytest.raises(ValueError, match="restoring must be finite and not negative"):
        OneSidedGramSchmidt(restoring=restoring)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_conflict(dtype):
    task, reference = pair(dtype, shift=1.0)
    assert torch.equal(combine_flat(OneSidedGramSchmidt(), task, reference), task)
    assert torch.equal(combine_flat(PCGrad(), task, reference), task + reference)
    # Elements of one sign stand in no conflict, so nothing is drawn about them.
    one_sign = reference * task.sign() * reference.sign()
    torch.testing.assert_close(combine_flat(GradDrop(), task, one_sign), task + one_sign)


def test_graddrop_keeps_a_sign_as_often_as_it_is_pure():
    size = 20_000
    update = combine_flat(GradDrop(), torch.full((size,), 3.0), torch.full((size,), -1.0))
    # P = 3/4: the positive one where U < 3/4, else the negative one.
    assert set(update.tolist()) == {3.0, -1.0}
    assert (update == 3.0).double().mean().item() == pytest.approx(0.75, abs=0.015)


@NAMES
def test_a_group_is_one_vector_spread_over_tensors(name):
    task, reference = pair(size=24)
    shapes = [(2, 5), (3,), (), (5, 2)]
    sizes = [math.prod(shape) for shape in shapes]
    combiner = make_combiner(name)

    def spread(flat):
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    found = combiner.combine(spread(task), spread(reference), seeded())
    assert [tuple(tensor.shape) for tensor in found] == shapes
    uniform = torch.cat([u.flatten() for s in [seeded()] for u in [torch.rand(n, generator=s, dtype=torch.float64)
                         for n in sizes]])  # fmt: skip
    np.testing.assert_allclose(
        torch.cat([tensor.flatten() for tensor in found]).numpy(),
        expected(name, task.numpy(), reference.numpy(), uniform.numpy()),
        rtol=1e-12,
    )


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors(name, dtype):
    task, zero = pair(dtype)[0], torch.zeros(60, dtype=dtype)
    combiner = make_combiner(name)
    assert torch.equal(combine_flat(combiner, task, zero), task)
    assert torch.equal(combine_flat(combiner, zero, zero), zero)
    # The reference's own share, for those that have it.
    assert torch.equal(combine_flat(combiner, zero, task), task if combiner.symmetric else zero)


@NAMES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(name, value):
    task, reference = pair()
    bad = reference.clone()
    bad[3] = value
    assert torch.equal(combine_flat(make_combiner(name), task, bad), task)
    returned = combine_flat(make_combiner(name), bad, reference)
    assert torch.equal(returned.nan_to_num(9.0), bad.nan_to_num(9.0))


@NAMES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_precision_follows_the_dtype(name, dtype, tolerance):
    task, reference = pair(dtype, size=5000)
    exact = expected(
        name,
        task.double().numpy(),
        reference.double().numpy(),
        torch.rand(5000, generator=seeded(), dtype=torch.float32).numpy(),
    )
    found = combine_flat(make_combiner(name), task, reference)
    assert found.dtype == dtype
    assert np.linalg.norm(found.double().numpy() - exact) <= tolerance * np.linalg.norm(exact)


def test_hand_computed_case():
    # d = -3, ‖r‖² = ‖g‖² = 5, ε = 1: α = β = -1/2.
    task, reference = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 2.0])
    assert combine_flat(OneSidedGramSchmidt(1.0), task, reference).tolist() == [1.5, -1.0]
    assert combine_flat(PCGrad(1.0), task, reference).tolist() == [3.0, 0.0]
    assert [value.item() for value in group_scalars([task], [reference])] == [-3.0, 5.0, 5.0]


def test_refusals():
    with pytest.raises(ValueError, match=r"combiner must be one of .*'pcgrad'.*, found 'sum'"):
        make_combiner("sum")
    for make in (OneSidedGramSchmidt, PCGrad):
        with pytest.raises(ValueError, match="eps must be positive, found 0"):
            make(0)
    with pytest.raises(ValueError, match=r"same shapes, found \[\(2,\)\] and \[\(3,\)\]"):
        group_scalars([torch.zeros(2)], [torch.zeros(3)])
