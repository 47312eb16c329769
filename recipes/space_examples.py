"""
Chooses the Space's example pictures from easy-VQA's test split: for each type of question the first one, in the order
of a seed, that the shipped naive policy still answers right, and the first one that it does not.

    python recipes/space_examples.py --output_dir space/examples

So half of the examples show what was lost, which the page says.
"""

import argparse
import json
from pathlib import Path

import torch

from hf_aegis.assets import DEMO_CHECKPOINTS
from hf_aegis.atomic_files import write_text
from hf_aegis.data.vqa import VQASample, load_easy_vqa
from hf_aegis.evaluation import VQAHoldout
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor


SEED = 0
AMONG = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for pictures and examples.json")
    folder: Path = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    samples = load_easy_vqa("test", AMONG, seed=SEED)
    naive = DEMO_CHECKPOINTS["naive"]
    model = PaliGemmaFlowForAction.from_pretrained(naive, dtype=torch.float32)
    predictions = (
        VQAHoldout(samples, PaliGemmaFlowProcessor.from_pretrained(naive)).evaluate_accuracy(model).predictions
    )
    listed = []
    for sample in choose(samples, predictions):
        name = f"{len(listed) + 1}.png"
        sample.image.save(folder / name, optimize=True)
        listed.append({"image": name, "question": sample.question, "answer": sample.answer, "from": sample.name})
    write_text(folder / "examples.json", json.dumps(listed, indent=2) + "\n")


def choose(samples: list[VQASample], predictions: list[str]) -> list[VQASample]:
    """The first question of each type and outcome, each with a picture of its own."""
    chosen: dict[tuple[str | None, bool], VQASample] = {}
    for sample, prediction in zip(samples, predictions, strict=True):
        kind = (sample.question_type, prediction == sample.answer)
        if kind not in chosen and all(sample.image is not other.image for other in chosen.values()):
            chosen[kind] = sample
    return list(chosen.values())


if __name__ == "__main__":
    main()
