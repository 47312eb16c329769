"""Histograms of neurons' cosines against two plain backward passes and `numpy.histogram`."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_aegis.gradients import GradientShield, NeuronCosines


@pytest.mark.parametrize("form", ["streaming", "two_pass"])
@pytest.mark.parametrize("granularity", ["layer", "global", "tensor"])
def test_the_shield_shows_what_two_backward_passes_give(form, granularity, make_case):
    case = make_case("paligemma2")
    task, reference, _ = case.differentiate()
    rows = {}
    for name, gradient in task.items():
        if gradient is not None and reference[name] is not None and gradient.dim() >= 2:
            g, r = gradient.flatten(1), reference[name].flatten(1)
            used = (g.norm(dim=1) > 0) & (r.norm(dim=1) > 0)
            cosine = (g * r).sum(dim=1)[used] / (g.norm(dim=1) * r.norm(dim=1))[used]
            rows.setdefault(case.group_of(name), []).extend(cosine.tolist())
    cosines = NeuronCosines(bins=20)
    shield = GradientShield(case.model, case.anchor, dual_backward=form, granularity=granularity)
    shield.observer = cosines.observe
    found = []
    case.model.zero_grad()
    for _ in range(2):
        with shield:
            case.loss().backward()
        found.append(cosines.to_dict())
    assert found[0]["counts"].keys() == rows.keys() == {*(f"layers.{i}" for i in range(3)), "embeddings",
                                                        "multi_modal_projector"}  # fmt: skip
    for group, values in rows.items():
        expected = np.histogram(values, found[0]["edges"])[0]
        assert expected.sum() == len(values) > 0
        assert found[0]["counts"][group] == expected.tolist()
        # The second step's task gradient is not the accumulated one, so the same neurons are counted again.
        assert found[1]["counts"][group] == (2 * expected).tolist()


def test_an_observer_changes_nothing(make_case):
    case = make_case("gemma2")
    gradients = []
    for observer in (None, NeuronCosines().observe):
        case.model.zero_grad()
        shield = GradientShield(case.model, case.anchor)
        shield.observer = observer
        with shield:
            case.loss().backward()
        gradients.append(case.gradients())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_neurons(dtype):
    generator = torch.Generator().manual_seed(0)
    g, r = (torch.randn(300, 3, 2, generator=generator).to(dtype) for _ in range(2))
    cosines = NeuronCosines(bins=8)
    cosines.observe("a", g, r)
    expected = np.histogram(cosine_similarity(g.double().flatten(1), r.double().flatten(1)), 8, (-1, 1))[0]
    assert cosines.to_dict()["counts"]["a"] == expected.tolist()


def test_ends_and_exceptions():
    cosines = NeuronCosines(bins=4)
    up = torch.ones(1, 3)
    for gradient, reference in (
        (up, up), (up, -up), (1e-25 * up, -1e-25 * up), (up, torch.tensor([[1.0, 0.0, -1.0]])),
    ):  # fmt: skip
        cosines.observe("a", gradient, reference)
    # A right angle is the lower edge of the third bin.
    assert cosines.to_dict() == {"edges": [-1.0, -0.5, 0.0, 0.5, 1.0], "counts": {"a": [2, 0, 1, 1]}}
    for value in (0.0, float("nan"), float("inf")):
        cosines.observe("a", up, torch.full((1, 3), value))
        cosines.observe("a", torch.full((1, 3), value), up)
    cosines.observe("b", torch.ones(3), torch.ones(3))
    assert cosines.to_dict()["counts"] == {"a": [2, 0, 1, 1]}


def test_counts_go_on_after_a_resume():
    first, second = NeuronCosines(bins=5), NeuronCosines(bins=5)
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 10, 3, generator=generator) for _ in range(2)]
    first.observe("a", *pairs[0])
    second.load(json.loads(json.dumps(first.to_dict())))
    for cosines in (first, second):
        cosines.observe("a", *pairs[1])
    assert first.to_dict() == second.to_dict()
    assert sum(first.to_dict()["counts"]["a"]) == 20
    with pytest.raises(ValueError, match="counts of 'a' have 5 bins, expected 6"):
        NeuronCosines(bins=6).load(first.to_dict())
    with pytest.raises(ValueError, match="bins must be at least 1"):
        NeuronCosines(bins=0)
