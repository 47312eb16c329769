"""Activation anchors: what a pre-trained model's decoder layers look like on its own data."""

from hf_aegis.anchors.anchor import ActivationAnchor
from hf_aegis.anchors.decoder_layers import find_decoder_layers, unwrap_model
from hf_aegis.anchors.fingerprint import AnchorFingerprint, AnchorMismatchError
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace, SubspaceOptions
from hf_aegis.anchors.sample_batches import SampleBatches
from hf_aegis.anchors.shares import Share
from hf_aegis.anchors.weight_hash import hash_layer_weights, named_base_parameters


__all__ = [
    "ActivationAnchor",
    "AnchorFingerprint",
    "AnchorMismatchError",
    "InputSubspace",
    "PairSensitivity",
    "SampleBatches",
    "Share",
    "SubspaceOptions",
    "find_decoder_layers",
    "hash_layer_weights",
    "named_base_parameters",
    "unwrap_model",
]
