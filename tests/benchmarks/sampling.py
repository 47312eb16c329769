"""
Latency of `sample_actions`: the vision-language model's pass, and ten Euler steps of the expert with the
cross-attention's keys and values kept from step to step, with them computed again at every step, and compiled.

All variants take turns in one process, so that the machine's drift hits them alike; a ratio is the median over
repetitions of the paired ratios of processor time, which other work on the machine disturbs less than wall-clock time
(on a GPU, whose work is waited for before the clock is read, of wall-clock time). Weights are random. By default
language model and expert have about the proportions of PaliGemma2-3B and the default expert. Prints a Markdown table,
which is put on the machine's page in `tests/benchmarks/results/`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine_results import MachineResults
from torch import Tensor
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from hf_aegis.functional.flow_matching import euler_integrate
from hf_aegis.models import PaliGemmaFlowForAction


IMAGE_TOKEN = 511
VARIANTS = ("prefix", "cached", "recomputed", "compiled")


def build(arguments: argparse.Namespace) -> PaliGemmaFlowForAction:
    """A policy with random weights."""
    torch.manual_seed(0)
    text = Gemma2Config(
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=arguments.width // 8,
        query_pre_attn_scalar=arguments.width // 8,
        vocab_size=512,
    )
    vision = SiglipVisionConfig(
        hidden_size=arguments.vision_width,
        intermediate_size=4 * arguments.vision_width,
        num_hidden_layers=arguments.vision_layers,
        num_attention_heads=8,
        image_size=224,
        patch_size=14,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=arguments.width,
        image_token_index=IMAGE_TOKEN,
        vocab_size=512,
    )
    config._attn_implementation = "eager"
    model = PaliGemmaFlowForAction.from_vlm(
        PaliGemmaForConditionalGeneration(config),
        expert_hidden_size=arguments.expert_width,
        expert_num_layers=arguments.expert_layers,
        expert_num_heads=8,
        expert_intermediate_size=4 * arguments.expert_width,
    )
    return model.to(arguments.device, getattr(torch, arguments.dtype)).eval()


class Sampling:
    """
    The parts of one call of `sample_actions`, on a batch.

    Args:
        model ([`PaliGemmaFlowForAction`]): The policy.
        compiled (`Callable`): Its expert, compiled.
        batch (`int`): Observations at once.
        arguments (`argparse.Namespace`): Of the command line.
    """

    def __init__(self, model: PaliGemmaFlowForAction, compiled: Callable, batch: int, arguments: argparse.Namespace):
        self.model, self.compiled, self.steps = model, compiled, arguments.steps
        generator = torch.Generator().manual_seed(1)
        config, device, dtype = model.config, arguments.device, getattr(torch, arguments.dtype)
        image_tokens = torch.full((batch, config.text_config.num_image_tokens), IMAGE_TOKEN)
        words = torch.randint(3, 500, (batch, arguments.words), generator=generator)
        self.prompt = {
            "input_ids": torch.cat([image_tokens, words], dim=1).to(device),
            "pixel_values": torch.randn(batch, 3, 224, 224, generator=generator).to(device, dtype),
        }
        self.state = torch.randn(batch, config.state_dim, generator=generator).to(device, dtype)
        self.noise = torch.randn(batch, config.chunk_size, config.action_dim, generator=generator).to(device)
        self.outputs, self.mask = model._encode(**self.prompt, attention_mask=None, token_type_ids=None)
        self.cache = self.encode()

    def encode(self) -> Any:
        """The keys and values of the vision-language model's output."""
        return self.model.action_expert.encode_context(self.outputs.last_hidden_state, self.mask)

    def prefix(self) -> Any:
        """The vision-language model, and the keys and values of its output."""
        outputs, mask = self.model._encode(**self.prompt, attention_mask=None, token_type_ids=None)
        return self.model.action_expert.encode_context(outputs.last_hidden_state, mask)

    def cached(self) -> Tensor:
        """All Euler steps, as in `sample_actions`."""
        return self.model.action_expert.sample(self.noise, self.cache, self.state, self.steps)

    def recomputed(self) -> Tensor:
        """The same without keeping anything from step to step."""
        return euler_integrate(
            lambda x, t: self.model.action_expert(x, t, self.state, self.outputs.last_hidden_state, self.mask).float(),
            self.noise,
            self.steps,
        )

    def with_compiled(self) -> Tensor:
        """With kept keys and values, and the expert compiled."""
        return euler_integrate(
            lambda x, t: self.compiled(x, t, self.state, cache=self.cache).float(), self.noise, self.steps
        )


@torch.no_grad()
def measure(sampling: Sampling, repeats: int) -> dict[str, Any]:
    """Medians of milliseconds, and of paired ratios to ten steps with kept keys and values."""
    parts = dict(
        zip(VARIANTS, (sampling.prefix, sampling.cached, sampling.recomputed, sampling.with_compiled), strict=True)
    )
    expected = sampling.cached()
    for name in ("recomputed", "compiled"):
        # Ways to compute the same; compiles and warms up, too.
        torch.testing.assert_close(parts[name](), expected, rtol=1e-2, atol=1e-2)
    on_gpu = expected.is_cuda
    wall: dict[str, list[float]] = {name: [] for name in parts}
    processor: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.perf_counter(), time.process_time()
            part()
            if on_gpu:
                torch.cuda.synchronize()
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    times = wall if on_gpu else processor
    ratios = {
        name: statistics.median(mine / cached for mine, cached in zip(times[name], times["cached"], strict=True))
        for name in parts
    }
    share = statistics.median(
        prefix / (prefix + expert) for prefix, expert in zip(times["prefix"], times["cached"], strict=True)
    )
    return {
        "batch": len(sampling.noise),
        "ms": {name: 1e3 * statistics.median(values) for name, values in wall.items()},
        "ratio_to_cached": ratios,
        "prefix_share": share,
    }


def main() -> None:
    """Measures, prints a Markdown table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vision_width", type=int, default=128)
    parser.add_argument("--vision_layers", type=int, default=4)
    parser.add_argument("--expert_width", type=int, default=128)
    parser.add_argument("--expert_layers", type=int, default=3)
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; inductor needs a C++ compiler")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--again", action="store_true", help="measure anew what was measured with these settings")
    arguments = parser.parse_args()
    settings = {name: value for name, value in vars(arguments).items() if name != "again"}
    settings["threads"] = torch.get_num_threads()
    results = MachineResults(arguments.device)
    section = results.section("Sampling actions", settings, arguments.again)
    model = build(arguments)
    compiled = torch.compile(model.action_expert, backend=arguments.backend, fullgraph=True)
    with torch.no_grad():
        rows = [
            results.unit(
                section,
                f"batch {batch}",
                lambda batch=batch: measure(Sampling(model, compiled, batch, arguments), arguments.repeats),
            )
            for batch in arguments.batches
        ]
    lines = [
        "",
        f"PaliGemma 2 of width {arguments.width}, {arguments.layers} layers, 256 + {arguments.words} tokens; "
        f"expert of width {arguments.expert_width}, {arguments.expert_layers} layers, {arguments.steps} steps; "
        f"{arguments.dtype}, {settings['threads']} threads, {arguments.backend}, {arguments.repeats} rounds; "
        f"load average {os.getloadavg()[0]:.1f} when written.",
        "",
        "| batch | VLM, ms | expert, ms | ms per chunk | VLM's share | keys again at every step | compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms, ratios = row["ms"], row["ratio_to_cached"]
        lines.append(
            f"| {row['batch']} | {ms['prefix']:.0f} | {ms['cached']:.0f} | "
            f"{(ms['prefix'] + ms['cached']) / row['batch']:.0f} | {100 * row['prefix_share']:.0f} % | "
            f"× {ratios['recomputed']:.2f} | × {ratios['compiled']:.2f} |"
        )
    results.show(section, lines)
    print("\n".join(lines))
    print(f"\n{results.page}")


if __name__ == "__main__":
    main()
