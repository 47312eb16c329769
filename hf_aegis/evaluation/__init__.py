"""What a model still knows: question answering on a fixed hold-out."""

from .vqa import VQAHoldout, VQAResult, VQAScore


__all__ = ["VQAHoldout", "VQAResult", "VQAScore"]
