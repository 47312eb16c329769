"""VLA-GSE: generalized and specialized experts from a weight's spectrum (arXiv 2605.06175), as a tuner of PEFT."""

from hf_aegis.tuners.gse.config import GSEConfig
from hf_aegis.tuners.gse.layer import GSELayer, Linear
from hf_aegis.tuners.gse.model import GSEModel
from hf_aegis.tuners.gse.routing_log import RoutingRecord
from hf_aegis.tuners.registration import register_tuner


__all__ = ["GSEConfig", "GSELayer", "GSEModel", "Linear", "RoutingRecord"]

register_tuner(GSEConfig, GSEModel)
