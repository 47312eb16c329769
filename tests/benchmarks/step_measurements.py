"""Time and memory of one training step of each variant."""

import argparse
import multiprocessing
import os
import resource
import statistics
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from subjects import Subject, build
from torch import nn

from hf_aegis.gradients import GradientShield, HeldSubspace
from hf_aegis.training.planning.flop_log import FlopLog


VARIANTS = ("naive", "two_pass", "streaming", "streaming, share 0.25", "streaming, kept", "subspace", "pairs")
# "kept" is a step between two computations of the reference direction.
APPROXIMATE = {"streaming, share 0.25": {"reference_share": 0.25}, "streaming, kept": {"reference_interval": 10**6}}
HELD = 0.9  # share of the inputs' energy or of the predictions' sensitivity


class Variant(NamedTuple):
    """What goes around the backward pass, and what comes after the optimiser's step."""

    shield: GradientShield | None = None
    held: HeldSubspace | None = None


def make(name: str, subject: Subject) -> Variant:
    """One of the compared variants. Nothing is frozen for it, so that all train the same parameters."""
    if name in ("two_pass", "streaming"):
        return Variant(shield=GradientShield(subject.model, subject.anchor, dual_backward=name))  # type: ignore[arg-type]
    if name in APPROXIMATE:
        return Variant(shield=GradientShield(subject.model, subject.anchor, **APPROXIMATE[name]))
    if name == "subspace":
        return Variant(held=HeldSubspace(subject.answering, subject.anchor, energy=HELD, freeze=False))
    if name == "pairs":
        return Variant(held=HeldSubspace(subject.answering, subject.anchor, sensitivity=HELD, freeze=False))
    return Variant()


def step(subject: Subject, variant: Variant, optimizer: torch.optim.Optimizer) -> None:
    """One training step: forward and backward pass, clipping, AdamW, and what the variant adds."""
    with variant.shield or nullcontext():
        subject.loss().backward()
    torch.nn.utils.clip_grad_norm_(subject.model.parameters(), 1.0)
    optimizer.step()
    if variant.held is not None:
        variant.held()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def time_variants(arguments: argparse.Namespace, checkpointing: bool) -> dict[str, Any]:
    """
    For each variant median milliseconds, medians of the ratios to the naive step of the same round, tokens per second,
    and the share of the rate of a matrix product, which is timed in each round too.
    """
    subject = build(arguments, checkpointing)
    variants = {name: make(name, subject) for name in arguments.variants}
    optimizer = optimizer_of(subject.model)
    flops = {}
    for name, variant in variants.items():
        if name == "streaming, kept":
            # What is kept from a first step is no work of those that are timed.
            step(subject, variant, optimizer)
        with FlopLog() as log:
            step(subject, variant, optimizer)
        flops[name] = sum(log.flops.values())
    wall: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    rates = []
    for _ in range(arguments.repeats):
        rates.append(_matrix_rate(subject, arguments))
        for name, variant in variants.items():
            _wait(arguments)
            start = time.perf_counter(), time.process_time()
            step(subject, variant, optimizer)
            _wait(arguments)
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    rate = statistics.median(rates)
    on_gpu = arguments.device == "cuda"
    found = {}
    for name in variants:
        seconds = statistics.median(wall[name])
        found[name] = {
            "step_ms": 1e3 * seconds,
            "wall_ratio": _ratio(wall[name], wall["naive"]),
            "processor_ratio": None if on_gpu else _ratio(processor[name], processor["naive"]),
            "tokens_per_second": subject.tokens / seconds,
            "flops": flops[name],
            "share_of_matrix_rate": flops[name] / seconds / rate,
        }
    return {"variants": found, "matrix_flops_per_second": rate}


def _ratio(times: list[float], naive: list[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(times, naive, strict=True))


def _wait(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def _matrix_rate(subject: Subject, arguments: argparse.Namespace, seconds: float = 0.1) -> float:
    """Operations per second of the product of a layer's size, for some time."""
    dtype = torch.bfloat16 if arguments.autocast else getattr(torch, arguments.dtype)
    options = {"device": arguments.device, "dtype": dtype}
    left = torch.randn(subject.tokens, subject.width, **options)
    right = torch.randn(subject.width, 4 * subject.width, **options)
    left @ right
    _wait(arguments)
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        left @ right
        count += 1
        _wait(arguments)
    return 2 * subject.tokens * subject.width * 4 * subject.width * count / passed


def measure_memory(arguments: argparse.Namespace, checkpointing: bool, name: str) -> float:
    """
    The rise of memory in MB during steps, over model, anchor and optimiser at rest; what the variant keeps between
    steps is part of it. Each in a fresh process, whose allocator on the host returns what it frees.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    before = {key: os.environ.get(key) for key in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    os.environ.update(dict.fromkeys(before, "65536"))
    try:
        process = context.Process(target=_peak_memory, args=(arguments, checkpointing, name, queue))
        process.start()
        while process.is_alive() and queue.empty():
            process.join(0.5)
        if queue.empty():
            raise RuntimeError(f"measuring the memory of {name} ended with exit code {process.exitcode}")
        value = queue.get()
        process.join()
    finally:
        for key, old in before.items():
            if old is None:
                del os.environ[key]
            else:
                os.environ[key] = old
    return value


def _peak_memory(arguments: argparse.Namespace, checkpointing: bool, name: str, result: Any) -> None:
    torch.set_num_threads(1)
    subject = build(arguments, checkpointing)
    optimizer = optimizer_of(subject.model)
    step(subject, Variant(), optimizer)
    rest = _held_mb(arguments)
    variant = make(name, subject)
    step(subject, variant, optimizer)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(subject, variant, optimizer)
        result.put(torch.cuda.max_memory_allocated() / 2**20 - rest)
        return
    peak, done = rest, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _held_mb(arguments))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step(subject, variant, optimizer)
    done.set()
    watcher.join()
    result.put(peak - rest)


def _held_mb(arguments: argparse.Namespace) -> float:
    if arguments.device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
