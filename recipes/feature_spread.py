"""
Over how many directions policies spread what they see of the held-out demonstrations.

    python recipes/feature_spread.py outputs/study_embedded/runs/naive/seed_0 outputs/study_embedded/runs/aegis/seed_0

An observation's features are the language model's last hidden states at the image tokens, computed in float32; the
expert reads them, and those of the instruction's tokens. Of the features' covariance over observations, with
eigenvalues λ, the participation ratio (Σ λ)² / Σ λ² is a number of directions: 1 where all observations lie on a line,
and the number of dimensions where they fill a ball. The first row is the embedded model before training.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.data import LiberoDataset
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training.run_arguments import RunArguments
from hf_aegis.training.run_inputs import load_demonstrations


BATCH = 64


def participation_ratio(samples: Tensor) -> float:
    """
    Number of directions that samples `(N, D)` spread over, from 1 to `min(N - 1, D)`.

    Raises:
        ValueError: If there are fewer than two, or they do not differ.
    """
    if len(samples) < 2:
        raise ValueError(f"a spread needs at least two samples, found {len(samples)}")
    centred = samples.double() - samples.double().mean(dim=0)
    # The covariance's eigenvalues are those of the smaller Gram matrix: Σ λ is its trace, Σ λ² its squared norm.
    gram = centred @ centred.T if len(samples) <= samples.shape[1] else centred.T @ centred
    if not (total := float(gram.trace())):
        raise ValueError(f"the {len(samples)} samples do not differ")
    return total**2 / float(gram.square().sum())


@torch.no_grad()
def features(model: PaliGemmaFlowForAction, processor: PaliGemmaFlowProcessor, dataset: LiberoDataset) -> Tensor:
    """The last hidden states of each observation's image tokens, `(N, tokens · D)`, in the order of the data set."""
    model.eval()
    found = []
    for batch in DataLoader(dataset, batch_size=BATCH, collate_fn=PaliGemmaFlowCollator(processor)):
        prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
        outputs = model.model(
            **prompt,
            pixel_values=batch["pixel_values"].flatten(0, 1),
            # Each token of the prompt sees all of it, as in a forward pass with actions.
            token_type_ids=torch.zeros_like(batch["input_ids"]),
            use_cache=False,
        )
        images = batch["input_ids"][0] == model.config.image_token_id
        found.append(outputs.last_hidden_state[:, images].flatten(1))
    return torch.cat(found)


def policies(runs: list[Path]) -> Iterator[tuple[str, PaliGemmaFlowForAction, PaliGemmaFlowProcessor, LiberoDataset]]:
    """The embedded model, then those of the runs, each with its name and the held-out demonstrations."""
    # Its expert reads nothing here, and is small.
    model = PaliGemmaFlowForAction.from_vlm(str(EMBEDDED_VLM), dtype=torch.float32, expert_num_layers=1)
    train, held_out = load_demonstrations(RunArguments(chunk_size=model.config.chunk_size))
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        str(EMBEDDED_VLM), statistics=train.statistics, cameras=train.cameras
    )
    yield "before training", model, processor, held_out
    for run in runs:
        model = PaliGemmaFlowForAction.from_pretrained(run, dtype=torch.float32)
        held_out = load_demonstrations(RunArguments(chunk_size=model.config.chunk_size))[1]
        yield f"{run.parent.name}/{run.name}", model, PaliGemmaFlowProcessor.from_pretrained(run), held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="output folders of trainings on the embedded demonstrations"
    )
    runs = parser.parse_args().runs
    # Before minutes of work.
    if missing := [str(run) for run in runs if not (run / "model.safetensors").exists()]:
        parser.error(f"no model in {', '.join(missing)}")
    print("| policy | participation ratio |\n|---|---:|")
    for name, *policy in tqdm(policies(runs), total=1 + len(runs), unit="policy", disable=None):
        print(f"| {name} | {participation_ratio(features(*policy)):.1f} |", flush=True)


if __name__ == "__main__":
    main()
