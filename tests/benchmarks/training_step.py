"""
Step time and peak memory of the ways of keeping knowledge, on a decoder-dominated model, as ratios to a naive step:
AEGIS's dual backward in its two forms, held input subspaces, and held pairs of directions.

Every variant runs in a process of its own for peak memory; for time, all variants take turns in one process, so that
the machine's drift hits them alike; beside wall-clock time stand ratios of processor time, which other work on the
machine disturbs less. Prints a Markdown table and, with `--output`, writes the same figures as JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from decoder import random_decoder
from transformers import Gemma2ForCausalLM

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.gradients import GradientShield, HeldSubspace


VARIANTS = ("naive", "two_pass", "streaming", "streaming, share 0.25", "streaming, kept", "subspace", "pairs")
# "kept" is a step between two computations of the reference direction.
APPROXIMATE = {"streaming, share 0.25": {"reference_share": 0.25}, "streaming, kept": {"reference_interval": 10**6}}
HELD = 0.9  # share of the inputs' energy or of the predictions' sensitivity


class Variant(NamedTuple):
    """What goes around the backward pass, and what comes after the optimiser's step."""

    shield: GradientShield | None = None
    held: HeldSubspace | None = None


def build(arguments: argparse.Namespace, checkpointing: bool) -> tuple[Gemma2ForCausalLM, dict, ActivationAnchor]:
    """The decoder, one batch, and an anchor of other inputs."""
    model = random_decoder(arguments.width, arguments.layers, arguments.tokens)
    shape = (arguments.batch, arguments.tokens)
    other = {"input_ids": torch.randint(512, shape), "attention_mask": torch.ones(shape)}
    options = SubspaceOptions(energy=0.99, sensitivity=True)
    anchor = ActivationAnchor.collect(model, [other], subspaces=options, progress=False)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inputs = torch.randint(512, shape)
    return model, {"input_ids": inputs, "attention_mask": torch.ones(shape), "labels": inputs}, anchor


def step(model: Gemma2ForCausalLM, batch: dict, variant: Variant, optimizer: torch.optim.Optimizer) -> None:
    """One training step: forward and backward pass, clipping, AdamW, and what the variant adds."""
    with variant.shield or nullcontext():
        model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if variant.held is not None:
        variant.held()
    optimizer.zero_grad()


def make(name: str, model: Gemma2ForCausalLM, anchor: ActivationAnchor) -> Variant:
    """One of the compared variants. Nothing is frozen, so that all train the same parameters."""
    if name in ("two_pass", "streaming"):
        return Variant(shield=GradientShield(model, anchor, dual_backward=name))
    if name in APPROXIMATE:
        return Variant(shield=GradientShield(model, anchor, **APPROXIMATE[name]))
    if name == "subspace":
        return Variant(held=HeldSubspace(model, anchor, energy=HELD, freeze=False))
    if name == "pairs":
        return Variant(held=HeldSubspace(model, anchor, sensitivity=HELD, freeze=False))
    return Variant()


def time_variants(arguments: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, float]]:
    """Median milliseconds of wall-clock time, and the median of the paired ratios of processor time to naive's."""
    model, batch, anchor = build(arguments, checkpointing)
    variants = {name: make(name, model, anchor) for name in VARIANTS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for variant in variants.values():
        step(model, batch, variant, optimizer)
    wall: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.repeats):
        for name, variant in variants.items():
            start = time.perf_counter(), time.process_time()
            step(model, batch, variant, optimizer)
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    return {
        name: {
            "step_ms": 1e3 * statistics.median(wall[name]),
            "processor_ratio": statistics.median(
                v / n for v, n in zip(processor[name], processor["naive"], strict=True)
            ),
        }
        for name in variants
    }


def resident_mb() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_memory(
    arguments: argparse.Namespace, checkpointing: bool, name: str, result: "multiprocessing.Queue"
) -> None:
    """
    Puts the rise of resident memory during steps, over model, anchor and optimiser at rest, into `result`: what the
    variant keeps between steps is part of it.
    """
    torch.set_num_threads(1)
    model, batch, anchor = build(arguments, checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step(model, batch, Variant(), optimizer)
    rest = resident_mb()
    peak = rest
    variant = make(name, model, anchor)
    step(model, batch, variant, optimizer)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_mb())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step(model, batch, variant, optimizer)
    done.set()
    watcher.join()
    result.put(peak - rest)


def measure_memory(arguments: argparse.Namespace, checkpointing: bool, name: str) -> float:
    """Peak memory of one variant in a fresh process whose allocator returns what it frees."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    process = context.Process(target=peak_memory, args=(arguments, checkpointing, name, queue))
    process.start()
    value = queue.get()
    process.join()
    return value


def main(progress: Callable[[str], None] = print) -> None:
    """Measures, prints a Markdown table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=280)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for checkpointing in (False, True):
        timings = time_variants(arguments, checkpointing)
        for name, timing in timings.items():
            memory = measure_memory(arguments, checkpointing, name)
            rows.append({"variant": name, "checkpointing": checkpointing, **timing, "peak_mb": memory})
    model, _, _ = build(arguments, False)
    layer_mb = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters()) / 2**20
    all_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    progress(
        f"Gemma2 decoder, width {arguments.width}, {arguments.layers} layers, {arguments.batch} × {arguments.tokens} "
        f"tokens, float32, {torch.get_num_threads()} threads on {platform.machine()}; torch {torch.__version__}. "
        f"Gradients: {layer_mb:.0f} MB a layer, {all_mb:.0f} MB in all.\n"
    )
    progress("| checkpointing | step | ms | × naive | × naive, processor | peak memory, MB | over naive, MB |")
    progress("|---|---|---|---|---|---|---|")
    for row in rows:
        naive = next(r for r in rows if r["variant"] == "naive" and r["checkpointing"] == row["checkpointing"])
        row["extra_mb"] = row["peak_mb"] - naive["peak_mb"]
        progress(
            f"| {'yes' if row['checkpointing'] else 'no'} | {row['variant']} | {row['step_ms']:.0f} | "
            f"{row['step_ms'] / naive['step_ms']:.2f} | {row['processor_ratio']:.2f} | {row['peak_mb']:.0f} | "
            f"{row['extra_mb']:+.0f} |"
        )
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        gradients = {"layer_mb": layer_mb, "all_mb": all_mb}
        arguments.output.write_text(json.dumps({"settings": settings, "gradients": gradients, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
