"""`hf-aegis eval-vqa`: cross-entropy and accuracy of a model on questions about images, by question type."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.atomic_files import write_text
from hf_aegis.cli.device import resolve_device


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--model",
        default=str(EMBEDDED_VLM),
        help="folder or Hub id of a PaliGemma, with or without an action expert (default: the embedded one)",
    )
    parser.add_argument(
        "--dataset", choices=["easy-vqa"], default="easy-vqa", help="which questions (default: easy-vqa)"
    )
    parser.add_argument("--split", choices=["train", "test"], default="test", help="which part (default: test)")
    parser.add_argument("--max_samples", type=int, help="only the first N questions (default: all)")
    parser.add_argument("--seed", type=int, help="shuffle the questions before taking the first N (default: do not)")
    parser.add_argument("--batch_size", type=int, default=64, help="questions per forward pass (default: 64)")
    parser.add_argument("--revision", help="revision of the model on the Hub (default: its main branch)")
    parser.add_argument(
        "--attn_implementation", default="eager", help="attention implementation of the model (default: eager)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="'auto' takes the GPU where there is one (default: auto)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--output", type=Path, help="also write the scores to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the model, prints a table and the scores as JSON."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import hf_aegis.models  # noqa: F401 (registers the models with an action expert)
    from hf_aegis.data.vqa import VQA_PROMPT, load_easy_vqa
    from hf_aegis.evaluation.vqa import VQAHoldout

    # A wrong option should not cost the loading of a large model first.
    samples = load_easy_vqa(arguments.split, arguments.max_samples, arguments.seed)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1; found {arguments.batch_size}.")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise FileNotFoundError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist.")
    device = resolve_device(arguments.device)
    model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
    )
    model.to(device)
    processor = AutoProcessor.from_pretrained(arguments.model, revision=arguments.revision)
    holdout = VQAHoldout(samples, processor, batch_size=arguments.batch_size)
    scores = {
        "model": arguments.model,
        "revision": arguments.revision,
        "dataset": arguments.dataset,
        "split": arguments.split,
        "prompt": VQA_PROMPT,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
        "device": device,
        "fingerprint": holdout.fingerprint,
        **holdout.evaluate(model).to_dict(),
    }
    print(format_table(scores))
    text = json.dumps(scores, indent=2)
    print(text)
    if arguments.output is not None:
        write_text(arguments.output, text + "\n")


def format_table(scores: dict[str, Any]) -> str:
    """One line per question type and one for all: count, accuracy in per cent, cross-entropy in nats per token."""
    rows = {**scores["by_type"], "all": scores}
    lines = [f"{'questions':<12}{'count':>8}{'accuracy':>11}{'CE':>9}"]
    lines += [
        f"{name:<12}{row['count']:>8}{100 * row['accuracy']:>9.2f} %{row['cross_entropy']:>9.4f}"
        for name, row in rows.items()
    ]
    return "\n".join(lines)
