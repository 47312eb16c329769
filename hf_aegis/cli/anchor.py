"""`hf-aegis anchor`: collect the activation anchor of a vision-language model on questions about images."""

import argparse
import dataclasses
import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    from hf_aegis.data.vqa import VQASample

logger = logging.getLogger(__name__)

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
    dtype: str = _option("float32", "dtype of the weights: float32 or bfloat16")
    device: str = _option("auto", "torch device; 'auto' takes the GPU where there is one")
    dataset: str = _option(EASY_VQA, "'easy-vqa', or a dataset (Hub id or folder) that `datasets` can stream")
    split: str = _option("train", "split of the dataset; keep it apart from what you evaluate on")
    image_column: str = _option("image", "column with the image (streamed datasets)")
    question_column: str = _option("question", "column with the question (streamed datasets)")
    answer_column: str = _option("answer", "column with the answer, a string (streamed datasets)")
    num_samples: int = _option(3000, "number of samples")
    batch_size: int = _option(30, "samples per forward pass; part of the definition of moments='batch'")
    moments: str = _option("batch", "'batch': the paper's average over batches; 'pooled': exact over all tokens")
    seed: int = _option(0, "shuffles the samples before the first num_samples are taken")

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name, choices in (("dtype", ("float32", "bfloat16")), ("moments", ("batch", "pooled"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, found {getattr(self, name)!r}")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and one option per field of [`AnchorRecipe`]."""
    parser.add_argument("--config", type=Path, help="recipe (YAML); options given on the command line win")
    for option in dataclasses.fields(AnchorRecipe):
        parser.add_argument(
            f"--{option.name}",
            type=int if option.type is int else str,
            help=f"{option.metadata['help']} (default: {option.default})",
        )


def run(arguments: argparse.Namespace) -> int:
    """
    Collects the anchor and writes it, with the resolved recipe, to the output folder.

    Raises:
        ValueError: if the recipe, the data or the model's statistics are not usable.
        OSError: if a file or model cannot be read.
    """
    recipe = resolve_recipe(arguments)

    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from hf_aegis.anchors import ActivationAnchor
    from hf_aegis.assets import EMBEDDED_VLM
    from hf_aegis.data.vqa import VQACollator

    # Registers the model with an action expert: its language model can be anchored as well.
    importlib.import_module("hf_aegis.models")
    source = str(EMBEDDED_VLM) if recipe.model == EMBEDDED else recipe.model
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        dataset_id=f"{recipe.dataset}:{recipe.split}",
        num_batches=-(-recipe.num_samples // recipe.batch_size),
    )
    if anchor.fingerprint.num_samples != recipe.num_samples:
        raise ValueError(
            f"{recipe.dataset}, split {recipe.split!r}, gave {anchor.fingerprint.num_samples} samples, "
            f"but num_samples is {recipe.num_samples}"
        )
    folder = anchor.save_pretrained(recipe.output_dir)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
    print(f"{anchor}\nsaved to {folder}")
    return 0


def resolve_recipe(arguments: argparse.Namespace) -> AnchorRecipe:
    """
    The recipe's file overridden by the command line.

    Raises:
        ValueError: if the file is not a mapping, or a key is unknown or has the wrong type; file and key are named.
    """
    known = {option.name: option for option in dataclasses.fields(AnchorRecipe)}
    values = {} if arguments.config is None else _read_yaml(arguments.config)
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{arguments.config}: unknown keys {unknown}, expected some of {sorted(known)}")
    for name, value in values.items():
        # A quoted number or an unquoted `yes` would otherwise surface far from here.
        optional = known[name].default is None
        expected = str if optional else type(known[name].default)
        if not (type(value) is expected or (optional and value is None)):
            raise ValueError(f"{arguments.config}: key {name!r} is {value!r}, expected {expected.__name__}")
    values.update({name: getattr(arguments, name) for name in known if getattr(arguments, name) is not None})
    return AnchorRecipe(**values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a mapping of options")
    return values


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
    # The buffer holds encoded images: as many as are drawn is a fair shuffle at a bounded cost.
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
