"""Plans as text: what a training takes, item by item, and where it fits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_aegis.training.planning.advice import Advice
from hf_aegis.training.planning.rehearsal import Rehearsal


GIB = 2**30
CAPACITIES = (24, 48, 80)
"""Memory of usual GPUs, in GiB."""
ALLOWANCE = GIB
"""
What a GPU's context, the libraries' workspaces and fragmentation are given beside the tensors, in bytes. An
assumption: it was not measured.
"""


@dataclass(frozen=True)
class ConditionPlan:
    """
    The plan of one training.

    Attributes:
        name (`str`): The condition's, or the recipe's.
        description (`str`): Model, batch, dtype, optimiser.
        plan ([`Rehearsal`]): At the recipe's batch.
        by_batch (`dict[int, dict[str, int]]`): Peak bytes of each phase, by the batch of a device.
        notes (`tuple[str, ...]`): What was assumed.
        advice (`list[Advice]`, *optional*): Where it was asked for.
    """

    name: str
    description: str
    plan: Rehearsal
    by_batch: Mapping[int, Mapping[str, int]]
    notes: tuple[str, ...] = ()
    advice: Sequence[Advice] | None = None

    def fits(self, gib: float) -> bool:
        """Whether it fits into so much memory."""
        return self.plan.peak.bytes + ALLOWANCE <= gib * GIB

    def to_dict(self, capacities: Sequence[float]) -> dict[str, Any]:
        """All figures; the largest batches where more than one was planned."""
        several = len(self.by_batch) > 1
        largest = {f"{gib:g}": largest_batch(self.by_batch, gib * GIB - ALLOWANCE) for gib in capacities if several}
        return {
            "name": self.name,
            "description": self.description,
            **self.plan.to_dict(),
            "peak_bytes_by_batch": {size: max(phases.values()) for size, phases in self.by_batch.items()},
            "fits": {f"{gib:g}": self.fits(gib) for gib in capacities},
            **({"largest_batch": largest} if several else {}),
            "notes": list(self.notes),
            **({} if self.advice is None else {"advice": [vars(advice) for advice in self.advice]}),
        }


def largest_batch(by_batch: Mapping[int, Mapping[str, int]], available: float) -> int:
    """
    The largest batch of which every phase fits, by straight lines through the planned ones.

    Args:
        by_batch (`Mapping[int, Mapping[str, int]]`):
            Peak bytes of each phase by batch, of two batches at least. Between them a line lies above a phase's peak,
            which is the largest of several linear terms; beyond the largest it may lie below.
        available (`float`): Bytes.

    Returns:
        `int`: 0 if not even one sample fits; the largest planned one if all fit and no phase depends on the batch.
    """
    most = _crossing(by_batch, available)
    return max(by_batch) if most == math.inf else max(0, math.floor(most))


def _crossing(by_batch: Mapping[int, Mapping[str, int]], available: float) -> float:
    """The batch at which the first phase takes all that is available; infinity if none ever does."""
    sizes = sorted(by_batch)
    phases = (([(size, by_batch[size][phase]) for size in sizes]) for phase in by_batch[sizes[0]])
    return min(_largest(peaks, available) for peaks in phases)


def _largest(peaks: list[tuple[int, int]], available: float) -> float:
    """The batch at which a line through a phase's peaks meets what is available; infinity if it never does."""
    above = next((index for index, (_, taken) in enumerate(peaks[1:], 1) if taken > available), len(peaks) - 1)
    (smaller, less), (larger, more) = peaks[above - 1], peaks[above]
    slope = (more - less) / (larger - smaller)
    if slope <= 0:
        return math.inf if more <= available else 0
    return smaller + (available - less) / slope


def itemised(plan: ConditionPlan, capacities: Sequence[float]) -> str:
    """The plan of one training, over several lines."""
    found = plan.plan
    width = max(len(name) for name in (*found.peak.items, *found.phases))
    lines = [
        f"{plan.name}: {plan.description}",
        f"{found.parameters:,} parameters, of which {found.trainable_parameters:,} train",
        "",
        f"peak {size(found.peak.bytes)}, in the phase {found.peak.phase!r}:",
        *(f"  {name:<{width}}  {size(count):>10}" for name, count in found.peak.items.items()),
        "",
        "peak of each phase:",
        *(f"  {name:<{width}}  {size(peak.bytes):>10}" for name, peak in found.phases.items()),
        "",
        f"operations of a step: {found.step_flops:.3g} "
        f"({', '.join(f'{name} {count:.3g}' for name, count in found.flops.items())})",
        "",
        *(_verdict(plan, gib) for gib in capacities),
    ]
    if plan.advice is not None:
        lines += ["", *advice_lines(plan.advice)]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def advice_lines(advice: Sequence[Advice]) -> list[str]:
    """What would lower the peak, a line each."""
    if not advice:
        return ["no option known here lowers the peak"]
    return ["what lowers the peak, each by itself:"] + [
        f"  {each.option}: {size(each.saved_bytes)} less, {size(each.peak_bytes)} (costs: {each.costs})"
        for each in advice
    ]


def size(count: float) -> str:
    """Bytes in the unit that suits."""
    if count < 2**20 / 10:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / GIB:.2f} GiB" if count >= GIB / 2 else f"{count / 2**20:.1f} MiB"


def _verdict(plan: ConditionPlan, gib: float) -> str:
    available = gib * GIB - ALLOWANCE
    most = largest_batch(plan.by_batch, available)
    if not most:
        return f"{gib:g} GiB: does not fit"
    about = "about" if _crossing(plan.by_batch, available) < math.inf else "at least"
    return f"{gib:g} GiB: {'fits' if plan.fits(gib) else 'does not fit'}; largest batch per device {about} {most}"
