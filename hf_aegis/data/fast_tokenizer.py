"""FAST: chunks of actions as short sequences of discrete tokens (arXiv 2501.09747)."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE
from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import cached_file

from hf_aegis.atomic_files import write_text
from hf_aegis.data.fast_bpe import LAST_CODE, CoefficientEncoding, FASTDecodeError, train_bpe
from hf_aegis.data.fast_bpe_file import read_bpe
from hf_aegis.format_version import FORMAT_KEY, check_format_version, written_version
from hf_aegis.functional.cosine_transform import dct, inverse_dct
from hf_aegis.json_files import read_json_object


logger = logging.getLogger(__name__)

_KIND = "FAST tokenizer"
_LOCATION = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# PaliGemma's <seg> tokens, the last of its vocabulary, are left alone, as in openpi.
SEGMENTATION_TOKENS = 128


class FASTTokenizer(ProcessorMixin):
    """
    Turns chunks of normalised actions into tokens and back.

    A type-II orthonormal cosine transform over time, `round(scale · coefficient)`, flattened row by row (frequency,
    then dimension), shifted by `min_token` so that every integer is a character, and byte-pair encoding of the text
    (arXiv 2501.09747). The call signature and the files are those of the published `UniversalActionProcessor`
    (https://huggingface.co/physical-intelligence/fast), whose files load here without remote code. Other than there,

    - what cannot be decoded becomes NaN and is counted, never a chunk of zeros, which a robot would execute;
    - what cannot be encoded is clipped and counted, never left out;
    - the alphabet covers every coefficient between the smallest and the largest of the data it was fitted to;
    - `decode` does not change the horizon and dimension given to the constructor.

    A chunk within the fitted range comes back with an error of at most `0.5 / scale` per coefficient, so of at most
    `0.5 √H / scale` in the Euclidean norm over time of each dimension: the transform is orthonormal.

    Args:
        bpe_tokenizer (`PreTrainedTokenizerFast`): over characters `chr(round(scale · coefficient) - min_token)`.
        scale (`float`, *optional*, defaults to 10): quantisation steps per unit of a coefficient.
        vocab_size (`int`, *optional*, defaults to 1024): what the encoding was trained for; it may have fewer tokens.
        min_token (`int`, *optional*, defaults to 0): smallest quantised coefficient.
        action_dim (`int`, *optional*): `A`; chunks of another are refused.
        time_horizon (`int`, *optional*): `H`; chunks of another are refused.
        max_token (`int`, *optional*): largest quantised coefficient. Published tokenizers do not tell theirs.
        vlm_vocab_size (`int`, *optional*):
            Size of the vision-language model's vocabulary, its <seg> tokens being the last; see `to_vlm_ids`.

    Attributes:
        num_tokens (`int`): tokens that there are; ids are below it.
        decoded_chunks, decode_failures (`int`): chunks given to `decode`, and how many of them came out as NaN.
        clipped_values (`int`): coefficients that did not fit into the range.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    bpe_tokenizer: PreTrainedTokenizerFast

    def __init__(
        self,
        bpe_tokenizer: PreTrainedTokenizerFast,
        scale: float = 10,
        vocab_size: int = 1024,
        min_token: int = 0,
        # No keyword-only arguments: transformers leaves them out when it loads.
        action_dim: int | None = None,
        time_horizon: int | None = None,
        max_token: int | None = None,
        vlm_vocab_size: int | None = None,
    ):
        super().__init__(bpe_tokenizer)
        if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a positive number, found {scale!r}")
        _require_integer("min_token", min_token)
        for name, value, least in (
            ("vocab_size", vocab_size, 1),
            ("action_dim", action_dim, 1),
            ("time_horizon", time_horizon, 1),
            ("max_token", max_token, min_token),
            ("vlm_vocab_size", vlm_vocab_size, SEGMENTATION_TOKENS + 1),
        ):
            if value is not None:
                _require_integer(name, value, least)
        self.scale, self.vocab_size = scale, vocab_size
        self.min_token, self.max_token = min_token, max_token
        self.action_dim, self.time_horizon = action_dim, time_horizon
        self.vlm_vocab_size = vlm_vocab_size
        self.decoded_chunks = self.decode_failures = self.clipped_values = 0
        last_code = LAST_CODE if max_token is None else min(max_token - min_token, LAST_CODE)
        self._encoding = CoefficientEncoding(bpe_tokenizer, last_code)
        self._called_shape: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.bpe_tokenizer)

    @classmethod
    def fit(
        cls,
        action_data: Sequence[np.ndarray],
        scale: float = 10,
        vocab_size: int = 1024,
        *,
        time_horizon: int | None = None,
        action_dim: int | None = None,
    ) -> Self:
        """
        Trains a tokenizer on chunks of actions. The same chunks give the same tokenizer.

        Args:
            action_data (`Sequence[np.ndarray]`): chunks of shape `(H, A)`, normalised to [-1, 1].
            scale (`float`, *optional*, defaults to 10): see the class.
            vocab_size (`int`, *optional*, defaults to 1024): most tokens to learn.
            time_horizon, action_dim (`int`, *optional*): see the class; what the chunks have in common by default.

        Raises:
            ValueError: there are no chunks, one is not a finite matrix or contradicts `time_horizon` or `action_dim`,
                or `vocab_size` is smaller than the alphabet.
        """
        chunks = [_as_chunks(chunk, f"chunk {index}", ndims=(2,))[0] for index, chunk in enumerate(action_data)]
        if not chunks:
            raise ValueError("there are no chunks of actions to fit a FAST tokenizer to")
        shape = []
        for axis, name, given in ((0, "time_horizon", time_horizon), (1, "action_dim", action_dim)):
            found = sorted({chunk.shape[axis] for chunk in chunks})
            if given is not None and found != [given]:
                raise ValueError(f"{name} is {given}, but there are chunks with {', '.join(map(str, found))}")
            shape.append(found[0] if len(found) == 1 else None)
        quantised = [np.rint(dct(chunk) * scale).ravel() for chunk in chunks]
        low = int(min(values.min() for values in quantised))
        high = int(max(values.max() for values in quantised))
        texts = ("".join(map(chr, (values - low).astype(np.int64))) for values in quantised)
        bpe = train_bpe(texts, high - low, vocab_size)
        return cls(bpe, scale, vocab_size, low, time_horizon=shape[0], action_dim=shape[1], max_token=high)

    def __call__(
        self, action_chunk: np.ndarray, *, out_of_range: Literal["clip", "error"] = "clip"
    ) -> list[list[int]]:
        """
        Args:
            action_chunk (array of shape `(H, A)` or `(B, H, A)`): normalised to [-1, 1].
            out_of_range (`"clip"` or `"error"`, *optional*, defaults to `"clip"`):
                What becomes of a coefficient outside the fitted range, or that the encoding has no letters for: the
                nearest one that it has, counted in `clipped_values` and logged the first time, or an error.

        Returns:
            `list[list[int]]`: the tokens of each of the `B` chunks.

        Raises:
            ValueError: the array is empty, not of this shape, not finite, or, on request, out of range.
        """
        if out_of_range not in ("clip", "error"):
            raise ValueError(f"out_of_range must be 'clip' or 'error', found {out_of_range!r}")
        chunks = _as_chunks(action_chunk, "`action_chunk`", ndims=(2, 3))
        for name, expected, found in zip(
            ("time_horizon", "action_dim"), (self.time_horizon, self.action_dim), chunks.shape[1:], strict=True
        ):
            if expected not in (None, found):
                raise ValueError(f"chunks of shape {chunks.shape[1:]} do not fit this tokenizer's {name} {expected}")
        self._called_shape = chunks.shape[1:]
        quantised = np.rint(dct(chunks) * self.scale)
        codes = self._encoding.nearest(quantised - self.min_token)
        self._report_clipping(quantised, codes + self.min_token, out_of_range)
        return self._encoding.encode(codes.reshape(len(codes), -1))

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        time_horizon: int | None = None,
        action_dim: int | None = None,
        on_error: Literal["nan", "raise"] = "nan",
    ) -> np.ndarray:
        """
        Args:
            tokens (`Sequence[Sequence[int]]`): of each of `B` chunks.
            time_horizon, action_dim (`int`, *optional*):
                Shape of a chunk; the constructor's, else that of the latest call, when not given.
            on_error (`"nan"` or `"raise"`, *optional*, defaults to `"nan"`):
                What becomes of tokens that are no chunk: NaN throughout, counted in `decode_failures` and logged, or
                an error.

        Returns:
            `np.ndarray` of shape `(B, H, A)`, float64, normalised.

        Raises:
            ValueError: the shape of a chunk is not known, or an argument is not allowed.
            FASTDecodeError: with `on_error="raise"`: a token is unknown, the tokens give another number of
                coefficients than `H · A`, or something that is no coefficient in the fitted range.
        """
        if on_error not in ("nan", "raise"):
            raise ValueError(f"on_error must be 'nan' or 'raise', found {on_error!r}")
        called = self._called_shape or (None, None)
        horizon, dimension = time_horizon or self.time_horizon or called[0], action_dim or self.action_dim or called[1]
        if horizon is None or dimension is None:
            raise ValueError("the shape of a chunk is not known: give `time_horizon` and `action_dim`")
        coefficients = np.full((len(tokens), horizon, dimension), np.nan)
        reasons = []
        for index, chunk in enumerate(tokens):
            self.decoded_chunks += 1
            try:
                codes = self._encoding.decode(chunk)
                if len(codes) != horizon * dimension:
                    counts = f"{len(chunk)} tokens give {len(codes)} coefficients"
                    raise FASTDecodeError(f"{counts}, expected {horizon} x {dimension}")
            except FASTDecodeError as error:
                self.decode_failures += 1
                if on_error == "raise":
                    raise FASTDecodeError(f"chunk {index}: {error}") from None
                reasons.append(f"chunk {index}: {error}")
            else:
                coefficients[index] = codes.reshape(horizon, dimension) + self.min_token
        if reasons:
            logger.warning(
                "%d of %d chunks of FAST tokens cannot be decoded and are NaN; first %s",
                len(reasons),
                len(tokens),
                reasons[0],
            )
        return inverse_dct(coefficients / self.scale)

    def to_vlm_ids(self, tokens: Sequence[int]) -> list[int]:
        """
        Ids in the vision-language model's vocabulary: token `t` is `vlm_vocab_size - 1 - 128 - t`, from PaliGemma's
        last <loc> token downwards, as in openpi.

        Raises:
            ValueError: `vlm_vocab_size` is not known, or a token is not one of this tokenizer's.
        """
        highest = self._highest_vlm_id()
        for token in tokens:
            if not 0 <= token < self.num_tokens:
                raise ValueError(f"{token} is not one of the {self.num_tokens} FAST tokens")
        return [highest - int(token) for token in tokens]

    def from_vlm_ids(self, ids: Sequence[int]) -> list[int]:
        """
        Inverse of `to_vlm_ids`. Ids that are no FAST token, as a model may generate, give numbers outside
        `range(num_tokens)`, which `decode` counts as failures.

        Raises:
            ValueError: `vlm_vocab_size` is not known.
        """
        highest = self._highest_vlm_id()
        return [highest - int(index) for index in ids]

    def vlm_ids(self) -> range:
        """The ids that `to_vlm_ids` may return, ascending; a `ValueError` when `vlm_vocab_size` is not known."""
        highest = self._highest_vlm_id()
        return range(highest - self.num_tokens + 1, highest + 1)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the files of the published tokenizer: `tokenizer.json` and its configuration beside
        `processor_config.json`. Further arguments are those of `push_to_hub`, which is off unless asked for."""
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name} | kwargs)
        self.bpe_tokenizer.save_pretrained(save_directory)
        write_text(Path(save_directory, PROCESSOR_NAME), self.to_json_string())

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs: Any) -> tuple[dict, dict]:
        """The contents of `processor_config.json`; a `ValueError` where it does not describe a FAST tokenizer."""
        place = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "", PROCESSOR_NAME)
        if os.path.isfile(place):
            read_json_object(place, finite=False)  # transformers' own errors of what is no JSON are many
        values, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if missing := [key for key in ("scale", "vocab_size", "min_token") if key not in values]:
            raise ValueError(f"{place}: not a FAST tokenizer: no {', '.join(missing)}")
        check_format_version(values, _KIND, place)
        values.pop(FORMAT_KEY, None)
        return values, kwargs

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Of what files hold, the last part of loading; a `ValueError` names the file that has a wrong value."""
        try:
            return super().from_args_and_dict(args, processor_dict, **kwargs)
        except ValueError as error:
            raise ValueError(f"{PROCESSOR_NAME}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The processor's configuration as JSON-ready values."""
        return super().to_dict() | written_version(_KIND)

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type, pretrained_model_name_or_path, subfolder="", **kwargs
    ):
        # Beside processor_config.json, where published tokenizers have it; transformers would look a folder deeper.
        place = {key: value for key, value in kwargs.items() if key in _LOCATION}
        file = cached_file(pretrained_model_name_or_path, FULL_TOKENIZER_FILE, subfolder=subfolder, **place)
        assert file is not None  # It raises where there is none.
        return read_bpe(file)

    def _report_clipping(self, wanted: np.ndarray, fitting: np.ndarray, out_of_range: str) -> None:
        changed = wanted != fitting
        if not changed.any():
            return
        index = tuple(np.argwhere(changed)[0].tolist())
        upper = "upwards" if self.max_token is None else f"to {self.max_token}"
        found = (
            f"the coefficient {wanted[index]:.0f} at {list(index)} (chunk, frequency, dimension) cannot be encoded: "
            f"this tokenizer's range is {self.min_token} {upper}, the nearest in it {fitting[index]}"
        )
        if out_of_range == "error":
            raise ValueError(found)
        if not self.clipped_values:
            logger.warning("%s; it is clipped, and so will be others, counted in `clipped_values`", found)
        self.clipped_values += int(changed.sum())

    def _highest_vlm_id(self) -> int:
        if self.vlm_vocab_size is None:
            raise ValueError(
                "this FAST tokenizer does not know the vision-language model's vocabulary: give it to "
                "PaliGemmaFlowProcessor.from_vlm_processor(..., action_tokenizer=...), or set `vlm_vocab_size`"
            )
        return self.vlm_vocab_size - 1 - SEGMENTATION_TOKENS


def _as_chunks(values: Any, name: str, ndims: tuple[int, ...]) -> np.ndarray:
    """Checked, float64, of shape `(B, H, A)`."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()
    array = np.asarray(values)
    if array.ndim not in ndims or 0 in array.shape or array.dtype.kind not in "fiu":
        shapes = " or ".join({2: "(H, A)", 3: "(B, H, A)"}[ndim] for ndim in ndims)
        raise ValueError(
            f"{name} must be a non-empty array of numbers of shape {shapes}, "
            f"found {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} holds NaN or infinity, first at index {np.argwhere(~np.isfinite(array))[0].tolist()}"
        )
    return array[None] if array.ndim == 2 else array


def _require_integer(name: str, value: Any, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be an integer{bound}, found {value!r}")
