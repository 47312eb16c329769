"""What the runs of a comparison have logged, as its figures need it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_aegis.reports.bands import Records
from hf_aegis.reports.results_table import ROLLOUTS_FILE
from hf_aegis.reports.style import condition_order
from hf_aegis.training.json_lines import EXPERTS_FILE, METRICS_FILE, PROJECTION_FILE, JSONLines


@dataclass(frozen=True)
class RunLogs:
    """
    The folder of one finished run. Files are read when they are asked for; one that the run did not write is `None`.

    Args:
        condition (`str`): The run's condition.
        seed (`int`): The run's seed.
        folder (`Path`): Where the run wrote.
    """

    condition: str
    seed: int
    folder: Path

    def fingerprints(self) -> dict[str, Any]:
        """What the run was trained and measured on."""
        return (self._json("result.json") or {}).get("fingerprints") or {}

    def metrics(self) -> Records | None:
        """What was logged, step by step."""
        return self._lines(METRICS_FILE)

    def projection(self) -> Records | None:
        """What each projected backward pass did."""
        return self._lines(PROJECTION_FILE)

    def experts(self) -> Records | None:
        """How tokens were spread over routed experts."""
        return self._lines(EXPERTS_FILE)

    def expert_spectra(self) -> dict[str, Any] | None:
        """Singular values of the experts before and after training."""
        return self._json("analysis/expert_spectra.json")

    def rollouts(self) -> list[dict[str, Any]] | None:
        """The episodes in which the trained model acted."""
        path = self.folder / f"{ROLLOUTS_FILE}.episodes.jsonl"
        # The settings come first.
        return JSONLines(path).read()[1:] if path.exists() else None

    def film(self, suite: str, task: str, start: int) -> Path | None:
        """The film of such an episode."""
        folder = self.folder / f"{ROLLOUTS_FILE}.films" / suite
        return next(iter(sorted(folder.glob(f"{task}_start_{start}.*"))), None)

    def neuron_cosines(self) -> dict[str, Any] | None:
        """Histograms of the cosines between task gradient and reference, neuron by neuron."""
        found = self._json("neuron_cosines.json")
        return found if found is not None and found["counts"] else None

    def gradient_spectra(self) -> dict[str, Any] | None:
        """Singular values of the gradients of two losses before training."""
        return self._json("analysis/gradient_spectra.json")

    def hidden_states(self) -> dict[str, Any] | None:
        """`before` and `after`, arrays `(N, D)`: hidden states on the same questions."""
        path = self.folder / "analysis/hidden_states.safetensors"
        if not path.exists():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            states = {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        if missing := {"before", "after"} - states.keys():
            raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; found {', '.join(sorted(states))}")
        return states

    def _lines(self, name: str) -> Records | None:
        path = self.folder / name
        return (JSONLines(path).read() or None) if path.exists() else None

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error


def runs_by_condition(folder: Path, runs: Iterable[Mapping[str, Any]]) -> dict[str, list[RunLogs]]:
    """
    The logs of a comparison's finished runs: conditions in the order in which they are told, their runs by seed.

    Args:
        folder (`Path`): The comparison's.
        runs (`Iterable[Mapping]`): Each with `condition` and `seed`, as [`results_table.collect_results`] finds them.
    """
    found: dict[str, list[RunLogs]] = {}
    for run in runs:
        logs = RunLogs(run["condition"], run["seed"], folder / "runs" / run["condition"] / f"seed_{run['seed']}")
        found.setdefault(logs.condition, []).append(logs)
    return {name: sorted(found[name], key=lambda logs: logs.seed) for name in condition_order(found)}
