"""
Rounding errors against float64: of moments, penalty, inner products, projection and held weights, by the dtype of what
they are computed from, its size, and how many standard deviations its mean is away from zero (ρ).

What is rounded before anything is computed (hidden states in bfloat16) is no error of the computation: float64 is
given the rounded numbers. Writes the page `tests/benchmarks/results/precision.md`.
"""

import argparse
import datetime
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from machine_results import TABLES, machine_name, versions
from torch import Tensor, nn

from hf_aegis.atomic_files import write_text
from hf_aegis.functional.bures import apply_penalty_gradient, penalty_gradient_coefficients, squared_wasserstein
from hf_aegis.functional.inner_product import inner_product
from hf_aegis.functional.moments import masked_moments
from hf_aegis.gradients.combiners import OneSidedGramSchmidt, group_scalars
from hf_aegis.gradients.held_weight import HeldWeight
from hf_aegis.gradients.projector import bend


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATIOS = (0, 10, 1000)
SIZES = ((100, 128), (10_000, 128), (1_000_000, 128), (100, 2304), (10_000, 2304))
"""Tokens and width."""
PAIRS = ((128, 32), (2304, 512))
"""Width of a held weight, and how many directions are held."""
STEPS = 20


def name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of Markdown; floats as powers of ten with one digit."""
    shown = [[f"{cell:.0e}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    header = list(header)
    return ["", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *shown)), ""]


def hidden_states(tokens: int, width: int, ratio: float, dtype: torch.dtype) -> Tensor:
    """`(1, tokens, width)` with a standard deviation of one, before rounding."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, tokens, width, generator=generator) + ratio).to(dtype)


def exact_moments(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, and in parts, so that no copy of everything is in float64."""
    parts = hidden[0].split(10_000)
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / hidden.shape[1]
    squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts]).sum(dim=0)
    return mean, squares / hidden.shape[1]


def spread(moments: tuple[Tensor, Tensor]) -> Tensor:
    """Which dimensions vary: in half precision and far from zero, a few values are all that there is, or one."""
    return moments[1] > 0


def moments_rows() -> Iterator[list[object]]:
    """Largest errors over the dimensions."""
    for dtype in DTYPES:
        for ratio in RATIOS:
            for tokens, width in SIZES:
                hidden = hidden_states(tokens, width, ratio, dtype)
                exact = exact_moments(hidden)
                varies = spread(exact)
                mean, variance, _ = masked_moments(hidden)
                naive = hidden.float().square().mean(dim=(0, 1)) - hidden.float().mean(dim=(0, 1)).square()
                yield [
                    name(dtype),
                    ratio,
                    f"{tokens:,}",
                    width,
                    float(((mean - exact[0]).abs() / exact[1].sqrt())[varies].max()),
                    float((variance / exact[1] - 1).abs()[varies].max()),
                    float((naive / exact[1] - 1).abs()[varies].max()),
                ]


def penalty_rows(tokens: int = 10_000, width: int = 2304) -> Iterator[list[object]]:
    """At a tenth of a standard deviation from the anchor, as in training."""
    for dtype in DTYPES:
        for ratio in RATIOS:
            hidden = hidden_states(tokens, width, ratio, dtype)
            exact = exact_moments(hidden)
            anchor = exact[0] + 0.1 * exact[1].sqrt(), 1.2 * exact[1]
            wide = penalty_gradient_coefficients(*exact, torch.tensor(float(tokens)).double(), *anchor)
            expected = apply_penalty_gradient(hidden.double(), None, *wide)
            mean, variance, count = masked_moments(hidden)
            stored = anchor[0].float(), anchor[1].float()
            coefficients = penalty_gradient_coefficients(mean, variance, count, *stored)
            distance = float(sum(squared_wasserstein(mean, variance, *stored)))
            yield [
                name(dtype),
                ratio,
                abs(distance / float(sum(squared_wasserstein(*exact, *anchor))) - 1),
                relative(apply_penalty_gradient(hidden.float(), None, *coefficients), expected),
                relative(apply_penalty_gradient(hidden, None, *coefficients), expected),
            ]


def relative(found: Tensor, expected: Tensor) -> float:
    """Of the norm."""
    return float((found.double() - expected).norm() / expected.norm())


def inner_product_rows() -> Iterator[list[object]]:
    """Squared norms of numbers between 0 and 1: all terms have one sign, so that errors add up."""
    for dtype in DTYPES:
        for power in (4, 6, 8):
            values = torch.rand(10**power, generator=torch.Generator().manual_seed(0)).to(dtype)
            exact = sum(float(part.double().square().sum()) for part in values.split(1_000_000))
            once = float(torch.dot(values.float(), values.float()))
            yield [name(dtype), f"10^{power}", abs(float(inner_product(values, values)) / exact - 1), once / exact - 1]


def projection_rows(elements: int = 2304 * 2304) -> Iterator[list[object]]:
    """A gradient that conflicts with its reference at a cosine of −0.45."""
    for dtype in DTYPES:
        task, reference = torch.randn(2, elements, generator=torch.Generator().manual_seed(0))
        task, reference = (task - 0.5 * reference).to(dtype), reference.to(dtype)
        wide, other = task.double(), reference.double()
        exact = wide - (wide @ other) / (other @ other) * other
        bent = task.clone()
        bend(bent, reference, OneSidedGramSchmidt()(*group_scalars([task], [reference])))
        rounded = exact.to(dtype)
        cosines = [float(g.double() @ other / (g.double().norm() * other.norm())) for g in (bent, rounded)]
        yield [name(dtype), relative(bent, exact), relative(rounded, exact), *(abs(cosine) for cosine in cosines)]


def held_rows() -> Iterator[list[object]]:
    """What AdamW-like updates of a hundredth of the weights' size leave after each restoration."""
    for dtype in DTYPES:
        for width, rank in PAIRS:
            generator = torch.Generator().manual_seed(0)
            linear = nn.Linear(width, width, bias=False, dtype=dtype)
            basis = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]
            held = HeldWeight(linear, basis.float())
            target = linear.weight.detach().double() @ basis
            size = float(linear.weight.detach().double().square().mean().sqrt())
            deviations = []
            for _ in range(STEPS):
                with torch.no_grad():
                    linear.weight += (0.01 * size * torch.randn(width, width, generator=generator)).to(dtype)
                held.restore()
                deviations.append(relative(linear.weight.detach().double() @ basis, target))
            yield [name(dtype), width, rank, deviations[0], deviations[-1]]


def prose(*sentences: str) -> list[str]:
    """A paragraph, in lines."""
    return ["", *textwrap.wrap(" ".join(sentences), 120)]


def page() -> list[str]:
    """All tables, measured now."""
    packages = ", ".join(f"{package} {number}" for package, number in versions().items())
    return [
        "# Rounding errors",
        *prose(
            f"`tests/benchmarks/precision.py` on {datetime.date.today().isoformat()}, {machine_name('cpu')};",
            f"{packages}.",
            "All errors are against float64 for the same inputs; ρ is how many standard deviations the mean is away",
            "from zero before hidden states are rounded to their dtype. One rounding is 6e-08 in float32, 4e-03 in",
            "bfloat16 and 5e-04 in float16.",
        ),
        "",
        "## Moments of hidden states",
        *prose(
            "Largest errors over the dimensions. The last column is what a variance from the difference of mean",
            "squares and squared means would be off by.",
        ),
        *table(
            ["inputs", "ρ", "tokens", "width", "mean, in standard deviations", "variance, relative", "naive variance"],
            moments_rows(),
        ),
        "## Transport penalty and its gradient",
        *prose(
            "10,000 tokens of width 2304, a tenth of a standard deviation from the anchor. The gradient is computed",
            "in float32, and handed to autograd in the hidden states' dtype. In float16 it vanishes, hence a shield",
            "refuses float16.",
        ),
        *table(["inputs", "ρ", "W, relative", "gradient in float32", "gradient as handed on"], penalty_rows()),
        "## Inner products of gradients",
        *prose("Squared norms; beside them one `torch.dot` of all terms in float32."),
        *table(["gradients", "elements", "error", "one dot product"], inner_product_rows()),
        "## Projection",
        *prose(
            "A gradient of 2304² elements, projected off what it conflicts with (cosine −0.45), and the exact result",
            "rounded once.",
        ),
        *table(
            ["gradients", "error", "rounded once", "cosine that is left", "left by rounding once"], projection_rows()
        ),
        "## Held weights",
        *prose("‖WU − C‖ / ‖C‖ after restorations, each after an update of a hundredth of the weights' size."),
        *table(["weights", "width", "directions", "after 1", f"after {STEPS}"], held_rows()),
    ]


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLES / "precision.md")
    arguments = parser.parse_args()
    lines = page()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, "\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
