"""Activation anchors: what a pre-trained model's decoder layers look like on its own data."""

from hf_aegis.anchors.decoder_layers import find_decoder_layers, unwrap_model

__all__ = ["find_decoder_layers", "unwrap_model"]
