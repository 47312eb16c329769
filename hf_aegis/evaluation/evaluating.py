"""A model under evaluation."""

import contextlib
from collections.abc import Iterator

import torch

from hf_aegis.anchors.collection import evaluation_mode


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """
    Evaluation mode without gradients, on the model's device; afterwards every module's own mode and the random state
    are as before.
    """
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield device
