"""Callbacks that count over a whole run, however often it was interrupted."""

import copy
import math
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hf_aegis.format_version import check_format_version, written_version
from hf_aegis.json_files import is_kind, require_keys


_KIND = "callback state"
# What may take the place of a value at a run's start, by that one's type.
_LIKE = {
    int: "a count",
    float: "a number that is finite and not negative",
    list: "a list of such numbers",
    dict: "an object of such numbers",
    type(None): "an object, or null",
}


class ResumableCallback(TrainerCallback, ExportableState):
    """
    Keeps some of its attributes in each checkpoint's `trainer_state.json`; a resumed run goes on from there.

    The Trainer itself writes them, but would only read them by making the callback anew
    (`restore_callback_states_from_checkpoint`), so they are read here.

    Attributes:
        initial (`dict[str, Any]`):
            What is kept, with the values at a run's start; set by subclasses. A count, another number, a list or an
            object of numbers, all of them not negative; or `None`, in the place of which an object may come.
    """

    initial: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        self._restore(self.initial)

    def state(self) -> dict[str, Any]:
        """In the form of [`~transformers.trainer_callback.ExportableState`]."""
        attributes = {name: copy.copy(getattr(self, name)) for name in self.initial}
        return {**written_version(_KIND), "args": {}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        values = self.initial
        if state.global_step > 0:
            stored: Any = state.stateful_callbacks
            if type(self).__name__ not in stored:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} holds no state of {type(self).__name__}: it was not "
                    "saved by a run like this one, whose figures could be continued"
                )
            own = stored[type(self).__name__]
            where = f"{TRAINER_STATE_NAME} of the checkpoint of step {state.global_step}, {type(self).__name__}"
            check_format_version(require_keys(own, {"attributes": dict}, where), _KIND, where)
            values = own["attributes"]
            if missing := [name for name in self.initial if name not in values]:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} holds a state of {type(self).__name__} without "
                    f"{missing}, found {sorted(values)}: it was saved by another version, whose figures cannot be "
                    "continued; begin anew, or resume with the version that saved it"
                )
            for name, first in self.initial.items():
                if not _is_like(values[name], first):
                    raise ValueError(
                        f"{where}: key {name!r} is {values[name]!r:.80}, expected {_LIKE[type(first)]}: the file is "
                        "damaged; resume from another checkpoint (resume_from_checkpoint=its folder)"
                    )
        self._restore(values)

    def _restore(self, values: dict[str, Any]) -> None:
        for name in self.initial:
            setattr(self, name, copy.copy(values[name]))


def _is_like(value: Any, first: Any) -> bool:
    if first is None:
        return value is None or isinstance(value, dict)
    if isinstance(first, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return type(value) is type(first) and all(_is_like(part, 0.0) for part in parts)
    return is_kind(value, (type(first),)) and 0 <= value < math.inf
