import dataclasses

import pytest
import torch

from hf_aegis.anchors import InputSubspace, SubspaceOptions
from hf_aegis.anchors.linear_layers.second_moments import SecondMoments, SketchMatrices
from hf_aegis.anchors.merging import merged_subspaces
from hf_aegis.functional.subspace import nystrom_eigenpairs, principal_angles


EXACT = SubspaceOptions(energy=1.0)


def inputs(seed=0, tokens=300, width=24, decay=0.7, dtype=torch.float32):
    """Correlated inputs with a decaying spectrum that are not centred."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))[0]
    scales = decay ** torch.arange(width)
    return ((torch.randn(tokens, width, generator=generator) + 0.5) * scales @ turn).to(dtype)


def subspace_of(batches, options=EXACT, test_matrix=None, masks=None):
    statistics = SecondMoments(batches[0].shape[-1], torch.device("cpu"), test_matrix)
    for batch, mask in zip(batches, masks or [None] * len(batches), strict=True):
        statistics.add(batch, mask)
    return statistics.subspace(("linear",), options)


def rebuilt(subspace):
    basis = subspace.basis.double()
    return basis @ torch.diag(subspace.energies.double()) @ basis.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_full_it_is_the_second_moments_of_the_inputs(dtype):
    x = inputs(dtype=dtype)
    subspace = subspace_of([x[:100], x[100:]])
    exact = x.double().mT @ x.double() / len(x)
    torch.testing.assert_close(rebuilt(subspace), exact, rtol=1e-5, atol=1e-6)
    assert subspace.total_energy == pytest.approx(float(exact.trace()), rel=1e-6)
    assert (subspace.num_inputs, subspace.basis.dtype) == (300, torch.float32)


def test_the_energy_of_many_large_inputs():
    """A sum of squares in float32 at once would be off by a thousandth, which shares of energy are compared with."""
    x = torch.rand(2000, 9216, generator=torch.Generator().manual_seed(0))
    statistics = SecondMoments(9216, x.device, torch.eye(9216, 2))
    statistics.add(x, None)
    exact = sum(float(part.double().square().sum()) for part in x.split(100))
    # As an inner product: √(2¹⁸ / 16) roundings, see there.
    assert float(statistics.energy) == pytest.approx(exact, rel=2**-24 * (2**18 / 16) ** 0.5)


def test_autocast_does_not_round_the_products():
    x = inputs()
    plain = subspace_of([x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert subspace_of([x]) == plain


def test_masked_inputs_do_not_count_whatever_they_hold():
    x = inputs(tokens=12).reshape(3, 4, -1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]])
    padded = x.masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    masked = subspace_of([padded], masks=[mask])
    plain = subspace_of([x[mask.bool()]])
    assert masked.num_inputs == plain.num_inputs == 7
    torch.testing.assert_close(rebuilt(masked), rebuilt(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False])
def test_a_sketch_finds_the_leading_directions(masked):
    options = SubspaceOptions(energy=1.0, max_rank=8, exact_width=16, oversampling=10)
    test_matrix = SketchMatrices(options).matrix(24, torch.device("cpu"))
    assert test_matrix.shape == (24, 18)
    x = inputs().reshape(10, 30, -1)
    mask = (torch.arange(30) < 25).expand(10, -1) if masked else None
    full, sketched = (subspace_of([x], options, matrix, [mask]) for matrix in (None, test_matrix))
    assert full.rank == sketched.rank == 8
    assert float(principal_angles(sketched.basis.double(), full.basis.double()).max()) < 0.02
    # What a sketch misses, the tests of `nystrom_eigenpairs` bound; here it is to be that of float64 second moments.
    counted = (x if mask is None else x[:, :25]).flatten(0, 1).double()
    omega = test_matrix.double()
    energies, _ = nystrom_eigenpairs(counted.mT @ (counted @ omega) / len(counted), omega)
    torch.testing.assert_close(sketched.energies.double(), energies[:8], rtol=1e-4, atol=1e-6)
    assert sketched.total_energy == pytest.approx(full.total_energy, rel=1e-5)


def test_sketches_are_repeatable_and_wide_inputs_only():
    options = SubspaceOptions(max_rank=4, exact_width=16, oversampling=4)
    device = torch.device("cpu")
    first, second = (SketchMatrices(options).matrix(20, device) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, SketchMatrices(dataclasses.replace(options, seed=1)).matrix(20, device))
    assert SketchMatrices(options).matrix(16, device) is None
    # A sketch that is as wide as the second moments would save nothing.
    assert SketchMatrices(dataclasses.replace(options, exact_width=0)).matrix(8, device) is None


def test_bfloat16_bases_are_the_float32_ones_rounded():
    x = inputs()
    exact, rounded = (subspace_of([x], SubspaceOptions(energy=0.99, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert torch.equal(rounded.basis, exact.basis.bfloat16())
    assert torch.equal(rounded.energies, exact.energies)


def test_energy_and_bounds_choose_the_rank():
    x = inputs()
    ranks = [subspace_of([x], SubspaceOptions(energy=energy)).rank for energy in (0.5, 0.9, 0.99, 1.0)]
    assert ranks == sorted(set(ranks))
    assert ranks[-1] == 24
    for energy, rank in zip((0.5, 0.9, 0.99), ranks, strict=False):
        subspace = subspace_of([x], SubspaceOptions(energy=energy))
        assert subspace.energy_share >= energy
        assert rank == 1 or subspace.truncated(max_rank=rank - 1).energy_share < energy
    assert subspace_of([x], SubspaceOptions(energy=0.5, min_rank=7)).rank == 7
    assert subspace_of([x], SubspaceOptions(energy=1.0, max_rank=3)).rank == 3


def test_truncating_later_is_truncating_at_once():
    x = inputs()
    whole = subspace_of([x])
    assert whole.truncated(energy=0.9) == subspace_of([x], SubspaceOptions(energy=0.9))
    assert whole.truncated(energy=0.9, min_rank=9) == whole.truncated(max_rank=9)
    assert whole.truncated() == whole


def test_inputs_that_cannot_be_described_are_named():
    with pytest.raises(ValueError, match="none of the inputs of linear counts"):
        subspace_of([inputs()], masks=[torch.zeros(300)])
    with pytest.raises(ValueError, match="inputs of linear hold values that are not finite"):
        subspace_of([inputs() * float("inf")])


def test_merging_equals_the_whole_where_nothing_was_truncated():
    x = inputs()
    whole = subspace_of([x])
    parts = [{"linear": subspace_of([part])} for part in (x[:40], x[40:200], x[200:])]
    merged = merged_subspaces(parts, EXACT)["linear"]
    torch.testing.assert_close(rebuilt(merged), rebuilt(whole), rtol=1e-5, atol=1e-6)
    assert merged.total_energy == pytest.approx(whole.total_energy, rel=1e-6)
    assert merged.num_inputs == 300
    assert merged_subspaces(parts[:1], EXACT) == parts[0]


def test_merging_what_was_truncated_keeps_the_total_and_most_of_the_rest():
    x, options = inputs(), SubspaceOptions(energy=0.999)
    whole = subspace_of([x], options)
    merged = merged_subspaces([{"linear": subspace_of([part], options)} for part in (x[:150], x[150:])], options)[
        "linear"
    ]
    assert merged.total_energy == pytest.approx(whole.total_energy, rel=1e-6)
    assert whole.energy_share - 0.002 < merged.energy_share <= whole.energy_share + 1e-6
    leading = min(whole.rank, merged.rank) // 2
    angles = principal_angles(merged.basis[:, :leading].double(), whole.basis[:, :leading].double())
    assert float(angles.max()) < 0.05


def test_subspaces_of_different_layers_do_not_merge():
    first = subspace_of([inputs()])
    second = dataclasses.replace(first, linears=("linear", "other"))
    with pytest.raises(ValueError, match=r"linear is for \('linear',\) in the first and for \('linear', 'other'\)"):
        merged_subspaces([{"linear": first}, {"linear": second}], EXACT)
    with pytest.raises(ValueError, match="and for None in the second"):
        merged_subspaces([{"linear": first}, {}], EXACT)


def test_equality_moving_and_repr():
    subspace = subspace_of([inputs()], SubspaceOptions(energy=0.9))
    assert subspace == dataclasses.replace(subspace, basis=subspace.basis.clone())
    assert subspace != dataclasses.replace(subspace, basis=-subspace.basis)
    assert subspace != dataclasses.replace(subspace, num_inputs=1)
    assert subspace != dataclasses.replace(subspace, basis=subspace.basis.bfloat16())
    assert subspace != "subspace"
    moved = subspace.to("meta")
    assert (moved.basis.device.type, moved.energies.device.type, subspace.basis.device.type) == ("meta", "meta", "cpu")
    assert repr(subspace).startswith("InputSubspace(linears=('linear',), width=24, rank=")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linears": ()}, "name of at least one"),
        ({"basis": torch.eye(3)[:, :1]}, r"found \(3, 1\) and \(2,\)"),
        (
            {"basis": torch.eye(3)[:, :0], "energies": torch.ones(0)},
            "rank must lie between 1 and the width 3, found 0",
        ),
        ({"basis": torch.full((3, 2), float("nan"))}, "not finite"),
        ({"energies": torch.tensor([1.0, 2.0])}, "must not rise"),
        ({"energies": torch.tensor([1.0, -2.0])}, "must not be negative"),
        ({"total_energy": 2.9}, r"add up to 3\.0, above the total energy 2\.9"),
        ({"total_energy": float("nan")}, "above the total energy nan"),
        ({"num_inputs": 0}, "num_inputs must be at least 1"),
    ],
)
def test_subspaces_that_cannot_be_are_refused(changes, message):
    fields = {
        "linears": ("a",),
        "basis": torch.eye(3)[:, :2],
        "energies": torch.tensor([2.0, 1.0]),
        "total_energy": 4.0,
    }
    InputSubspace(**fields)
    with pytest.raises(ValueError, match=message):
        InputSubspace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": 0}, "energy must be above 0 and at most 1, found 0"),
        ({"min_rank": 0}, "min_rank must be at least 1"),
        ({"min_rank": 9, "max_rank": 8}, "must not exceed max_rank, found 9 and 8"),
        ({"oversampling": -1}, "oversampling must be at least 0"),
        ({"dtype": "float16"}, r"dtype must be one of \('float32', 'bfloat16'\), found 'float16'"),
        ({"modules": "projector"}, "found the string 'projector'"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SubspaceOptions(**changes)


def test_options_survive_json():
    options = SubspaceOptions(modules=("projector",), max_rank=7)
    fields = {**dataclasses.asdict(options), "modules": ["projector"]}
    assert SubspaceOptions.from_dict(fields) == options
    with pytest.raises(ValueError, match=r"missing keys \[.*'seed'\], unknown keys \['rank'\]"):
        SubspaceOptions.from_dict({"rank": 3})
