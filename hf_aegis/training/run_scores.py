"""What a run is measured by when its training has ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_aegis.data import LiberoDataset
from hf_aegis.data.vqa import VQASample
from hf_aegis.evaluation.open_loop import open_loop_error
from hf_aegis.evaluation.vqa_survey import survey
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowProcessor
from hf_aegis.training.callbacks import mean_summary
from hf_aegis.training.certificate_callback import CERTIFICATE_FILE, certificate_figures
from hf_aegis.training.json_lines import PROJECTION_FILE, JSONLines
from hf_aegis.training.run_arguments import RunArguments


PROJECTION_FIGURES = ("throttle_rate", "energy_shed", "cosine", "alpha", "penalty", "replay_loss")


def question_scores(
    policy: torch.nn.Module, processor: PaliGemmaFlowProcessor, questions: Sequence[VQASample]
) -> tuple[dict[str, Any], str]:
    """Scores on the final questions, with 95 % intervals over them, and the questions' fingerprint."""
    result, fingerprint = survey(lambda: policy, questions, processor)
    scores = result.to_dict()
    measures = ("cross_entropy", "accuracy", "any_match")
    names = [name for measure in measures for name in (measure, f"{measure}_interval") if name in scores]
    by_type = {
        f"vqa_{measure}_by_{kind}": {name: score[measure] for name, score in groups.items() if measure in score}
        for measure in ("accuracy", "any_match")
        for kind, groups in (("type", result.to_dict()["by_type"]), ("answer_type", scores.get("by_answer_type", {})))
    }
    return {f"vqa_{name}": scores[name] for name in names} | {k: v for k, v in by_type.items() if v}, fingerprint


def action_errors(
    run: RunArguments, policy: Any, processor: PaliGemmaFlowProcessor, dataset: LiberoDataset
) -> dict[str, Any]:
    """Open-loop errors of the flow expert and, where there is one, of the discrete head, on held-out chunks."""
    if run.action_samples == 0:
        return {}
    indices = np.linspace(0, len(dataset) - 1, min(run.action_samples, len(dataset))).round().astype(int).tolist()
    collator = PaliGemmaFlowCollator(processor)
    errors: dict[str, Any] = {"action_mse": open_loop_error(policy, dataset, collator, indices)["action_mse"]}
    if run.fast is not None:
        options: dict[str, Any] = {"head": "fast", "action_tokenizer": processor.action_tokenizer}
        discrete = open_loop_error(policy, dataset, collator, indices, **options)
        errors |= {"fast_action_mse": discrete["action_mse"], "fast_decode_failures": discrete["failures"]}
    return errors


def projection_means(folder: Path) -> dict[str, float]:
    """Means over training of the reference gradient's figures, over every backward pass that was finite."""
    means = mean_summary(record["summary"] for record in JSONLines(folder / PROJECTION_FILE).read())
    return {name: means[name] for name in PROJECTION_FIGURES if name in means}


def certified_deviations(folder: Path) -> dict[str, float]:
    """How far the model had gone from the pre-trained one when training ended, as it is logged."""
    return certificate_figures(JSONLines(folder / CERTIFICATE_FILE).read()[-1])
