"""Experts from slices of a spectrum, against the equations of arXiv 2605.06175 written out one expert at a time."""

import math

import pytest
import torch

from hf_aegis.functional.spectral_experts import (
    balanced_scales,
    expert_ranks,
    plain_scales,
    spectral_experts,
    spread_over_ranks,
)


OPTIONS = {"num_experts": 4, "num_generalized": 1, "rho": 10.0, "eta": 1.0, "base_scale": 2.0}


def decomposed(rank, rows=12, columns=10):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def test_ranks_are_shared_out():
    assert expert_ranks(16, 8) == [2] * 8
    assert expert_ranks(7, 4) == [2, 2, 2, 1]
    assert expert_ranks(4, 4) == [1] * 4
    with pytest.raises(ValueError, match="each of 4 experts needs a rank of at least 1, found 3"):
        expert_ranks(3, 4)


@pytest.mark.parametrize("rank", [4, 7, 8, 9])
def test_values_are_spread_over_the_same_ranks(rank):
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    repeats = torch.tensor(expert_ranks(rank, 4))
    assert torch.equal(spread_over_ranks(values, rank), values.repeat_interleave(repeats, dim=-1))


def test_scales_by_hand():
    # √(3 · 1 · 12 / 1) and √(3 · 1 · 12 / 4).
    assert plain_scales([1, 4], 12, 1.0).tolist() == [6.0, 3.0]
    # Traces 5 + 3 = 8, 2 and 2; their mean is 4.
    assert balanced_scales(torch.tensor([5.0, 3.0, 2.0, 2.0]), [2, 1, 1], 2.0).tolist() == [1.0, 4.0, 4.0]


@pytest.mark.parametrize("rank", [4, 6, 8])
@pytest.mark.parametrize("base_scale", [2.0, None])
def test_each_expert_starts_at_its_slice(rank, base_scale):
    left, values, right = decomposed(rank)
    experts = spectral_experts(
        left, values, right, **{**OPTIONS, "base_scale": base_scale}, backbone_adjustment="expectation"
    )
    ranks = expert_ranks(rank, 4)
    traces = [part.sum() for part in values.split(ranks)][1:]
    start = 0
    for index, own in enumerate(ranks):
        part = slice(start, start + own)
        scale = experts.scales[index]
        product = scale * experts.up[:, part] @ experts.down[part]
        torch.testing.assert_close(product, left[:, part] @ torch.diag(values[part]) @ right[part] / 10)
        if index == 0 or base_scale is None:
            assert scale.item() == pytest.approx(math.sqrt(3 * 10 / own))
        else:
            assert scale.item() == pytest.approx(2 * (sum(traces) / 3 / traces[index - 1]).item())
        # A and B share the slice evenly: neither of the gradients is drowned by the other.
        torch.testing.assert_close(experts.up[:, part].norm(dim=0), experts.down[part].norm(dim=1))
        start += own


@pytest.mark.parametrize("num_generalized", [0, 1, 2, 4])
@pytest.mark.parametrize("adjustment", ["expectation", "full"])
def test_what_is_taken_off_the_backbone(num_generalized, adjustment):
    left, values, right = decomposed(6)
    options = {**OPTIONS, "num_generalized": num_generalized}
    experts = spectral_experts(left, values, right, **options, backbone_adjustment=adjustment)
    expected, start = torch.zeros(12, 10, dtype=torch.float64), 0
    for index, own in enumerate(expert_ranks(6, 4)):
        part = slice(start, start + own)
        start += own
        if index < num_generalized:
            share = 1 / num_generalized
        else:
            share = 1 / (4 - num_generalized) if adjustment == "expectation" else 1.0
        expected += share * left[:, part] @ torch.diag(values[part]) @ right[part] / 10
    torch.testing.assert_close(experts.backbone_up @ experts.backbone_down, expected)


def test_nothing_is_taken_off():
    experts = spectral_experts(*decomposed(6), **OPTIONS, backbone_adjustment="none")
    assert experts.backbone_down is None and experts.backbone_up is None
