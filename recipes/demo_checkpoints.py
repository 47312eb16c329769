"""
Turns the runs of `hf-aegis demo` into the checkpoints that ship with the package.

    hf-aegis demo --output_dir outputs/demo
    python recipes/demo_checkpoints.py --demo outputs/demo --output_dir hf_aegis/assets/demo

Each condition's folder loads by itself: weights in bfloat16, processor, recipe. Its figures are measured again after
the rounding, on the demo's own questions, and its curves are kept as far as they are drawn. Nothing in it names a path
of the machine it was made on.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from shipped_policy import same_questions, write_policy

from hf_aegis.assets import DEMO_CHECKPOINTS
from hf_aegis.atomic_files import write_text
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.models import PaliGemmaFlowForAction
from hf_aegis.training.json_lines import METRICS_FILE, JSONLines


EVALUATION_FILE = "evaluation.json"
MODEL_CARD = Path(__file__).parents[1] / "model_cards" / "demo_checkpoint.md"
# What curves are drawn of, and when.
_CURVES = ("vqa_cross_entropy", "vqa_accuracy", "eval_flow_mse")
_COPIED = ("flow_mse", "action_mse", "versions")
_NAMES = {"naive": "naively", "aegis": "with AEGIS", "held_pairs": "with held pairs of directions and AEGIS's penalty"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="output folder of a finished `hf-aegis demo`")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for one folder per condition")
    arguments = parser.parse_args()
    for condition in DEMO_CHECKPOINTS:
        scores = ship(arguments.demo, condition, arguments.output_dir / condition)
        size = sum(path.stat().st_size for path in (arguments.output_dir / condition).iterdir())
        print(f"{condition}: {scores['vqa']['accuracy']:.2%} of {scores['vqa']['count']} answers, {size / 1e6:.2f} MB")


def ship(demo: Path, condition: str, folder: Path) -> dict[str, Any]:
    """
    Writes the folder of one condition, whole or not at all, and returns its figures.

    Args:
        demo (`Path`): Output folder of `hf-aegis demo`.
        condition (`str`): Which of its runs.
        folder (`Path`): Where to; an older folder there is replaced.

    Raises:
        ValueError: If the demo has no such run, several of them, or asked other questions than can be asked again.
    """
    runs = sorted(path.parent for path in (demo / "runs" / condition).glob("seed_*/result.json"))
    if len(runs) != 1:
        raise ValueError(f"{demo}: expected one finished run of '{condition}', found {len(runs)}")
    run = runs[0]
    before = json.loads((demo / "pretrained.json").read_text())
    result = json.loads((run / "result.json").read_text())

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staged = Path(temporary)
        write_policy(run, staged)
        _write_curves(run, staged)
        write_text(staged / "recipe.yaml", without_machine_paths((run / "recipe.yaml").read_text()))
        holdout = same_questions(staged, before, result)
        model = PaliGemmaFlowForAction.from_pretrained(staged, dtype=torch.float32)
        after = holdout.evaluate(model).to_dict()
        scores = {
            "condition": condition,
            "base_model": "paligemma2-easy-vqa",
            "dataset": before["dataset"],
            "split": before["split"],
            "seed": before["seed"],
            "fingerprint": holdout.fingerprint,
            "vqa": after,
            "vqa_before": {key: before[key] for key in after},
            "in_float32": {key: result[key] for key in ("vqa_cross_entropy", "vqa_accuracy")},
            **{key: result[key] for key in _COPIED},
        }
        write_text(staged / EVALUATION_FILE, json.dumps(scores, indent=2) + "\n")
        write_text(staged / "README.md", card(scores))
        shutil.rmtree(folder, ignore_errors=True)
        # A temporary folder is its owner's alone.
        os.chmod(staged, 0o755)
        shutil.copytree(staged, folder)
    return scores


def card(scores: dict[str, Any]) -> str:
    """The model card of a shipped checkpoint, from its `evaluation.json`."""
    before, after = scores["vqa_before"], scores["vqa"]
    rows = [(name, before["by_type"][name], row) for name, row in after["by_type"].items()]
    table = [
        f"| {name} | {old['accuracy']:.1%} | {new['accuracy']:.1%} "
        f"| {old['cross_entropy']:.4f} | {new['cross_entropy']:.4f} |"
        for name, old, new in [*rows, ("all", before, after)]
    ]
    return MODEL_CARD.read_text().format(
        condition=scores["condition"],
        how=_NAMES[scores["condition"]],
        table="\n".join(table),
        count=scores["vqa"]["count"],
        flow_mse=scores["flow_mse"],
        versions=", ".join(f"{name} {version}" for name, version in scores["versions"].items()),
    )


def _write_curves(run: Path, folder: Path) -> None:
    lines = []
    for record in JSONLines(run / METRICS_FILE).read():
        drawn = {key: record[key] for key in ("step", *_CURVES) if key in record}
        if len(drawn) > 1:
            lines.append(json.dumps(drawn) + "\n")
    write_text(folder / METRICS_FILE, "".join(lines))


if __name__ == "__main__":
    main()
