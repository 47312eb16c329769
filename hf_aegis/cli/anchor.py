"""`hf-aegis anchor`: collect the activation anchor of a vision-language model on questions about images."""

import argparse
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import yaml

from hf_aegis.atomic_files import write_text
from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.cli.device import resolve_device


if TYPE_CHECKING:
    from hf_aegis.data.vqa import VQASample

EMBEDDED = "embedded"
EASY_VQA = "easy-vqa"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class AnchorRecipe:
    """What `hf-aegis anchor` collects; each field is a key of the recipe and an option of the command line."""

    output_dir: str = _option("outputs/anchor", "folder for the anchor and the resolved recipe")
    model: str = _option(EMBEDDED, "'embedded', a folder, or a PaliGemma model on the Hub")
    revision: str | None = _option(None, "revision of the model on the Hub")
    attn_implementation: str = _option("eager", "attention implementation; training must use the same")
    dtype: Literal["float32", "bfloat16"] = _option("float32", "dtype of the weights")
    device: str = _option("auto", "torch device; 'auto' takes the GPU where there is one")
    dataset: str = _option(EASY_VQA, "'easy-vqa', or a dataset (Hub id or folder) that `datasets` can stream")
    split: str = _option("train", "split of the dataset; keep it apart from what you evaluate on")
    image_column: str = _option("image", "column with the image (streamed datasets)")
    question_column: str = _option("question", "column with the question (streamed datasets)")
    answer_column: str = _option("answer", "column with the answer, a string (streamed datasets)")
    num_samples: int = _option(3000, "number of samples")
    batch_size: int = _option(30, "samples per forward pass; part of the definition of moments='batch'")
    moments: Literal["batch", "pooled"] = _option(
        "batch", "'batch': the paper's average over batches; 'pooled': exact over all tokens"
    )
    tokens: Literal["all", "image", "text"] = _option("all", "which of the attended tokens count")
    seed: int = _option(
        0, "shuffles before num_samples are taken (streamed: from about the first 2 * num_samples of shuffled shards)"
    )

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


def configure(parser: CommandParser) -> None:
    """Makes the fields of [`AnchorRecipe`] the options."""
    parser.take_recipe(AnchorRecipe)


def run(arguments: argparse.Namespace) -> int:
    """
    Collects the anchor and writes it, with the resolved recipe, to the output folder.

    Raises:
        ValueError: if the data or the model's statistics are not usable.
        OSError: if a file or model cannot be read.
    """
    recipe: AnchorRecipe = arguments.recipe[0]

    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from hf_aegis.anchors import ActivationAnchor
    from hf_aegis.assets import EMBEDDED_VLM
    from hf_aegis.data.vqa import VQACollator

    # Registers the model with an action expert: its language model can be anchored as well.
    importlib.import_module("hf_aegis.models")
    source = str(EMBEDDED_VLM) if recipe.model == EMBEDDED else recipe.model
    device = resolve_device(recipe.device)
    model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(
        source,
        revision=recipe.revision,
        attn_implementation=recipe.attn_implementation,
        dtype=getattr(torch, recipe.dtype),
    )
    model.to(device)
    collate = VQACollator(AutoProcessor.from_pretrained(source, revision=recipe.revision))
    anchor = ActivationAnchor.collect(
        model,
        (collate(batch) for batch in _batches(recipe)),
        moments=recipe.moments,
        tokens=recipe.tokens,
        dataset_id=f"{recipe.dataset}:{recipe.split}",
        num_batches=-(-recipe.num_samples // recipe.batch_size),
    )
    if anchor.fingerprint.num_samples != recipe.num_samples:
        raise ValueError(
            f"{recipe.dataset}, split {recipe.split!r}, gave {anchor.fingerprint.num_samples} samples, "
            f"but num_samples is {recipe.num_samples}"
        )
    folder = anchor.save_pretrained(recipe.output_dir)
    write_text(folder / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
    print(f"{anchor}\nsaved to {folder}")
    return 0


def _batches(recipe: AnchorRecipe) -> Iterator[list["VQASample"]]:
    batch: list[VQASample] = []
    for sample in _samples(recipe):
        batch.append(sample)
        if len(batch) == recipe.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _samples(recipe: AnchorRecipe) -> Iterator["VQASample"]:
    if recipe.dataset == EASY_VQA:
        from hf_aegis.data.vqa import load_easy_vqa

        yield from load_easy_vqa(recipe.split, max_samples=recipe.num_samples, seed=recipe.seed)
        return

    from datasets import load_dataset

    stream = load_dataset(recipe.dataset, split=recipe.split, streaming=True)
    # Not a sample of the whole split: shards come in random order, and the rows are drawn from about the first
    # 2 · num_samples of that order. A larger buffer would download and hold that many more images before the first.
    shuffled = stream.shuffle(seed=recipe.seed, buffer_size=recipe.num_samples)
    for index, row in enumerate(shuffled.take(recipe.num_samples)):
        yield _to_sample(row, index, recipe)


def _to_sample(row: Mapping[str, Any], index: int, recipe: AnchorRecipe) -> "VQASample":
    from hf_aegis.data.vqa import VQASample

    name = f"{recipe.dataset}/{recipe.split}/{index} (shuffled)"
    for column in (recipe.image_column, recipe.question_column, recipe.answer_column):
        if row.get(column) is None:
            raise ValueError(f"{name}: no value in column {column!r}, found the columns {sorted(row)}")
    answer = row[recipe.answer_column]
    if not isinstance(answer, str):
        raise ValueError(f"{name}: column {recipe.answer_column!r} holds a {type(answer).__name__}, expected a string")
    image = row[recipe.image_column]
    # Sets of photographs such as COCO contain a few greyscale ones.
    return VQASample(image=image.convert("RGB"), question=row[recipe.question_column], answer=answer, name=name)
