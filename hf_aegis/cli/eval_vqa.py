"""`hf-aegis eval-vqa`: cross-entropy and accuracy of a model on questions about images, by question type."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.atomic_files import write_text
from hf_aegis.cli.device import resolve_device
from hf_aegis.format_version import written_version
from hf_aegis.machine_paths import portable_name


if TYPE_CHECKING:
    import torch


METRICS = ("cross_entropy", "accuracy")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--model",
        default=str(EMBEDDED_VLM),
        help="folder or Hub id of a PaliGemma, with or without an action expert (default: the embedded one)",
    )
    parser.add_argument("--revision", help="revision of the model on the Hub (default: its main branch)")
    parser.add_argument(
        "--dataset",
        default="easy-vqa",
        help="'easy-vqa', a dataset that `datasets` loads (Hub id or folder), or a folder of images with "
        "<split>.jsonl (default: easy-vqa)",
    )
    parser.add_argument(
        "--split", help="which part (default: 'test' of easy-vqa; of other datasets the only one there is)"
    )
    parser.add_argument("--dataset_revision", help="revision of the dataset on the Hub (default: its main branch)")
    parser.add_argument("--dataset_config", help="configuration of the dataset (default: its default one)")
    parser.add_argument(
        "--columns",
        help='JSON object of the columns whose names are not common, e.g. \'{"answers": "labels"}\' '
        "(fields: image, question, answer, answers, question_type, answer_type, question_id)",
    )
    parser.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        help="read only as much of a dataset on the Hub as max_samples need (default: if max_samples are given)",
    )
    parser.add_argument("--max_samples", type=int, help="only the first N questions (default: all)")
    parser.add_argument("--seed", type=int, help="shuffle the questions before taking the first N (default: do not)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=METRICS,
        help="what to measure; any-match comes with accuracy (default: both)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="questions per forward pass (default: 64)")
    parser.add_argument(
        "--attn_implementation", default="eager", help="attention implementation of the model (default: eager)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="'auto' takes the GPU where there is one (default: auto)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument(
        "--output",
        type=Path,
        help="also write the scores to this JSON file, and each answer to <output>.predictions.jsonl beside it, from "
        "which a run that was stopped continues",
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the model, prints a table and the scores as JSON."""
    from transformers import AutoProcessor

    from hf_aegis.data.vqa import VQA_PROMPT
    from hf_aegis.data.vqa_sources import EASY_VQA, load_vqa
    from hf_aegis.evaluation.vqa_survey import survey
    from hf_aegis.evaluation.weight_files import hash_weights
    from hf_aegis.hub import hub_commit

    # A wrong option should not cost the loading of a large model first.
    split = "test" if arguments.split is None and arguments.dataset == EASY_VQA else arguments.split
    columns = _columns(arguments.columns)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1; found {arguments.batch_size}.")
    output: Path | None = arguments.output
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: the folder {output.parent} does not exist.")
    # What is asked of a branch is asked of its commit, so that a run which continues later asks the same.
    dataset_revision = arguments.dataset_revision
    if arguments.dataset != EASY_VQA:
        dataset_revision = hub_commit("dataset", arguments.dataset, dataset_revision)
    samples = load_vqa(
        arguments.dataset,
        split,
        arguments.max_samples,
        arguments.seed,
        revision=dataset_revision,
        config=arguments.dataset_config,
        columns=columns,
        streaming=arguments.streaming,
    )
    revision = hub_commit("model", arguments.model, arguments.revision)
    settings = {
        "model": portable_name(arguments.model),
        "revision": revision,
        # A folder may hold another model tomorrow; what is on the Hub is told by its revision.
        "weights_sha256": hash_weights(Path(arguments.model)),
        "dataset": portable_name(arguments.dataset),
        "split": split,
        "dataset_revision": dataset_revision,
        "dataset_config": arguments.dataset_config,
        "columns": columns,
        "streaming": arguments.streaming,
        "max_samples": arguments.max_samples,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
        "device": resolve_device(arguments.device),
    }
    result, fingerprint = survey(
        lambda: _load_model(arguments, revision),
        samples,
        AutoProcessor.from_pretrained(arguments.model, revision=revision),
        batch_size=arguments.batch_size,
        cross_entropy="cross_entropy" in arguments.metrics,
        accuracy="accuracy" in arguments.metrics,
        predictions=output.with_name(f"{output.name}.predictions.jsonl") if output is not None else None,
        settings=settings,
    )
    scores = {
        **written_version("VQA scores"),
        **settings,
        "prompt": VQA_PROMPT,
        "batch_size": arguments.batch_size,
        "fingerprint": fingerprint,
        **result.to_dict(),
    }
    print(format_table(scores))
    text = json.dumps(scores, indent=2)
    print(text)
    if output is not None:
        write_text(output, text + "\n")


def format_table(scores: dict[str, Any]) -> str:
    """
    One line per question type and one for all: count, accuracy in per cent with its 95 % interval, any-match in per
    cent, cross-entropy in nats per token; "-" for what was not measured.
    """
    rows = {**scores["by_type"], "all": scores}
    width = max(12, *(len(name) + 2 for name in rows))
    lines = [f"{'questions':<{width}}{'count':>8}{'accuracy':>11}{'95 %':>16}{'any match':>12}{'CE':>9}"]
    for name, row in rows.items():
        accuracy = any_match = interval = loss = "-"
        if "accuracy" in row:
            accuracy = f"{100 * row['accuracy']:.2f} %"
            interval = "{:.2f} – {:.2f}".format(*(100 * bound for bound in row["accuracy_interval"]))
        if "any_match" in row:
            any_match = f"{100 * row['any_match']:.2f} %"
        if "cross_entropy" in row:
            loss = f"{row['cross_entropy']:.4f}"
        lines.append(f"{name:<{width}}{row['count']:>8}{accuracy:>11}{interval:>16}{any_match:>12}{loss:>9}")
    return "\n".join(lines)


def _load_model(arguments: argparse.Namespace, revision: str | None) -> "torch.nn.Module":
    from transformers import AutoModelForImageTextToText

    import hf_aegis.models  # noqa: F401 (registers the models with an action expert)

    model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(
        arguments.model,
        revision=revision,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        use_safetensors=True,
    )
    return model.to(resolve_device(arguments.device))


def _columns(text: str | None) -> dict[str, str | None] | None:
    if text is None:
        return None
    try:
        columns = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--columns must be a JSON object; found {text!r}: {error}") from error
    if not isinstance(columns, dict) or not all(isinstance(name, str | None) for name in columns.values()):
        raise ValueError(f"--columns must be a JSON object of column names; found {text!r}.")
    return columns
