"""
The dual backward: a task gradient, bent layer by layer so that it does not work against a reference direction.

Knows no robots and no particular model: it works on any Hugging Face decoder whose layers can be found.
"""

from hf_aegis.gradients.diagnostics import ProjectionReport
from hf_aegis.gradients.graph import LayerLeakError, LostGradientError
from hf_aegis.gradients.groups import ParameterGroups
from hf_aegis.gradients.projector import Combiner, GradientProjector, OneSidedGramSchmidt
from hf_aegis.gradients.recompute import RecomputeMismatchError, SharedRecompute
from hf_aegis.gradients.reference import LayerPenalty, ReferencePenalty, TransportPenalty
from hf_aegis.gradients.shield import GradientShield


__all__ = [
    "Combiner",
    "GradientProjector",
    "GradientShield",
    "LayerLeakError",
    "LayerPenalty",
    "LostGradientError",
    "OneSidedGramSchmidt",
    "ParameterGroups",
    "ProjectionReport",
    "RecomputeMismatchError",
    "ReferencePenalty",
    "SharedRecompute",
    "TransportPenalty",
]
