"""Models, loaded when they are first asked."""

import threading
from typing import Any, NamedTuple

import torch
from settings import ShownModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_aegis.models  # noqa: F401 (registers the models with an action expert)
from hf_aegis.hub import redacted


class Loaded(NamedTuple):
    """A model in evaluation mode, and its processor."""

    model: Any
    processor: Any


class ModelUnavailableError(Exception):
    """A model cannot be loaded; the text is for visitors and names no path."""


_loaded: dict[str, Loaded] = {}
_loading = threading.Lock()


def load(shown: ShownModel) -> Loaded:
    """
    The model behind a column of the page; the first call loads it.

    Raises:
        ModelUnavailableError: there is no such model, or it is not what the column needs.
    """
    with _loading:
        if shown.source not in _loaded:
            _loaded[shown.source] = _load(shown)
        return _loaded[shown.source]


def _load(shown: ShownModel) -> Loaded:
    on_gpu = torch.cuda.is_available()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            shown.source,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            attn_implementation="eager",
            # No pickles of whoever owns the repository.
            use_safetensors=True,
        )
        processor = AutoProcessor.from_pretrained(shown.source)
    except (OSError, ValueError) as error:
        # The reason, which may name folders and accounts, is for the log alone.
        print(f"{shown.label}: {shown.source} cannot be loaded: {redacted(str(error))}", flush=True)
        raise ModelUnavailableError(f"The model “{shown.label}” cannot be loaded at the moment.") from error
    if shown.acts and not hasattr(model, "sample_actions"):
        raise ModelUnavailableError(f"The model “{shown.label}” is a plain vision-language model and cannot act.")
    return Loaded(model.eval().to("cuda" if on_gpu else "cpu"), processor)
