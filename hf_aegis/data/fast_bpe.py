"""The byte-pair encoding inside a FAST tokenizer: its alphabet, its training, and codes to tokens and back."""

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


# The next code points are surrogates, which are no characters.
LAST_CODE = 0xD7FF


class FASTDecodeError(ValueError):
    """A sequence of tokens is no chunk of actions."""


class CoefficientEncoding:
    """
    Quantised coefficients, shifted to `0 ... last_code` and written as characters, as byte-pair tokens.

    Args:
        bpe_tokenizer (`PreTrainedTokenizerFast`): over these characters.
        last_code (`int`): the highest that is allowed.
    """

    def __init__(self, bpe_tokenizer: PreTrainedTokenizerFast, last_code: int):
        self.bpe_tokenizer, self.last_code = bpe_tokenizer, last_code
        self._known: dict[int, bool] = {}

    def nearest(self, codes: np.ndarray) -> np.ndarray:
        """For each of `codes` (integers of any dtype and shape) the nearest that is allowed and can be encoded."""
        present = np.unique(codes)
        return np.array([self._nearest(code) for code in present])[np.searchsorted(present, codes)]

    def encode(self, codes: np.ndarray) -> list[list[int]]:
        """Tokens of each row of `codes`, integers of shape `(B, N)` that can be encoded."""
        texts = ["".join(map(chr, row)) for row in codes]
        return [
            encoding.ids
            for encoding in self.bpe_tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        ]

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """
        Inverse of `encode` for one row.

        Raises:
            FASTDecodeError: a token is unknown, or the bytes of the tokens are no allowed characters.
        """
        count = len(self.bpe_tokenizer)
        tokens = [int(token) for token in tokens]
        for token in tokens:
            if not 0 <= token < count:
                raise FASTDecodeError(f"{token} is not one of the {count} FAST tokens")
        codes = np.array([ord(character) for character in self._text(tokens)], dtype=np.int64)
        # Bytes that are no UTF-8 come out as U+FFFD, which is beyond any range.
        if (codes > self.last_code).any():
            raise FASTDecodeError(
                f"the tokens hold what is no coefficient in the range of {self.last_code + 1} values"
            )
        return codes

    def _nearest(self, code: float) -> int:
        inside = int(min(max(code, 0), self.last_code))
        for distance in range(self.last_code + 1):
            for candidate in (inside - distance, inside + distance):
                if 0 <= candidate <= self.last_code and self._has_letters(candidate):
                    return candidate
        raise ValueError("the byte-pair encoding of this FAST tokenizer can encode no coefficient at all")

    def _has_letters(self, code: int) -> bool:
        # Asked, not computed: published alphabets lack letters that their data did not show.
        if code not in self._known:
            ids = self.bpe_tokenizer.backend_tokenizer.encode(chr(code), add_special_tokens=False).ids
            self._known[code] = bool(ids) and self._text(ids) == chr(code)
        return self._known[code]

    def _text(self, tokens: list[int]) -> str:
        # Published files ask for a clean-up of spaces, which would drop coefficients.
        return str(self.bpe_tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def train_bpe(texts: Iterable[str], last_code: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level byte-pair encoding on quantised coefficients written as characters.

    The alphabet holds the UTF-8 bytes of every character up to `last_code`, whether the texts contain it or not, so
    that whatever lies in the fitted range can be encoded. It never has more than 256 letters.

    Args:
        texts (`Iterable[str]`): one per chunk.
        last_code (`int`): highest code point, at most `LAST_CODE`.
        vocab_size (`int`): most tokens to learn, letters included. Few data may give fewer.

    Raises:
        ValueError: `last_code` is out of range, or `vocab_size` is smaller than the alphabet.
    """
    if not 0 <= last_code <= LAST_CODE:
        raise ValueError(f"coefficients span {last_code + 1} values, more than the {LAST_CODE + 1} there are room for")
    # Published tokenizers also split at the borders of English words, which mean nothing between coefficients.
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    every_character = "".join(map(chr, range(last_code + 1)))
    alphabet = sorted(set(bytes_of.pre_tokenize_str(every_character)[0][0]))
    if vocab_size < len(alphabet):
        raise ValueError(
            f"vocab_size {vocab_size} is smaller than the alphabet of {len(alphabet)} letters, which the "
            f"{last_code + 1} values from the smallest to the largest coefficient need: raise vocab_size, "
            "lower scale, or normalise the actions to [-1, 1]"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = bytes_of
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=alphabet,
        max_token_length=10_000,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
