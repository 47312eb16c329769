"""
What a training step of transformers' π0 costs at its published widths: naive, and with AEGIS's dual backward in its
two forms.

First the whole model is counted from shapes alone, on the meta device: parameters, and the floating-point operations
of a naive step. Then a random π0 with `--layers` of its 18 layers (and as large a part of the vision tower's) trains
on `--device`; the forms take turns, so that the machine's drift hits them alike. On a GPU with 80 GB:

    python tests/benchmarks/pi0_step.py --device cuda --layers 18 --vocabulary 257152 --batch 8

Weights are float32, as in `recipes/pi0_libero.yaml`; `--autocast` computes in bfloat16. There is no optimiser.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PI0Config, PI0ForConditionalGeneration

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.gradients import GradientShield
from hf_aegis.models import pi0_vlm
from hf_aegis.training.resources import peak_memory_mb, reset_peak_memory


FORMS = ("naive", "two_pass", "streaming")
WHOLE = PI0Config().dit_config.num_hidden_layers
PATCHES = 256  # tokens of an image


def build(layers: int, vocabulary: int) -> PI0ForConditionalGeneration:
    """A random π0 whose vision tower is frozen, and whose expert's unused embeddings are."""
    config = PI0Config()
    text, vision = config.vlm_config.text_config, config.vlm_config.vision_config
    vision.num_hidden_layers = max(1, round(vision.num_hidden_layers * layers / WHOLE))
    text.num_hidden_layers = config.dit_config.num_hidden_layers = layers
    text.vocab_size = config.dit_config.vocab_size = vocabulary
    config.vlm_config.image_token_id = vocabulary
    model = PI0ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.model.vlm.vision_tower.requires_grad_(False)
    model.model.dit.embed_tokens.requires_grad_(False)
    return model


def make_batch(model: PI0ForConditionalGeneration, size: int, cameras: int, words: int) -> dict[str, torch.Tensor]:
    """Random pictures and words, a state and a chunk of actions, on the default device."""
    config = model.config
    images = torch.full((size, cameras * PATCHES), config.vlm_config.image_token_id)
    ids = torch.cat([images, torch.randint(config.vlm_config.text_config.vocab_size, (size, words))], dim=1)
    chunk = (size, config.chunk_size, config.max_action_dim)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(size, cameras, 3, 224, 224),
        "pixel_attention_mask": torch.ones(size, cameras, dtype=torch.bool),
        "state": torch.randn(size, config.max_state_dim),
        "actions": torch.randn(chunk),
        "noise": torch.randn(chunk),
        "timestep": torch.rand(size),
    }


def count_whole(size: int, cameras: int, words: int) -> dict[str, float]:
    """Parameters of the published π0, and the operations of its naive step, in TFLOP; nothing is computed."""
    with torch.device("meta"):
        model = build(WHOLE, PI0Config().vlm_config.text_config.vocab_size)
        batch = make_batch(model, size, cameras, words)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return {
        "parameters": model.num_parameters(),
        "trained": model.num_parameters(only_trainable=True),
        "forward_tflop": forward.get_total_flops() / 1e12,
        "backward_tflop": backward.get_total_flops() / 1e12,
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each form: median milliseconds, ratios of time and processor time to naive, TFLOP, peak memory on a GPU."""
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = build(arguments.layers, arguments.vocabulary)
        batch = make_batch(model, arguments.batch, arguments.cameras, arguments.words)
        other = make_batch(model, arguments.batch, 1, arguments.words)
    questions = {name: other[name] for name in ("input_ids", "attention_mask")}
    questions |= {"pixel_values": other["pixel_values"][:, 0], "token_type_ids": torch.zeros_like(other["input_ids"])}
    anchor = ActivationAnchor.collect(pi0_vlm(model), [questions], progress=False)
    shields = {form: GradientShield(model, anchor, dual_backward=form) for form in FORMS if form != "naive"}
    autocast = torch.autocast(torch.device(arguments.device).type, torch.bfloat16, enabled=arguments.autocast)

    on_gpu = arguments.device != "cpu"

    def step(form: str) -> tuple[float, float, float | None]:
        """Seconds, processor seconds, and on a GPU the peak memory in MB."""
        if on_gpu:
            torch.cuda.synchronize()
            reset_peak_memory()
        start = time.perf_counter(), time.process_time()
        with shields.get(form, contextlib.nullcontext()):
            with autocast:
                loss = model(**batch).loss
            loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - start[0], time.process_time() - start[1]
        model.zero_grad()
        return *took, peak_memory_mb() if on_gpu else None

    rows: list[dict[str, Any]] = []
    for form in FORMS:
        # What comes first is slower, and is counted instead.
        with FlopCounterMode(display=False) as counter:
            step(form)
        rows.append({"form": form, "tflop": counter.get_total_flops() / 1e12})
    rounds = [[step(form) for form in FORMS] for _ in range(arguments.repeats)]
    for index, row in enumerate(rows):
        row["step_ms"] = 1e3 * statistics.median(steps[index][0] for steps in rounds)
        row["ratio"] = statistics.median(steps[index][0] / steps[0][0] for steps in rounds)
        row["processor_ratio"] = statistics.median(steps[index][1] / steps[0][1] for steps in rounds)
        row["peak_mb"] = max(steps[index][2] for steps in rounds) if on_gpu else None
    return rows


def main() -> None:
    """Counts, measures, prints a Markdown table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    whole = count_whole(arguments.batch, arguments.cameras, arguments.words)
    print(
        f"π0, {WHOLE} layers: {whole['parameters']:,} parameters, {whole['trained']:,} of them trained. A naive step "
        f"of {arguments.batch} × {arguments.cameras} cameras and {arguments.words} words: "
        f"{whole['forward_tflop']:.2f} TFLOP forward, {whole['backward_tflop']:.2f} backward.\n"
    )
    rows = measure(arguments)
    print(f"{arguments.layers} layers on {arguments.device}, torch {torch.__version__}:\n")
    print("| step | ms | × naive | × naive, processor time | TFLOP | peak memory, MB |\n|---|---|---|---|---|---|")
    for row in rows:
        peak = "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        print(
            f"| {row['form']} | {row['step_ms']:.0f} | {row['ratio']:.2f} | {row['processor_ratio']:.2f} | "
            f"{row['tflop']:.2f} | {peak} |"
        )
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        arguments.output.write_text(json.dumps({"settings": settings, "whole": whole, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
