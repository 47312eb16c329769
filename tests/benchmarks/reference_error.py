"""
How far the shield's approximate reference directions are from the exact one, on the embedded model while it is trained
on the shipped demonstrations: cosines, and how often both say the same of a group, that it conflicts or does not.

`reference_share` is measured on the same batches and weights; `reference_interval` by comparing each step's direction
with those of the steps before it, as often as each age occurs. Prints a Markdown table.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoProcessor

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM
from hf_aegis.data import LiberoDataset, VQACollator, load_easy_vqa
from hf_aegis.gradients import GradientShield
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor


SHARES = (0.5, 0.25)
INTERVALS = (2, 4, 8)
Directions = dict[str, tuple[Tensor, Tensor]]


def training(arguments: argparse.Namespace) -> tuple[PaliGemmaFlowForAction, ActivationAnchor, Iterator[dict]]:
    """The model with an untrained expert, the anchor of its own questions, and batches of demonstrations."""
    torch.manual_seed(arguments.seed)
    dataset = LiberoDataset(DEMONSTRATIONS)
    processor = PaliGemmaFlowProcessor.from_vlm_processor(
        EMBEDDED_VLM, statistics=dataset.statistics, cameras=dataset.cameras
    )
    collate = PaliGemmaFlowCollator(processor)
    model = PaliGemmaFlowForAction.from_vlm(
        EMBEDDED_VLM,
        expert_hidden_size=128,
        expert_num_layers=3,
        expert_num_heads=4,
        expert_intermediate_size=512,
    )
    model.freeze_vision_tower()
    questions = VQACollator(AutoProcessor.from_pretrained(EMBEDDED_VLM))(load_easy_vqa("train", 128, seed=0))
    anchor = ActivationAnchor.collect(model, [questions], progress=False)
    order = iter(torch.randint(len(dataset), (10_000,)).tolist())

    def batches() -> Iterator[dict]:
        while True:
            yield dict(collate([dataset[next(order)] for _ in range(arguments.batch)]))

    return model.train(), anchor, batches()


def differentiate(model: PaliGemmaFlowForAction, shield: GradientShield, batch: dict, seed: int) -> Directions:
    """
    A backward pass through the shield, with noise and times by `seed`; returns each group's task gradient and
    reference direction as vectors.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    shield.observer = lambda group, g, r: found[group].append((g.flatten().clone(), r.flatten().clone()))
    model.zero_grad()
    torch.manual_seed(seed)
    with shield:
        model(**batch).loss.backward()
    return {
        group: (torch.cat([g for g, _ in pairs]), torch.cat([r for _, r in pairs])) for group, pairs in found.items()
    }


class Agreement:
    """Cosines between references, and whether both say the same of the task's conflict, over groups and steps."""

    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.alike: list[bool] = []

    def add(self, exact: Directions, approximate: Directions) -> None:
        """Compares two sets of directions, of one task gradient."""
        for group, (task, reference) in exact.items():
            other = approximate[group][1]
            self.cosines.append(float(torch.nn.functional.cosine_similarity(reference, other, dim=0)))
            self.alike.append(bool((task @ reference < 0) == (task @ other < 0)))


def main() -> None:
    """Trains with the exact reference, compares, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=20, help="steps before the first that is measured")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, anchor, batches = training(arguments)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=arguments.learning_rate)
    exact = GradientShield(model, anchor)
    shares = {share: GradientShield(model, anchor, reference_share=share) for share in SHARES}
    agreements: dict[tuple[str, float], Agreement] = defaultdict(Agreement)
    history: list[Directions] = []
    for step in range(arguments.warmup + arguments.steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * min(1.0, (step + 1) / max(1, arguments.warmup))
        if step >= arguments.warmup:
            approximate = {share: differentiate(model, shield, batch, step) for share, shield in shares.items()}
        directions = differentiate(model, exact, batch, step)
        if step >= arguments.warmup:
            for share in SHARES:
                agreements["reference_share", share].add(directions, approximate[share])
            for interval in INTERVALS:
                if len(history) >= max(INTERVALS) - 1:
                    for age in range(interval):
                        agreements["reference_interval", interval].add(directions, [*history, directions][-1 - age])
        history = [*history, directions][-(max(INTERVALS) - 1) :]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print("| option | value | cosine to the exact reference: median | 10th percentile | same groups in conflict, % |")
    print("|---|---|---|---|---|")
    for (option, value), agreement in agreements.items():
        low = statistics.quantiles(agreement.cosines, n=10)[0]
        print(
            f"| `{option}` | {value} | {statistics.median(agreement.cosines):.3f} | {low:.3f} | "
            f"{100 * statistics.mean(agreement.alike):.1f} |"
        )


if __name__ == "__main__":
    main()
