"""
The moments of a million tokens that are ten thousand standard deviations away from zero, collected batch by batch.

Batches' moments are in float32, so that an error of the mean of log₂N roundings times that distance is theirs; nothing
is added to it by batches, files or merging, which are in float64.
"""

import dataclasses
import math

import pytest
import torch
from torch import nn

from hf_aegis.anchors import ActivationAnchor, Share
from hf_aegis.anchors.moments_observer import MomentsObserver
from hf_aegis.anchors.moments_over_batches import MomentsOverBatches
from hf_aegis.anchors.partial_collection import PartialCollection


BATCHES, TOKENS, RATIO = 100, 10_000, 1e4
OF_MEAN = math.log2(TOKENS) * 2**-24 * (RATIO + 1)
OF_VARIANCE = math.log2(TOKENS) * 2**-24 + OF_MEAN**2


def batch(number):
    """Hidden states `(10, 1000, 2)`, the first tenth of them padding that holds NaN."""
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(11, TOKENS // 10, 2, generator=generator) + RATIO
    hidden[0] = math.nan
    mask = torch.ones(hidden.shape[:2])
    mask[0] = 0
    return hidden, mask


@pytest.fixture(scope="module")
def exact():
    tokens = torch.cat([batch(number)[0][1:].flatten(0, 1).double() for number in range(BATCHES)])
    return tokens.mean(dim=0), tokens.var(dim=0, unbiased=False)


def assert_close(mean, variance, exact):
    assert ((mean - exact[0]).abs() / exact[1].sqrt()).max() <= OF_MEAN
    assert ((variance - exact[1]).abs() / exact[1]).max() <= OF_VARIANCE


def add(sums, numbers):
    """What a collection's forward passes do."""
    layers = nn.ModuleList([nn.Identity()])
    observed = MomentsObserver(layers)
    with observed.attached():
        for number in numbers:
            hidden, mask = batch(number)
            observed.start_batch(mask)
            layers[0](hidden)
            mean, variance, tokens = observed.batch_moments(number)
            sums.add(mean, variance, tokens, len(hidden))
    return sums


def test_a_collection_that_is_saved_and_goes_on(exact, tmp_path):
    partial = PartialCollection(tmp_path, {}, every=40)
    partial.batch_done("moments", 40, add(MomentsOverBatches("pooled", None), range(40)))
    again = MomentsOverBatches("pooled", None)
    assert PartialCollection(tmp_path, {}).begin("moments", again) == 40
    found = add(again, range(40, BATCHES)).over_processes(Share())
    assert found.num_tokens == BATCHES * TOKENS
    assert_close(found.mean[0], found.variance[0], exact)


def test_anchors_that_are_merged(exact, build_model, make_batches, tmp_path):
    like = ActivationAnchor.collect(build_model("llama"), make_batches("llama"), moments="pooled", progress=False)
    parts = []
    for index, numbers in enumerate((range(10), range(10, 15), range(15, BATCHES))):
        found = add(MomentsOverBatches("pooled", None), numbers).over_processes(Share())
        fingerprint = dataclasses.replace(
            like.fingerprint, num_layers=1, width=2, num_tokens=found.num_tokens, num_batches=found.num_batches
        )
        anchor = ActivationAnchor(found.mean, found.variance, fingerprint)
        parts.append(ActivationAnchor.from_pretrained(anchor.save_pretrained(tmp_path / str(index))))
    merged = ActivationAnchor.merge(parts)
    assert merged.fingerprint.num_tokens == BATCHES * TOKENS
    assert_close(merged.mean[0], merged.variance[0], exact)
