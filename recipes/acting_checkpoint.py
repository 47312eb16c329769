"""
Turns one run of the comparison of acting policies into the checkpoint that ships with the package.

    hf-aegis compare --config recipes/compare_acting.yaml
    python recipes/acting_checkpoint.py --comparison outputs/compare_acting --condition pairs_90 --seed 0 \\
        --output_dir hf_aegis/assets/acting

The weights are rounded to bfloat16; what they answer, and how often they succeed in the simulator, is measured again
after that, on the comparison's own questions and starts. Needs the extra `libero`.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from shipped_policy import same_questions, write_policy

from hf_aegis.atomic_files import write_text
from hf_aegis.cli import main as hf_aegis
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.models import PaliGemmaFlowForAction


EVALUATION_FILE = "evaluation.json"
MODEL_CARD = Path(__file__).parents[1] / "model_cards" / "acting_checkpoint.md"
_SCORES = ("episodes", "successes", "crashed", "success_rate", "interval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, required=True, help="output folder of the comparison")
    parser.add_argument("--condition", required=True, help="its condition to ship")
    parser.add_argument("--seed", type=int, required=True, help="the condition's run")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the checkpoint; replaced")
    arguments = parser.parse_args()
    scores = ship(arguments.comparison, arguments.condition, arguments.seed, arguments.output_dir)
    print(json.dumps({"libero": scores["libero"], "vqa_accuracy": scores["vqa"]["accuracy"]}, indent=2))


def ship(comparison: Path, condition: str, seed: int, folder: Path) -> dict[str, Any]:
    """
    Writes the checkpoint's folder, whole or not at all, and returns its figures.

    Raises:
        OSError: If the comparison has no such run, or the simulator cannot be started.
        ValueError: If other questions were asked than can be asked again.
    """
    run = comparison / "runs" / condition / f"seed_{seed}"
    result = json.loads((run / "result.json").read_text())
    before = json.loads((comparison / "pretrained.json").read_text())
    libero = json.loads((comparison / "compare.json").read_text())["libero"]

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staged = Path(temporary) / "policy"
        staged.mkdir()
        write_policy(run, staged)
        write_text(staged / "recipe.yaml", without_machine_paths((run / "recipe.yaml").read_text()))
        holdout = same_questions(staged, before, result)
        model = PaliGemmaFlowForAction.from_pretrained(staged, dtype=torch.float32)
        after = holdout.evaluate(model).to_dict()
        scores = {
            "condition": condition,
            "run_seed": seed,
            "base_model": "paligemma2-easy-vqa",
            "parameters": model.num_parameters(),
            "dataset": before["dataset"],
            "split": before["split"],
            "seed": before["seed"],
            "fingerprint": holdout.fingerprint,
            "vqa": after,
            "vqa_before": {key: before[key] for key in after},
            "asked_of_libero": {key: value for key, value in libero.items() if key != "films"},
            "libero": _rollouts(staged, libero, Path(temporary)),
            "in_float32": {key: result[key] for key in ("vqa_cross_entropy", "vqa_accuracy")}
            | {"libero": _figures(json.loads((run / "libero.json").read_text()))},
            **{key: result[key] for key in ("flow_mse", "versions")},
        }
        write_text(staged / EVALUATION_FILE, json.dumps(scores, indent=2) + "\n")
        write_text(staged / "README.md", card(scores))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(staged, folder)
    return scores


def card(scores: dict[str, Any]) -> str:
    """The model card, from the checkpoint's `evaluation.json`."""
    rows = {**scores["libero"]["by_task"], "all": scores["libero"]}
    before, after = scores["vqa_before"], scores["vqa"]
    return MODEL_CARD.read_text().format(
        condition=scores["condition"],
        seed=scores["run_seed"],
        parameters=scores["parameters"] / 1e6,
        table="\n".join(
            f"| {name} | {row['successes']} of {row['episodes']} | {row['success_rate']:.1%} "
            f"| {row['interval'][0]:.1%} – {row['interval'][1]:.1%} |"
            for name, row in rows.items()
        ),
        count=after["count"],
        accuracy_before=before["accuracy"],
        accuracy=after["accuracy"],
        cross_entropy_before=before["cross_entropy"],
        cross_entropy=after["cross_entropy"],
        replan_steps=scores["asked_of_libero"]["replan_steps"],
        versions=", ".join(f"{name} {version}" for name, version in scores["versions"].items()),
    )


def _rollouts(policy: Path, libero: dict[str, Any], scratch: Path) -> dict[str, Any]:
    asked = {key: value for key, value in libero.items() if key != "films"}
    recipe, output = scratch / "libero.yaml", scratch / "libero.json"
    recipe.write_text(yaml.safe_dump({**asked, "model": str(policy), "output": str(output)}))
    if hf_aegis(["eval-libero", "--config", str(recipe)]) != 0:
        raise OSError(f"hf-aegis eval-libero could not let {policy} act")
    return _figures(json.loads(output.read_text()))


def _figures(scores: dict[str, Any]) -> dict[str, Any]:
    by_task = {name: {key: row[key] for key in _SCORES} for name, row in scores["by_task"].items()}
    return {key: scores[key] for key in _SCORES} | {"by_task": by_task}


if __name__ == "__main__":
    main()
