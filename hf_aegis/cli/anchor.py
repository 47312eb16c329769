"""
`hf-aegis anchor`: collect the activation anchor of a vision-language model, on questions about images or, to measure
how far statistics drift on the robot's own inputs, on demonstrations.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from hf_aegis.atomic_files import write_text
from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.cli.data_licenses import known_license
from hf_aegis.cli.device import resolve_device
from hf_aegis.cli.torchrun import is_main_process, torchrun_processes


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
    from hf_aegis.data.vqa import VQASample

EMBEDDED = "embedded"
DEMONSTRATIONS = "demonstrations"

# Where in the output folder a collection keeps what it has so far, until it is done.
PARTIAL = "partial"

# What does not matter to what is collected.
_IRRELEVANT = ("output_dir", "device", "num_workers", "save_batches")

# Fields about what is pushed, as they are where nothing is.
_UNPUBLISHED: dict[str, Any] = {
    "push_to_hub": None,
    "private": False,
    "hub_revision": None,
    "create_pr": False,
    "dataset_license": None,
}


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
    dataset: str = _option(
        "easy-vqa",
        "'easy-vqa', a Hub id, or a folder, as of `hf-aegis eval-vqa`; or what a robot sees and is told: a LIBERO "
        "HDF5 file, or 'demonstrations' for the embedded ones",
    )
    split: str = _option("train", "split of the dataset; keep it apart from what you evaluate on")
    image_column: str | None = _option(None, "column with the image (default: as common mirrors call it)")
    question_column: str | None = _option(None, "column with the question (default: as common mirrors call it)")
    answer_column: str | None = _option(None, "column with the answer, a string (default: as common mirrors call it)")
    num_samples: int = _option(3000, "number of samples")
    batch_size: int = _option(30, "samples per forward pass; part of the definition of moments='batch'")
    moments: Literal["batch", "pooled"] = _option(
        "batch", "'batch': the paper's average over batches; 'pooled': exact over all tokens"
    )
    tokens: Literal["all", "image", "text"] = _option("all", "which of the attended tokens count")
    subspaces: bool = _option(False, "collect the principal subspaces of linear layers' inputs as well")
    subspace_energy: float = _option(0.999, "share of the inputs' energy that their directions hold")
    subspace_min_rank: int = _option(1, "fewest directions per input, whatever their energy")
    subspace_max_rank: int = _option(512, "most directions per input, whatever their energy")
    subspace_exact_width: int = _option(4096, "widest input whose second moments are summed in full, not sketched")
    subspace_modules: list[str] = field(
        default_factory=lambda: ["multi_modal_projector"],
        metadata={"help": "modules outside of the decoder layers whose linear layers count too, by end of path"},
    )
    subspace_dtype: Literal["float32", "bfloat16"] = _option("float32", "dtype that the directions are kept in")
    sensitivity: bool = _option(
        False, "collect how sensitive the answers are to pairs of directions of the weights as well; needs subspaces"
    )
    sensitivity_temperature: float = _option(4.0, "temperature of the predictions that this is about")
    max_output_rank: int = _option(512, "most output directions per linear layer that this is for")
    num_workers: int = _option(0, "processes, per model, that prepare batches while it runs")
    save_batches: int = _option(
        20, "how many batches lie between two saves of what was collected, from which a killed collection goes on"
    )
    push_to_hub: str | None = _option(None, "data set on the Hub, as org/name, that the anchor is pushed to as well")
    private: bool = _option(False, "make that data set a private one")
    hub_revision: str | None = _option(None, "branch of it to push to; made where it is missing")
    create_pr: bool = _option(False, "open a pull request there in the place of a commit")
    dataset_license: str | None = _option(
        None, "licence of the data, for the card, by the Hub's name for it; that of easy-vqa is known"
    )
    seed: int = _option(
        0, "shuffles before num_samples are taken (streamed: from about the first 2 * num_samples of shuffled shards)"
    )

    def __post_init__(self) -> None:
        ranks = ("subspace_min_rank", "subspace_max_rank", "max_output_rank")
        for name, lowest in {
            **dict.fromkeys(("num_samples", "batch_size", *ranks, "save_batches"), 1),
            "num_workers": 0,
        }.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, found {getattr(self, name)}")
        if self.subspace_min_rank > self.subspace_max_rank:
            raise ValueError(
                f"subspace_min_rank must not exceed subspace_max_rank, found {self.subspace_min_rank} and "
                f"{self.subspace_max_rank}"
            )
        if self.subspace_exact_width < 0:
            raise ValueError(f"subspace_exact_width must not be negative, found {self.subspace_exact_width}")
        if not 0 < self.subspace_energy <= 1:
            raise ValueError(f"subspace_energy must be above 0 and at most 1, found {self.subspace_energy}")
        if not 0 < self.sensitivity_temperature < float("inf"):
            raise ValueError(
                f"sensitivity_temperature must be above 0 and finite, found {self.sensitivity_temperature}"
            )
        if self.push_to_hub is None:
            for name in _UNPUBLISHED:
                if getattr(self, name):
                    raise ValueError(f"{name} is about what push_to_hub names, which is not set")
        if self.sensitivity and not self.subspaces:
            raise ValueError("sensitivity needs the subspaces that its pairs are of: set subspaces to true as well")


def configure(parser: CommandParser) -> None:
    """Makes the fields of [`AnchorRecipe`] the options."""
    parser.take_recipe(AnchorRecipe)


def run(arguments: argparse.Namespace) -> int:
    """
    Collects the anchor and writes it, with the resolved recipe, to the output folder; and pushes it, where that is
    asked for. Under `torchrun`, each process collects from its share of the batches, and the first one does the rest.

    Raises:
        ValueError: if the data or the model's statistics are not usable, or an interrupted collection in the output
            folder had other settings.
        OSError: if a file or model cannot be read, or the anchor cannot be pushed.
    """
    recipe: AnchorRecipe = arguments.recipe[0]
    with torchrun_processes() as process_group:
        if recipe.push_to_hub is not None and is_main_process(process_group):
            _check_repository(recipe)
        anchor = _collect(recipe, process_group)
        if is_main_process(process_group):
            _publish(recipe, anchor)
    return 0


def _check_repository(recipe: AnchorRecipe) -> None:
    """A wrong option should not cost the loading of a large model first."""
    from hf_aegis.hub import ensure_repo

    assert recipe.push_to_hub is not None
    ensure_repo(
        recipe.push_to_hub,
        repo_type="dataset",
        private=recipe.private or None,
        revision=recipe.hub_revision,
        create_pr=recipe.create_pr,
    )


def _collect(recipe: AnchorRecipe, process_group: "ProcessGroup | None") -> "ActivationAnchor":
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from hf_aegis.anchors import ActivationAnchor, SampleBatches, Share
    from hf_aegis.assets import EMBEDDED_VLM

    # Its package registers the model with an action expert, whose language model can be anchored as well.
    from hf_aegis.models.vlm_exchange import located_commit

    source = str(EMBEDDED_VLM) if recipe.model == EMBEDDED else recipe.model
    # All of one commit, which the anchor records.
    commit = located_commit(source, revision=recipe.revision)
    revision = commit or recipe.revision
    processor = AutoProcessor.from_pretrained(source, revision=revision)
    samples, collate = _demonstrations(recipe, processor) if _of_robots(recipe) else _questions(recipe, processor)
    device = resolve_device(recipe.device)
    batches = SampleBatches(
        samples,
        recipe.batch_size,
        collate,
        share=Share.of(process_group),
        num_workers=recipe.num_workers,
        pin_memory=device.startswith("cuda"),
    )
    model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(
        source,
        revision=revision,
        attn_implementation=recipe.attn_implementation,
        dtype=getattr(torch, recipe.dtype),
        use_safetensors=True,
    )
    model.to(device)
    fields = dataclasses.asdict(recipe)
    return ActivationAnchor.collect(
        model,
        batches,
        moments=recipe.moments,
        tokens=recipe.tokens,
        subspaces=subspace_options(recipe),
        revision=commit,
        dataset_id=f"{_portable(recipe.dataset)}:{recipe.split}",
        num_batches=len(batches),
        process_group=process_group,
        partial_folder=Path(recipe.output_dir) / PARTIAL,
        save_batches=recipe.save_batches,
        settings={name: value for name, value in fields.items() if name not in (*_IRRELEVANT, *_UNPUBLISHED)},
    )


def _publish(recipe: AnchorRecipe, anchor: "ActivationAnchor") -> None:
    """Writes an anchor, and pushes it where the recipe says so."""
    from hf_aegis.anchors.publication import push_anchor

    folder = anchor.save_pretrained(recipe.output_dir)
    # To repeat a collection is not to publish it again.
    repeating = dataclasses.replace(recipe, **_UNPUBLISHED)
    write_text(folder / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(repeating), sort_keys=False))
    shutil.rmtree(folder / PARTIAL)
    print(f"{anchor}\nsaved to {folder}")
    if recipe.push_to_hub is not None:
        commit = push_anchor(
            anchor,
            folder,
            recipe.push_to_hub,
            private=recipe.private or None,
            revision=recipe.hub_revision,
            create_pr=recipe.create_pr,
            dataset_license=recipe.dataset_license or known_license(recipe.dataset),
        )
        print(f"pushed: {commit.pr_url or commit.commit_url}")


def subspace_options(recipe: AnchorRecipe) -> "SubspaceOptions | None":
    """How a recipe has subspaces collected, if it does."""
    from hf_aegis.anchors import SubspaceOptions

    if not recipe.subspaces:
        return None
    return SubspaceOptions(
        energy=recipe.subspace_energy,
        min_rank=recipe.subspace_min_rank,
        max_rank=recipe.subspace_max_rank,
        exact_width=recipe.subspace_exact_width,
        modules=tuple(recipe.subspace_modules),
        dtype=recipe.subspace_dtype,
        sensitivity=recipe.sensitivity,
        temperature=recipe.sensitivity_temperature,
        max_output_rank=recipe.max_output_rank,
    )


def _portable(dataset: str) -> str:
    """A path on this machine means nothing elsewhere; its name is what a reader can recognise."""
    return Path(dataset).resolve().name if Path(dataset).exists() else dataset


def _of_robots(recipe: AnchorRecipe) -> bool:
    return recipe.dataset == DEMONSTRATIONS or recipe.dataset.endswith(".hdf5")


def _questions(recipe: AnchorRecipe, processor: Any) -> tuple[Sequence["VQASample"], Callable[[list[Any]], Any]]:
    from hf_aegis.data.vqa import VQACollator
    from hf_aegis.data.vqa_sources import load_vqa

    columns = {
        field: column
        for field in ("image", "question", "answer")
        if (column := getattr(recipe, f"{field}_column")) is not None
    }
    samples = load_vqa(recipe.dataset, recipe.split, recipe.num_samples, recipe.seed, columns=columns or None)
    _check_number(recipe, len(samples))
    return samples, VQACollator(processor)


def _demonstrations(recipe: AnchorRecipe, processor: Any) -> tuple[Sequence[Any], Callable[[list[Any]], Any]]:
    import torch
    from torch.utils.data import Subset

    from hf_aegis import assets
    from hf_aegis.data import LiberoDataset
    from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowProcessor

    path = assets.DEMONSTRATIONS if recipe.dataset == DEMONSTRATIONS else recipe.dataset
    dataset = LiberoDataset(path, chunk_size=1, split=recipe.split)
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(dataset), generator=generator)[: recipe.num_samples].tolist()
    _check_number(recipe, len(chosen))
    collate = PaliGemmaFlowCollator(
        PaliGemmaFlowProcessor.from_vlm_processor(processor, statistics=dataset.statistics, cameras=dataset.cameras)
    )

    def prefix(items: list[Any]) -> dict[str, torch.Tensor]:
        batch = collate(items)
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name] for name in names} | {"pixel_values": batch["pixel_values"].flatten(0, 1)}

    return Subset(dataset, chosen), prefix  # type: ignore[return-value]


def _check_number(recipe: AnchorRecipe, found: int) -> None:
    if found != recipe.num_samples:
        raise ValueError(
            f"{recipe.dataset}, split {recipe.split!r}, gave {found} samples, but num_samples is {recipe.num_samples}"
        )
