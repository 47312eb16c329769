import pytest
import torch

from hf_aegis.functional.gauss_newton import predictive_cotangent


def test_it_is_the_gradient_of_the_projected_predictions():
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).unbind(0)
    logits.requires_grad_()
    q = (logits / 4).softmax(-1).detach()
    z = (noise * q.sqrt() * (logits - (q * logits).sum(-1, keepdim=True))).sum()
    torch.testing.assert_close(predictive_cotangent(logits, noise, 4.0), torch.autograd.grad(z, logits)[0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_its_second_moments_are_the_hessian_of_the_divergence(temperature):
    logits = torch.tensor([3.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    # Noise of unit covariance, without chance: each unit vector once.
    rows = predictive_cotangent(logits.expand(4, 4), torch.eye(4, dtype=torch.float64), temperature)
    before = (logits / temperature).log_softmax(-1)

    def divergence(moved):
        return (before.exp() * (before - (moved / temperature).log_softmax(-1))).sum()

    hessian = torch.autograd.functional.hessian(divergence, logits)
    torch.testing.assert_close(rows.mT @ rows, temperature**2 * hessian)


def test_a_high_temperature_keeps_it_from_vanishing():
    logits, noise = torch.tensor([60.0, 0.0, 0.0]), torch.tensor([0.3, -1.0, 2.0])
    assert float(predictive_cotangent(logits, noise).norm()) < 1e-9
    assert float(predictive_cotangent(logits, noise, 20.0).norm()) > 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"same shape, found \(2, 3\) and \(2, 4\)"):
        predictive_cotangent(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
        predictive_cotangent(torch.zeros(3), torch.zeros(3), 0.0)
