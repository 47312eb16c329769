"""What a model still knows: question answering, scored as published."""

from .vqa import VQAHoldout
from .vqa_scores import VQARecord, VQAResult, VQAScore
from .vqa_survey import survey


__all__ = ["VQAHoldout", "VQARecord", "VQAResult", "VQAScore", "survey"]
