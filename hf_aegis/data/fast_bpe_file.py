"""Byte-pair encodings from `tokenizer.json`, checked before any native code sees them."""

import os
from typing import Any, TypeAlias

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_aegis.json_files import read_json_object, require_keys


_NONE = type(None)
_Kinds: TypeAlias = dict[str, type | tuple[type, ...]]
_MODEL: _Kinds = {
    "type": (str, _NONE),
    "vocab": dict,
    "merges": list,
    "dropout": (float, _NONE),
    "unk_token": (str, _NONE),
    "continuing_subword_prefix": (str, _NONE),
    "end_of_word_suffix": (str, _NONE),
    "fuse_unk": (bool, _NONE),
    "byte_fallback": (bool, _NONE),
    "ignore_merges": (bool, _NONE),
}
# What turns a text into another one, or its tokens: a coefficient would be lost or doubled.
_CHANGES = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_ADDED_TOKEN: _Kinds = {"id": int, "content": str, **dict.fromkeys(_FLAGS, (bool, _NONE))}


def read_bpe(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """
    The byte-level byte-pair encoding in a `tokenizer.json`, as [`train_bpe`] and the published FAST tokenizers have
    it.

    `tokenizers`' own parser trusts such files and ends the process for some damaged ones. Here the encoding is put
    together from what has been checked. Truncation and padding, which would change actions, are left out.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no byte-level byte-pair encoding, its ids are not `0 ... n - 1`, a merge is not of tokens
            or gives none, or it holds an option that would change actions; the file and the key are named.
    """
    where = os.fspath(path)
    values = read_json_object(path)
    require_keys(values, {"model": dict, "normalizer": _NONE, "added_tokens": (list, _NONE)}, where)
    vocab, merges = _vocab_and_merges(values["model"], f"{where}: model")
    splits = _byte_level(values, "pre_tokenizer", where)
    _byte_level(values, "decoder", where)

    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=bool(values["model"].get("ignore_merges"))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=splits.get("add_prefix_space", True), use_regex=splits.get("use_regex", True)
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for index, added in enumerate(values.get("added_tokens") or ()):
        _add_token(tokenizer, added, f"{where}: added_tokens: {index}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _vocab_and_merges(model: dict[str, Any], where: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    require_keys(model, _MODEL, where)
    if model.get("type") not in (None, "BPE"):
        raise ValueError(f"{where}: key 'type' is {model['type']!r}, expected 'BPE'")
    if changing := [key for key in _CHANGES if model.get(key)]:
        raise ValueError(f"{where}: key {changing[0]!r} is {model[changing[0]]!r}: it would change actions")
    vocab = model["vocab"]
    if any(type(index) is not int for index in vocab.values()) or sorted(vocab.values()) != [*range(len(vocab))]:
        raise ValueError(f"{where}: vocab: ids of the {len(vocab)} tokens are not 0 to {len(vocab) - 1}, each once")
    if not vocab or "" in vocab:
        raise ValueError(f"{where}: vocab: it is empty or holds an empty token")
    merges = [_pair(merge, f"{where}: merges: {index}") for index, merge in enumerate(model["merges"])]
    for index, (first, second) in enumerate(merges):
        if missing := [token for token in (first, second, first + second) if token not in vocab]:
            raise ValueError(f"{where}: merges: {index}: {missing[0][:80]!r} is not in the vocabulary")
    return vocab, merges


def _pair(merge: Any, where: str) -> tuple[str, str]:
    # "a b" until 2024, ["a", "b"] since then.
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"{where}: expected two tokens, found {str(merge)[:80]!r}")
    return parts[0], parts[1]


def _byte_level(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    part: dict[str, Any] = require_keys(
        require_keys(values, {key: dict}, where)[key],
        {"type": str, "add_prefix_space": (bool, _NONE), "use_regex": (bool, _NONE)},
        f"{where}: {key}",
    )
    if part["type"] != "ByteLevel":
        raise ValueError(f"{where}: {key}: key 'type' is {part['type'][:80]!r}, expected 'ByteLevel'")
    return {name: value for name, value in part.items() if value is not None}


def _add_token(tokenizer: Tokenizer, added: Any, where: str) -> None:
    require_keys(added, _ADDED_TOKEN, where)
    flags = {name: added[name] for name in _FLAGS if added.get(name) is not None}
    tokenizer.add_tokens([AddedToken(added["content"], **flags)])
    if (found := tokenizer.token_to_id(added["content"])) != added["id"]:
        raise ValueError(f"{where}: key 'id' is {added['id']}, but the token's place gives it {found}")
