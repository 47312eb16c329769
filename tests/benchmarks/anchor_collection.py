"""
Time to collect an anchor's moments, and to save them on the way, over that of plain forward passes on the same data.
On a decoder, and on the embedded vision-language model.

All variants take turns in one process, so that the machine's drift hits them alike; a ratio is the median over
repetitions of the paired ratios of processor time, which other work on the machine disturbs less than wall-clock time
(on a GPU, whose work is waited for before the clock is read, of wall-clock time). The hash of the weights, which a
collection begins with, stands beside, in forward passes of one batch. Prints a Markdown table, which is put on the
machine's page in `tests/benchmarks/results/`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping

import torch
from decoder import random_decoder
from machine_results import MachineResults
from torch import nn
from transformers import AutoModelForImageTextToText

from hf_aegis.anchors import find_decoder_layers, hash_layer_weights
from hf_aegis.anchors.collection import collect_moments
from hf_aegis.anchors.partial_collection import PartialCollection
from hf_aegis.anchors.passes import Passes
from hf_aegis.assets import EMBEDDED_VLM


Batches = list[dict[str, torch.Tensor]]


def decoder(arguments: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """A random decoder, and sequences of which the last tenth is padding."""
    model = random_decoder(arguments.width, arguments.layers, arguments.tokens)
    shape = (arguments.batch, arguments.tokens)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, -arguments.tokens // 10 :] = 0
    ids = [torch.randint(512, shape) for _ in range(arguments.batches)]
    return model, [{"input_ids": row, "attention_mask": mask} for row in ids]


def embedded(arguments: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """The embedded vision-language model, random pictures, and questions of about the length of easy-VQA's."""
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_VLM, attn_implementation="eager")
    image = torch.full((30, 64), model.config.image_token_id)
    words = torch.randint(3, 400, (30, 12))
    ids = torch.cat([image, words], dim=1)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": torch.randn(30, 3, 64, 64),
    }
    batch["attention_mask"][::2, -2:] = 0
    return model, [batch] * arguments.batches


def forward_passes(model: nn.Module, batches: Batches, device: str) -> None:
    """What a collection cannot do without."""
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            model(**inputs, use_cache=False, logits_to_keep=1)


def measure(model: nn.Module, batches: Batches, arguments: argparse.Namespace) -> Mapping[str, float]:
    """Medians of the paired ratios to plain forward passes (the hash's: to one batch's), and that batch's `ms`."""
    model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    dtype = getattr(torch, arguments.dtype)
    batches = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]

    layers = find_decoder_layers(model)

    def collect(partial: PartialCollection | None = None) -> None:
        collect_moments(model, batches, layers, passes=Passes(progress=False, partial=partial))

    def collect_and_save() -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(PartialCollection(folder, {}, every=arguments.save_batches))

    variants: dict[str, Callable[[], None]] = {
        "forward": lambda: forward_passes(model, batches, arguments.device),
        "moments": collect,
        "saved": collect_and_save,
        "hash": lambda: hash_layer_weights(layers),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    on_gpu = arguments.device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time
    for repetition in range(arguments.repeats + 1):
        for name, variant in variants.items():
            start = clock()
            variant()
            if on_gpu:
                torch.cuda.synchronize()
            if repetition > 0:  # the first one warms up
                times[name].append(clock() - start)
    ratios = {
        name: statistics.median(mine / plain for mine, plain in zip(values, times["forward"], strict=True))
        for name, values in times.items()
    }
    ratios["hash"] *= len(batches)
    return {**ratios, "ms": 1e3 * statistics.median(times["forward"]) / len(batches)}


def main() -> None:
    """Measures, prints a Markdown table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=280)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--save_batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--again", action="store_true", help="measure anew what was measured with these settings")
    arguments = parser.parse_args()
    settings = {name: value for name, value in vars(arguments).items() if name != "again"}
    settings["threads"] = torch.get_num_threads()
    results = MachineResults(arguments.device)
    section = results.section("Collecting anchors", settings, arguments.again)
    sizes = f"width {arguments.width}, {arguments.layers} layers, {arguments.batch} × {arguments.tokens} tokens"
    subjects = {f"Gemma 2, {sizes}": decoder, "embedded PaliGemma 2, 30 × 76 tokens": embedded}
    rows = {
        name: results.unit(section, name, lambda make=make: measure(*make(arguments), arguments))
        for name, make in subjects.items()
    }
    lines = [
        "",
        f"{arguments.batches} batches, saved every {arguments.save_batches}; {arguments.dtype}, "
        f"{settings['threads']} threads, {arguments.repeats} rounds; "
        f"load average {os.getloadavg()[0]:.1f} when written.",
        "",
        "| model | forward pass, ms a batch | moments | moments, saved on the way | hash, in batches |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['ms']:.0f} | × {row['moments']:.3f} | × {row['saved']:.3f} | {row['hash']:.2f} |"
        )
    results.show(section, lines)
    print("\n".join(lines))
    print(f"\n{results.page}")


if __name__ == "__main__":
    main()
