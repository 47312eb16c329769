"""Plans as text: what a training takes, item by item, and where it fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_aegis.training.planning.advice import Advice
from hf_aegis.training.planning.largest_batch import largest_batch
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
        batch (`int`): The recipe's, of a device.
        by_batch (`dict[int, Rehearsal]`):
            The plan of that batch, and of more where the largest that fits is to be told, from the two largest.
        notes (`tuple[str, ...]`): What was assumed.
        advice (`list[Advice]`, *optional*): Where it was asked for.
    """

    name: str
    description: str
    batch: int
    by_batch: Mapping[int, Rehearsal]
    notes: tuple[str, ...] = ()
    advice: Sequence[Advice] | None = None

    @property
    def plan(self) -> Rehearsal:
        """Of the recipe's batch."""
        return self.by_batch[self.batch]

    def fits(self, gib: float) -> bool:
        """Whether it fits into so much memory."""
        return self.plan.peak.bytes + ALLOWANCE <= gib * GIB

    def largest_batch(self, gib: float) -> int | None:
        """
        The largest batch that fits into so much memory: 0 if none does, `None` if memory does not depend on it.

        Raises:
            ValueError: If it is not to be told from the plans that there are.
        """
        most = largest_batch(
            {size: self.by_batch[size].held for size in sorted(self.by_batch)[-2:]}, gib * GIB - ALLOWANCE
        )
        if most is None:
            return None
        # The recipe's own batch was planned by itself, also where it is a single sample, which is not on the lines.
        return max(most, self.batch) if self.fits(gib) else min(most, self.batch - 1)

    def to_dict(self, capacities: Sequence[float]) -> dict[str, Any]:
        """All figures; the largest batches where more than one was planned."""
        several = len(self.by_batch) > 1
        largest = {f"{gib:g}": self.largest_batch(gib) for gib in capacities if several}
        return {
            "name": self.name,
            "description": self.description,
            **self.plan.to_dict(),
            "peak_bytes_by_batch": {size: plan.peak.bytes for size, plan in self.by_batch.items()},
            "fits": {f"{gib:g}": self.fits(gib) for gib in capacities},
            **({"largest_batch": largest} if several else {}),
            "notes": list(self.notes),
            **({} if self.advice is None else {"advice": [vars(advice) for advice in self.advice]}),
        }


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
    fits = "fits" if plan.fits(gib) else "does not fit"
    most = plan.largest_batch(gib)
    if most is None:
        return f"{gib:g} GiB: {fits}, whatever the batch"
    return f"{gib:g} GiB: {fits}" + (f"; largest batch per device {most}" if most else "")
