"""A step's statistics, inner products and restored weights against float64; bounds are roundings × condition."""

import math

import pytest
import torch
from torch import nn

from hf_aegis.gradients import GradientShield
from hf_aegis.gradients.combiners import OneSidedGramSchmidt, group_scalars
from hf_aegis.gradients.data_parallel import LayerMoments
from hf_aegis.gradients.held_weight import HeldWeight
from hf_aegis.gradients.projector import bend
from hf_aegis.gradients.reference import TransportPenalty


class Anchor:
    """The statistics that a [`TransportPenalty`] asks for."""

    def __init__(self, mean, variance):
        self.mean, self.variance = mean[None], variance[None]


@pytest.mark.parametrize("ratio", [0, 1e4])
def test_a_million_tokens_that_eight_processes_share(ratio):
    generator = torch.Generator().manual_seed(0)
    shares = [torch.randn(125, 1000, 2, generator=generator) + ratio for _ in range(8)]
    # One process has a single token that counts, among padding of NaN.
    shares[3][:] = math.nan
    shares[3][0, 0] = ratio
    masks = [None if index != 3 else torch.eye(125, 1000) * (torch.arange(1000) == 0) for index in range(8)]
    tokens = torch.cat([h[0, :1] if m is not None else h.flatten(0, 1) for h, m in zip(shares, masks, strict=True)])
    leaf = tokens.double().requires_grad_()
    mean, variance = leaf.mean(dim=0), leaf.var(dim=0, unbiased=False)
    anchor = Anchor((mean + 0.1 * variance.sqrt()).detach(), (1.2 * variance).detach())
    distance = (mean - anchor.mean[0]) ** 2 + ((variance + 1e-6).sqrt() - (anchor.variance[0] + 1e-6).sqrt()) ** 2
    (exact,) = torch.autograd.grad(distance.mean(), leaf)

    moments = [LayerMoments.of(hidden, mask) for hidden, mask in zip(shares, masks, strict=True)]
    total = moments[0]
    for part in moments[1:]:
        total = total.merged(part)
    roundings = (math.log2(len(tokens)) + len(shares)) * 2**-24 * (ratio + 1)
    assert total.count == len(tokens)
    assert ((total.mean.double() - mean) / variance.sqrt()).abs().max() <= roundings
    assert (total.variance.double() / variance - 1).abs().max() <= 28 * 2**-24 + roundings**2

    penalty = TransportPenalty(anchor)
    first = penalty.of(0, total, None).cotangent(shares[0]).flatten(0, 1).double()
    expected = exact[: len(first)]
    # Statistics of the batch and of the anchor, and the two addends of the gradient.
    assert (first - expected).norm() <= 4 * roundings * expected.norm()
    # The form with a graph says the same to each process, whose share of the statistics is differentiated alone.
    others = moments[1]
    for part in moments[2:]:
        others = others.merged(part)
    states = shares[0].clone().requires_grad_()
    penalty.differentiable(0, states, None, others).backward()
    assert (states.grad.flatten(0, 1).double() - expected).norm() <= 4 * roundings * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_projected_gradients_are_rounded_once(dtype, scale):
    """In float16 at 10⁴, where squares overflow, and at 10⁻³, where they vanish, too."""
    generator = torch.Generator().manual_seed(0)
    task, reference = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    task, reference = (scale * (task - 0.5 * reference)).to(dtype), (scale * reference).to(dtype)
    dot, task_square, square = (float(scalar) for scalar in group_scalars([task], [reference]))
    wide, other = task.double(), reference.double()
    largest = float(wide.norm() * other.norm())
    # 2¹⁷ terms in 16 accumulators at the least.
    accumulated = (2**17 / 16) ** 0.5 * 2**-24
    assert abs(dot - float(wide @ other)) <= accumulated * largest
    assert abs(task_square / float(wide @ wide) - 1) <= 2 * accumulated
    assert abs(square / float(other @ other) - 1) <= 2 * accumulated

    exact = wide - (wide @ other) / (other @ other) * other
    combiner = OneSidedGramSchmidt()
    once = (exact.to(dtype).double() - exact).norm()
    bent = task.clone()
    bend(bent, reference, combiner(*group_scalars([task], [reference])))
    for found in (bent, *combiner.combine([task], [reference])):
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= 1.001 * once + 4 * accumulated * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_restored_to_its_own_rounding_however_far_it_went(dtype):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32, bias=False, dtype=dtype)
    basis = torch.linalg.qr(torch.randn(64, 20, generator=generator, dtype=torch.float64))[0].float()
    held = HeldWeight(linear, basis)
    target = linear.weight.detach().double() @ basis.double()
    with torch.no_grad():
        linear.weight += 100 * torch.randn(32, 64, generator=generator).to(dtype)
    before = linear.weight.detach().double()
    exact = before - (before @ basis.double() - target) @ basis.double().T
    once = (exact.to(dtype).double() - exact).norm()
    held.restore()
    found = linear.weight.detach().double()
    # What is subtracted are sums of 64 products as large as the weight that went away.
    rounding = 64**0.5 * 2**-24 * before.norm()
    assert (found - exact).norm() <= 1.001 * once + rounding
    assert (found @ basis.double() - target).norm() <= 1.001 * once + rounding


@pytest.mark.parametrize("form", ["streaming", "two_pass"])
def test_float16_hidden_states_are_refused(form, make_case):
    case = make_case("llama", torch.float32)
    shield = GradientShield(case.model.half(), case.anchor, dual_backward=form)
    with pytest.raises(ValueError, match=r"decoder layer 0 .* float16.*bfloat16"), shield:
        case.loss()
