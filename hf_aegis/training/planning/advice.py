"""Which options would lower a training's peak memory, and by how much."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.planning.rehearsal import Rehearsal, rehearse
from hf_aegis.training.planning.workload import Workload


_EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit")
# Below this share of the peak an option is not worth a line.
_WORTH = 0.01


class Changeable(Workload, Protocol):
    """A [`Workload`] that can be had with other arguments."""

    def changed(self, args: dict[str, Any], cast: torch.dtype | None = None) -> "Changeable":
        """The same with other fields of its arguments, or with its weights in another dtype."""
        ...


@dataclass(frozen=True)
class Advice:
    """
    An option, and the peak with it.

    Attributes:
        option (`str`): What to set.
        peak_bytes (`int`): The peak then.
        saved_bytes (`int`): How much lower that is.
        costs (`str`): What is given for it.
    """

    option: str
    peak_bytes: int
    saved_bytes: int
    costs: str


def advise(workload: Changeable, plan: Rehearsal, device: str = "cuda", evaluates: bool = True) -> list[Advice]:
    """
    Goes through the step again with each option that may lower the peak and is not taken yet, one at a time.

    Args:
        workload ([`Changeable`]): The training.
        plan ([`Rehearsal`]): Of it as it is.
        device, evaluates: As of [`rehearse`].

    Returns:
        `list[Advice]`: Those that save more than a hundredth of the peak, the most saving first.
    """
    found = []
    for option, costs, make in _options(workload):
        peak = rehearse(make(), device, evaluates).peak.bytes
        saved = plan.peak.bytes - peak
        if saved > _WORTH * plan.peak.bytes:
            found.append(Advice(option, peak, saved, costs))
    return sorted(found, key=lambda advice: -advice.saved_bytes)


def _options(workload: Changeable) -> Iterator[tuple[str, str, Callable[[], Changeable]]]:
    args: AEGISConfig = workload.args
    size = args.per_device_train_batch_size
    if not args.activation_checkpointing:
        change: dict[str, Any] = {"activation_checkpointing": True}
        yield "activation_checkpointing: true", "a second forward pass", _with(workload, change)
    if size > 1:
        fewer, more = size // 2, args.gradient_accumulation_steps * 2
        change = {"per_device_train_batch_size": fewer, "gradient_accumulation_steps": more}
        what = f"per_device_train_batch_size: {fewer}, gradient_accumulation_steps: {more}"
        costs = "smaller products; the projection is per micro-batch" if args.projects else "smaller products"
        yield what, costs, _with(workload, change)
    if args.per_device_eval_batch_size > size:
        what = f"per_device_eval_batch_size: {size}"
        yield what, "slower evaluations", _with(workload, {"per_device_eval_batch_size": size})
    if args.optim not in _EIGHT_BIT:
        what = "optim: adamw_bnb_8bit"
        yield what, "moments in 8 bits, but for embeddings", _with(workload, {"optim": "adamw_bnb_8bit"})
    if args.projects and args.reference == "transport" and args.dual_backward == "two_pass":
        yield "dual_backward: streaming", "nothing", _with(workload, {"dual_backward": "streaming"})
    if args.projects and args.granularity == "global":
        yield "granularity: layer", "another projection", _with(workload, {"granularity": "layer"})
    if args.expert_ema_decay:
        yield "expert_ema_decay: 0", "no average of the expert", _with(workload, {"expert_ema_decay": 0.0})
    yield (
        "dtype: bfloat16",
        "steps smaller than the weights' rounding are lost",
        lambda: workload.changed({"bf16": False}, torch.bfloat16),
    )


def _with(workload: Changeable, change: dict[str, Any]) -> Callable[[], Changeable]:
    return lambda: workload.changed(change)
