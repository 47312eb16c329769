"""
Step time of routed experts (VLA-GSE) against peft's LoRA of the same rank on the same layers, as ratios, and of the
same experts written as a loop over experts, as in the authors' code.

All variants take turns in one process, so that the machine's drift hits them alike; a ratio is the median over
repetitions of the paired ratios. Beside wall-clock time stand ratios of processor time, which other work on the
machine disturbs less; on a GPU, whose work is waited for before the clock is read, they mean nothing and are left out.
Prints a Markdown table, which is put on the machine's page in `tests/benchmarks/results/`.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from decoder import random_decoder
from machine_results import MachineResults
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma2ForCausalLM

from hf_aegis import GSEConfig
from hf_aegis.functional.expert_routing import load_balance_loss
from hf_aegis.functional.spectral_experts import expert_ranks
from hf_aegis.tuners.gse import GSELayer


VARIANTS = ("base", "lora", "gse", "gse_loop")


class LoopOverExperts(nn.Module):
    """
    The experts of a [`GSELayer`] one after the other, each on the tokens it gets, selected by index: the formulation
    of the authors' code. Parameters are the layer's own.

    Args:
        layer ([`GSELayer`]): With one adapter.
    """

    def __init__(self, layer: GSELayer, adapter: str = "default") -> None:
        super().__init__()
        self.layer, self.config = layer, layer.gse_config[adapter]
        self.ranks = expert_ranks(self.config.r, self.config.num_experts)
        self.adapter = adapter
        self.balance_loss: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        layer, config, adapter = self.layer, self.config, self.adapter
        flat = inputs.reshape(-1, inputs.shape[-1])
        output = layer.get_base_layer()(flat)
        narrow = flat.to(layer.gse_A[adapter].dtype)
        # The authors take the adjustment off the weight; here the weight is shared, so it costs two thin products.
        result = -functional.linear(
            functional.linear(narrow, layer.gse_backbone_A[adapter]), layer.gse_backbone_B[adapter]
        )
        scales = layer.gse_scaling[adapter]
        downs, ups = layer.gse_A[adapter].split(self.ranks), layer.gse_B[adapter].split(self.ranks, dim=1)
        for index in range(config.num_generalized):
            expert = functional.linear(functional.linear(narrow, downs[index]), ups[index])
            result = result + scales[index] / config.num_generalized * expert
        probabilities = functional.linear(narrow, layer.gse_router[adapter]).float().softmax(-1)
        weights, chosen = probabilities.topk(config.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        for number in range(config.num_specialized):
            index = config.num_generalized + number
            tokens, place = torch.where(chosen == number)
            expert = functional.linear(functional.linear(narrow[tokens], downs[index]), ups[index])
            gate = (weights[tokens, place, None] * scales[index]).to(expert.dtype)
            result = result.index_add(0, tokens, (gate * expert).to(result.dtype))
        load = torch.bincount(chosen.flatten(), minlength=config.num_specialized) / len(flat)
        self.balance_loss = load_balance_loss(load, probabilities.mean(0))
        return (output + result.to(output.dtype)).reshape(*inputs.shape[:-1], -1)


def build(arguments: argparse.Namespace) -> Gemma2ForCausalLM:
    """The decoder, where and how the arguments say."""
    model = random_decoder(arguments.width, arguments.layers, arguments.tokens)
    model.to(arguments.device, getattr(torch, arguments.dtype))
    if arguments.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def make(name: str, arguments: argparse.Namespace) -> nn.Module:
    """One of the compared variants; `base` trains the embeddings alone, so that gradients pass all layers."""
    model = build(arguments)
    if name == "base":
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)
        return model
    config: Any = LoraConfig(r=arguments.rank, target_modules="all-linear")
    if name != "lora":
        config = GSEConfig(r=arguments.rank, num_experts=arguments.experts, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    if name == "gse_loop":
        base = adapted.get_base_model()
        for path, layer in [(n, m) for n, m in base.named_modules() if isinstance(m, GSELayer)]:
            parent, _, attribute = path.rpartition(".")
            setattr(base.get_submodule(parent), attribute, LoopOverExperts(layer))
    return adapted


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """The balance of the last forward pass, where there are experts."""
    if not isinstance(model, PeftModel) or not isinstance(model.peft_config["default"], GSEConfig):
        return 0.0
    loops = [module for module in model.modules() if isinstance(module, LoopOverExperts)]
    if not loops:
        return model.get_auxiliary_loss()
    return loops[0].config.router_aux_loss_coef * sum(loop.balance_loss for loop in loops)


def step(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer) -> float:
    """One training step, and its loss."""
    loss = model(**batch).loss + auxiliary_loss(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of the step's time, and of the paired ratios to LoRA's."""
    ids = torch.randint(512, (arguments.batch, arguments.tokens), device=arguments.device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    models = {name: make(name, arguments) for name in VARIANTS}
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(parameters, lr=1e-5) for name, parameters in trained.items()}
    losses = {name: step(model, batch, optimizers[name]) for name, model in models.items()}
    # Two ways to compute the same.
    if abs(losses["gse"] - losses["gse_loop"]) > 2e-2 * losses["gse"]:
        raise AssertionError(f"the loop computes something else: {losses}")
    wall: dict[str, list[float]] = {name: [] for name in models}
    processor: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.repeats):
        for name, model in models.items():
            start = time.perf_counter(), time.process_time()
            step(model, batch, optimizers[name])
            if ids.is_cuda:
                torch.cuda.synchronize()
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return statistics.median(mine / lora for mine, lora in zip(times[name], times["lora"], strict=True))

    return [
        {
            "variant": name,
            "step_ms": 1e3 * statistics.median(wall[name]),
            "wall_ratio": ratio(wall, name),
            "processor_ratio": None if ids.is_cuda else ratio(processor, name),
            "trainable_parameters": sum(p.numel() for p in trained[name]),
        }
        for name in models
    ]


def main() -> None:
    """Measures, prints a Markdown table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=280)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--again", action="store_true", help="measure anew what was measured with these settings")
    arguments = parser.parse_args()
    settings = {name: value for name, value in vars(arguments).items() if name != "again"}
    settings["threads"] = torch.get_num_threads()
    results = MachineResults(arguments.device)
    section = results.section("Routed experts", settings, arguments.again)
    rows = results.unit(section, "time", lambda: measure(arguments))
    lines = [
        "",
        f"Gemma2 decoder, width {arguments.width}, {arguments.layers} layers, {arguments.batch} × {arguments.tokens} "
        f"tokens, {arguments.dtype}, all linear layers, rank {arguments.rank}, {arguments.experts} experts, "
        f"{settings['threads']} threads, {'with' if arguments.checkpointing else 'without'} checkpointing.",
        "",
        "| step | ms | × LoRA | × LoRA, processor | trained parameters |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        processor = "–" if row["processor_ratio"] is None else f"{row['processor_ratio']:.2f}"
        lines.append(
            f"| {row['variant']} | {row['step_ms']:.0f} | {row['wall_ratio']:.2f} | {processor} | "
            f"{row['trainable_parameters']:,} |"
        )
    results.show(section, lines)
    print("\n".join(lines))
    print(f"\n{results.page}")


if __name__ == "__main__":
    main()
