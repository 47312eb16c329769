"""What the figures of a comparison are made from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_aegis.reports.run_files import Records
from hf_aegis.reports.run_logs import RunLogs
from hf_aegis.reports.style import REFERENCES
from hf_aegis.reports.training_curves import logged_curves


class MissingDataError(ValueError):
    """What a figure shows was not logged; the message is a sentence that says so."""


@dataclass(frozen=True)
class Material:
    """
    What figures are made from.

    Args:
        results (`Mapping`): As [`results_table.collect_results`] collects them.
        logs (`Mapping[str, list[RunLogs]]`): The finished runs by condition.
    """

    results: Mapping[str, Any]
    logs: Mapping[str, list[RunLogs]]

    @cached_property
    def metrics(self) -> dict[str, list[Records]]:
        """The logs of each condition's runs."""
        found = {name: [records for run in runs if (records := run.metrics())] for name, runs in self.logs.items()}
        return {name: runs for name, runs in found.items() if runs}

    def that_logged(self, names: Sequence[str], *keys: str) -> dict[str, list[Records]]:
        """The logs of those of the conditions `names` that have a finite value of any of `keys`."""
        found = {name: self.metrics[name] for name in names if name in self.metrics}
        return {name: runs for name, runs in found.items() if logged_curves({name: runs}, keys)}

    def first_with(self, read: Callable[[RunLogs], Any]) -> tuple[str, list[Any]]:
        """AEGIS or naive, whichever has what `read` reads, or else the first other condition; and what was read."""
        for name in sorted(self.logs, key=lambda name: name not in REFERENCES):
            if found := [content for run in self.logs[name] if (content := read(run)) is not None]:
                return name, found
        raise MissingDataError("")
