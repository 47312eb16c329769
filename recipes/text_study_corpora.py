"""The two corpora of the study on text, which every CPython carries: nothing is downloaded."""

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


END = "<eos>"
# A paragraph that is left over from a topic whose others are in a longer one is no document.
SHORTEST_DOCUMENT = 300


@dataclass(frozen=True)
class CorporaConfig:
    vocab_size: int
    context: int
    held_out_share: float
    modules: list[str]
    max_samples: int | None = None


def prose_documents() -> dict[str, str]:
    """
    The topics of Python's language reference. Some hold others word for word: each paragraph counts once, in the
    longest topic that has it, so that no two documents share any.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        own = {" ".join(paragraph.split()): paragraph for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n"))}
        new = [paragraph for words, paragraph in own.items() if words and words not in seen]
        seen.update(own)
        if len(text := "\n\n".join(new) + "\n") >= SHORTEST_DOCUMENT:
            documents[name] = text
    return documents


def code_documents(modules: Iterable[str]) -> dict[str, str]:
    """
    Raises:
        ValueError: If the standard library has no such file; it is named.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    if missing := [name for name in modules if not (folder / f"{name}.py").is_file()]:
        raise ValueError(f"corpora: modules: {folder} has no file {missing[0]}.py, expected modules of one file each")
    return {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in modules}


def split(documents: Mapping[str, str], held_out_share: float, seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """Documents to train on, and whole other ones that make up about that share of all characters."""
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    room = held_out_share * sum(map(len, documents.values()))
    held_out = []
    for name in order:
        if len(documents[name]) <= room:
            held_out.append(name)
            room -= len(documents[name])
    train = [name for name in documents if name not in held_out]
    if not train or not held_out:
        raise ValueError(f"held_out_share={held_out_share} leaves {len(train)} documents of {len(documents)} to train")
    return {name: documents[name] for name in train}, {name: documents[name] for name in held_out}


def fingerprint(documents: Mapping[str, str]) -> str:
    """SHA-256 of the documents, in the order of their names."""
    return hashlib.sha256(json.dumps(sorted(documents.items())).encode()).hexdigest()


def train_tokenizer(documents: Mapping[str, str], vocab_size: int) -> Any:
    """Byte-pair tokens of these documents; what has none of its own is spelt in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents.values(), trainer)
    return tokenizer


def windows(tokenizer: Any, documents: Mapping[str, str], context: int, max_samples: int | None) -> Tensor:
    """All documents in a row, each with an end token, cut into samples `(N, context)`; the rest is dropped."""
    end = tokenizer.token_to_id(END)
    tokens = [token for text in documents.values() for token in (*tokenizer.encode(text).ids, end)]
    count = len(tokens) // context
    if not count:
        raise ValueError(f"{len(tokens)} tokens do not fill a sample of context={context}")
    return torch.tensor(tokens[: count * context]).view(count, context)[:max_samples].contiguous()


def build_corpora(options: CorporaConfig, seed: int) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """Samples of `prose` and `code`, to train on and held out; what they were made of; and the tokenizer."""
    samples, about = {}, {}
    tokenizer = None
    for name, documents in (("prose", prose_documents()), ("code", code_documents(options.modules))):
        parts = split(documents, options.held_out_share, seed)
        tokenizer = tokenizer or train_tokenizer(parts[0], options.vocab_size)
        about[name] = {"sha256": fingerprint(documents)}
        for part, own in zip(("train", "held_out"), parts, strict=True):
            samples[f"{name}_{part}"] = cut = windows(tokenizer, own, options.context, options.max_samples)
            about[name][part] = {
                "documents": sorted(own),
                "characters": sum(map(len, own.values())),
                "tokens": cut.numel(),
            }
    return samples, about, tokenizer
