"""
Step time and peak memory of the ways of keeping knowledge, as ratios to a naive step: AEGIS's dual backward in its two
forms, held input subspaces, and held pairs of directions; with and without activation checkpointing.

For time, all variants take turns in one process, so that the machine's drift hits them alike; beside wall-clock time
stand ratios of processor time, which other work on the machine disturbs less, and the rate of a large matrix product,
timed in the same rounds. On a CPU every variant runs in a process of its own for peak memory, the rise of resident
memory over model and optimiser at rest; on a GPU it is that of allocated memory.

What is measured is kept unit by unit, so that an interrupted run goes on where it was; `--only time` and `--only
memory` split it. The tables of a machine are a page in `tests/benchmarks/results/`. Sizes: `default`, a decoder whose
layers outweigh the rest; `small`, to see that all works; `paligemma2-3b` and `pi0`, the policies' real shapes with
random weights, on a GPU alone; `paligemma2-3b-slice` and `pi0-slice`, their real widths with two layers of the decoder
and the same share of the other parts' layers, one sample of two cameras. A slice's embeddings are small: the flow loss
looks few of them up and multiplies nothing with them.
"""

import argparse
import os
import sys
from typing import Any

import torch
from machine_results import MachineResults
from step_measurements import VARIANTS, measure_memory, time_variants


# Collecting held directions at full width takes far longer than the steps; they can be asked for.
_FORMS = ["naive", "two_pass", "streaming"]
_GPU = {"batch": 4, "repeats": 9, "device": "cuda", "variants": _FORMS}
# Weights in float32, computed in bfloat16, as the recipes are; two layers of the decoder.
_SLICE = {"batch": 1, "layers": 2, "repeats": 3, "autocast": True, "variants": _FORMS}
SIZES: dict[str, dict[str, Any]] = {
    "default": {"width": 512, "layers": 8, "batch": 4, "tokens": 280, "repeats": 9},
    "small": {"width": 64, "layers": 2, "batch": 2, "tokens": 32, "repeats": 2},
    "paligemma2-3b": {"text_tokens": 24, "dtype": "bfloat16", **_GPU},
    "paligemma2-3b-slice": {"text_tokens": 24, "vocabulary": 4096, "checkpointing": "yes", **_SLICE},
    # Its layers do not write the cache that its expert reads where they are checkpointed.
    "pi0": {"text_tokens": 32, "layers": 18, "vocabulary": 257152, "checkpointing": "no", "autocast": True, **_GPU},
    "pi0-slice": {"text_tokens": 32, "vocabulary": 2048, "checkpointing": "no", **_SLICE},
}
_NEVER_SETTINGS = ("only", "again")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what it leaves open is the size's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="default")
    for name in ("width", "layers", "batch", "tokens", "text_tokens", "vocabulary", "repeats"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", choices=("yes", "no"), help="default: both, but for a slice")
    parser.add_argument("--autocast", action="store_true", default=None, help="compute in bfloat16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--only", choices=("time", "memory"), help="a part; the other can follow")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured with these settings")
    arguments = parser.parse_args(argv)
    defaults = {"device": "cpu", "dtype": "float32", "variants": list(VARIANTS)} | SIZES[arguments.size]
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if "naive" not in arguments.variants:
        parser.error("--variants: naive is what the others are compared with")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--size {arguments.size} on cuda: this machine has no GPU that PyTorch can use")
    if SIZES[arguments.size].get("device") == "cuda" and arguments.device != "cuda":
        parser.error(f"--size {arguments.size}: needs a GPU; a step takes minutes on a CPU")
    if arguments.size.startswith("pi0") and arguments.checkpointing != "no":
        parser.error(f"--size {arguments.size}: π0 trains without checkpointing alone")
    return arguments


def main(argv: list[str] | None = None, results: MachineResults | None = None) -> None:
    """Measures what is missing, prints the Markdown table and puts it on the machine's page."""
    arguments = parse(argv)
    settings = {n: v for n, v in vars(arguments).items() if n not in _NEVER_SETTINGS and v is not None}
    settings["threads"] = torch.get_num_threads()
    results = results or MachineResults(arguments.device)
    title = f"Training steps, {arguments.size}"
    section = results.section(title, settings, arguments.again)
    for checkpointing in (name == "yes" for name in ("no", "yes") if arguments.checkpointing in (name, None)):
        suffix = ", checkpointed" if checkpointing else ""
        if arguments.only != "memory":
            results.unit(section, f"time{suffix}", lambda c=checkpointing: time_variants(arguments, c))
        for name in arguments.variants if arguments.only != "time" else ():
            results.unit(
                section, f"memory of {name}{suffix}", lambda c=checkpointing, n=name: measure_memory(arguments, c, n)
            )
        print(f"{title}{suffix}: measured", file=sys.stderr, flush=True)
    lines = table(section["units"], settings)
    results.show(section, lines)
    print("\n".join(lines))
    print(f"\n{results.page}")


def table(units: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Markdown of what was measured."""
    given = [name for name in ("width", "layers", "batch", "tokens", "text_tokens", "vocabulary") if name in settings]
    sizes = ", ".join(f"{name} {settings[name]}" for name in given)
    lines = [
        "",
        f"{sizes}, {settings['dtype']}{' computed in bfloat16' * settings.get('autocast', False)}, "
        f"{settings['threads']} threads, load average "
        f"{os.getloadavg()[0]:.1f} when written.",
        "",
        "| checkpointing | step | ms | × naive | × naive, processor | × naive, operations | tokens/s | share of the "
        "matrix rate | peak memory, MB | over naive, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for suffix in ("", ", checkpointed"):
        times = units.get(f"time{suffix}", {}).get("variants", {})
        naive, least = times.get("naive"), units.get(f"memory of naive{suffix}")
        for name in settings["variants"]:
            time, memory = times.get(name), units.get(f"memory of {name}{suffix}")
            cells = ["–"] * 6
            if time is None and memory is None:
                continue
            if time is not None and naive is not None:
                ratio = time["processor_ratio"]
                cells = [
                    f"{time['step_ms']:.0f}",
                    f"{time['wall_ratio']:.2f}",
                    "–" if ratio is None else f"{ratio:.2f}",
                    f"{time['flops'] / naive['flops']:.2f}",
                    f"{time['tokens_per_second']:.0f}",
                    f"{100 * time['share_of_matrix_rate']:.0f} %",
                ]
            cells.append("–" if memory is None else f"{memory:.0f}")
            cells.append("–" if memory is None or least is None else f"{memory - least:+.0f}")
            lines.append(f"| {'yes' if suffix else 'no'} | {name.replace('_', '-')} | {' | '.join(cells)} |")
    for suffix in ("", ", checkpointed"):
        if found := units.get(f"time{suffix}"):
            rate = found["matrix_flops_per_second"]
            lines += ["", f"Matrix rate{suffix}: {rate / 1e9:.4g} GFLOP/s, the median of the same rounds."]
    return lines


if __name__ == "__main__":
    main()
