"""Training data: LIBERO demonstrations, action tokens, questions about images. Names are imported when first used."""

from typing import Any

from hf_aegis.lazy_exports import resolve


_EXPORTS = {
    "DatasetStatistics": "hf_aegis.functional.normalization",
    "FASTDecodeError": "hf_aegis.data.fast_tokenizer",
    "FASTTokenizer": "hf_aegis.data.fast_tokenizer",
    "FeatureStatistics": "hf_aegis.functional.normalization",
    "LiberoConvention": "hf_aegis.data.libero_format",
    "LiberoDataset": "hf_aegis.data.libero_dataset",
    "LiberoFormatError": "hf_aegis.data.libero_format",
    "PictureSettings": "hf_aegis.data.libero_pictures",
    "RecordingConfig": "hf_aegis.data.libero_recorder",
    "VQACollator": "hf_aegis.data.vqa",
    "VQASample": "hf_aegis.data.vqa_samples",
    "VQASamples": "hf_aegis.data.vqa_samples",
    "combine": "hf_aegis.data.libero_combine",
    "format_report": "hf_aegis.data.libero_inspect",
    "inspect_file": "hf_aegis.data.libero_inspect",
    "load_easy_vqa": "hf_aegis.data.vqa",
    "load_statistics": "hf_aegis.data.statistics",
    "load_vqa": "hf_aegis.data.vqa_sources",
    "record": "hf_aegis.data.libero_recorder",
    "save_statistics": "hf_aegis.data.statistics",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
