"""
The dual backward: a task gradient, bent layer by layer so that it does not work against a reference direction.

And the held subspace: linear layers that go on acting on anchored inputs as they did, whatever the optimiser does.

Knows no robots and no particular model: it works on any Hugging Face decoder whose layers can be found.
"""

from hf_aegis.gradients.adam_metric import AdamMetric
from hf_aegis.gradients.certificate import Certificate, CertificateReport
from hf_aegis.gradients.combiners import (
    COMBINERS,
    Combiner,
    GradDrop,
    GradientCombiner,
    OneSidedGramSchmidt,
    PCGrad,
    make_combiner,
)
from hf_aegis.gradients.diagnostics import ProjectionReport
from hf_aegis.gradients.freezing import freeze_unheld
from hf_aegis.gradients.graph import LayerLeakError, LostGradientError
from hf_aegis.gradients.groups import ParameterGroups
from hf_aegis.gradients.held_pairs import HeldPairs
from hf_aegis.gradients.held_subspace import HeldSubspace
from hf_aegis.gradients.held_weight import HeldWeight
from hf_aegis.gradients.layer_losses import DistillationLoss, LayerRecorder, TransportLoss
from hf_aegis.gradients.linear_probes import LinearDeviation
from hf_aegis.gradients.neuron_cosines import NeuronCosines
from hf_aegis.gradients.parameter_penalty import QuadraticPenalty, fisher_diagonal
from hf_aegis.gradients.projector import GradientProjector
from hf_aegis.gradients.recompute import RecomputeMismatchError, SharedRecompute
from hf_aegis.gradients.reduction import average_over_processes
from hf_aegis.gradients.reference import LayerPenalty, ReferencePenalty, TransportPenalty
from hf_aegis.gradients.replay import ReplayShield
from hf_aegis.gradients.sharded_shield import ShardedGradientShield
from hf_aegis.gradients.shards import as_whole, gathered, local_part, own_part, reshard
from hf_aegis.gradients.shield import GradientShield
from hf_aegis.gradients.update_projection import UpdateProjection


__all__ = [
    "COMBINERS",
    "AdamMetric",
    "Certificate",
    "CertificateReport",
    "Combiner",
    "DistillationLoss",
    "GradDrop",
    "GradientCombiner",
    "GradientProjector",
    "GradientShield",
    "HeldPairs",
    "HeldSubspace",
    "HeldWeight",
    "LayerLeakError",
    "LayerPenalty",
    "LayerRecorder",
    "LinearDeviation",
    "LostGradientError",
    "NeuronCosines",
    "OneSidedGramSchmidt",
    "PCGrad",
    "ParameterGroups",
    "ProjectionReport",
    "QuadraticPenalty",
    "RecomputeMismatchError",
    "ReferencePenalty",
    "ReplayShield",
    "ShardedGradientShield",
    "SharedRecompute",
    "TransportLoss",
    "TransportPenalty",
    "UpdateProjection",
    "as_whole",
    "average_over_processes",
    "fisher_diagonal",
    "freeze_unheld",
    "gathered",
    "local_part",
    "make_combiner",
    "own_part",
    "reshard",
]
