"""Moments of all decoder layers, summed over batches and processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_aegis.anchors.linear_layers.inputs import LinearInputs
from hf_aegis.anchors.partial_collection import Snapshot
from hf_aegis.anchors.shares import Share
from hf_aegis.functional.moments import Moments, merge_moments
from hf_aegis.json_files import require_keys


@dataclass(frozen=True)
class CollectedMoments:
    """
    Moments of all layers.

    Attributes:
        mean (`Tensor` of shape `(L, D)`): Means, float64.
        variance (`Tensor` of shape `(L, D)`): Population variances, float64.
        num_samples, num_tokens, num_batches (`int`): What was seen.
    """

    mean: Tensor
    variance: Tensor
    num_samples: int
    num_tokens: int
    num_batches: int


class MomentsOverBatches:
    """
    Moments of all layers over the batches so far, and what linear layers were given in the same passes.

    Args:
        moments (`str`): How batches are taken together, see [`ActivationAnchor.collect`].
        linear_inputs ([`LinearInputs`], *optional*): Sums of its own, which are kept along.
    """

    def __init__(self, moments: str, linear_inputs: LinearInputs | None):
        self.moments = moments
        self.linear_inputs = linear_inputs
        self.total: Moments | None = None
        self.counts = {"num_samples": 0, "num_tokens": 0, "num_batches": 0}

    def add(self, mean: Tensor, variance: Tensor, num_tokens: int, num_samples: int) -> None:
        """Adds a batch's moments `(L, D)`."""
        self._count(num_samples=num_samples, num_tokens=num_tokens, num_batches=1)
        if self.moments == "pooled":
            batch = Moments(torch.tensor(float(num_tokens), dtype=mean.dtype), mean, variance * num_tokens)
            self._merge(batch)
            return
        # Running averages over batches, of the mean and (in the place of m2) of the variance.
        self._merge(Moments(torch.ones((), dtype=mean.dtype), mean, variance))

    def over_processes(self, share: Share) -> CollectedMoments:
        """The moments over all that processes have added; the linear layers' inputs stay what they are."""
        assert self.total is not None
        # In the order of the processes, so that all of them get the same to the last bit.
        whole = MomentsOverBatches(self.moments, None)
        for total, counts in share.gathered((self.total, self.counts)):
            whole._count(**counts)
            whole._merge(total)
        assert whole.total is not None
        variance = whole.total.variance if self.moments == "pooled" else whole.total.m2
        return CollectedMoments(whole.total.mean, variance, **whole.counts)

    def snapshot(self) -> Snapshot:
        """The sums so far, see [`Resumable`]."""
        assert self.total is not None
        tensors, fields = dict(self.total._asdict()), dict(self.counts)
        if self.linear_inputs is None:
            return Snapshot(tensors, fields)
        inputs = self.linear_inputs.snapshot()
        return Snapshot({**tensors, **inputs.tensors}, {**fields, **inputs.fields})

    def restore(self, snapshot: Snapshot) -> bool:
        """Goes on from earlier sums, see [`Resumable`]."""
        names = Moments._fields
        require_keys(snapshot.fields, dict.fromkeys(self.counts, int), "fields")
        found = [snapshot.tensors.get(name) for name in names]
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in found]
        if shapes[0] != () or shapes[1] != shapes[2] or shapes[1] is None or len(shapes[1]) != 2:
            raise ValueError(f"{', '.join(names)} must have the shapes (), (L, D) and (L, D), found {shapes}")
        self.total = Moments(*(snapshot.tensors[name] for name in names))
        if not all(tensor.is_floating_point() for tensor in self.total):
            raise ValueError(f"{', '.join(names)} must be floating point, found {[t.dtype for t in self.total]}")
        self.counts = {name: snapshot.fields[name] for name in self.counts}
        if self.linear_inputs is not None:
            tensors = {name: tensor for name, tensor in snapshot.tensors.items() if name not in names}
            self.linear_inputs.restore(Snapshot(tensors, snapshot.fields))
        return True

    def _count(self, **more: int) -> None:
        self.counts = {name: count + more[name] for name, count in self.counts.items()}

    def _merge(self, more: Moments) -> None:
        if self.total is None:
            self.total = more
        elif self.moments == "pooled":
            self.total = merge_moments(self.total, more)
        else:
            number = self.total.count + more.count
            share = more.count / number
            mean, variance = (old + (new - old) * share for old, new in zip(self.total[1:], more[1:], strict=True))
            self.total = Moments(number, mean, variance)
