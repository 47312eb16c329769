"""What the runs of a comparison have logged, as its figures need it."""

import glob
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_aegis.json_files import read_json_object
from hf_aegis.reports.comparison_files import read_episodes, read_result
from hf_aegis.reports.results_table import ROLLOUTS_FILE
from hf_aegis.reports.run_files import (
    Records,
    check_expert_spectra,
    check_experts,
    check_gradient_spectra,
    check_hidden_states,
    check_metrics,
    check_neuron_cosines,
    check_projection,
)
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
        path = self.folder / "result.json"
        return (read_result(path).get("fingerprints") or {}) if path.exists() else {}

    def metrics(self) -> Records | None:
        """What was logged, step by step."""
        return self._lines(METRICS_FILE, check_metrics)

    def projection(self) -> Records | None:
        """What each projected backward pass did."""
        return self._lines(PROJECTION_FILE, check_projection)

    def experts(self) -> Records | None:
        """How tokens were spread over routed experts."""
        return self._lines(EXPERTS_FILE, check_experts)

    def expert_spectra(self) -> dict[str, Any] | None:
        """Singular values of the experts before and after training."""
        return self._json("analysis/expert_spectra.json", check_expert_spectra)

    def rollouts(self) -> list[dict[str, Any]] | None:
        """The episodes in which the trained model acted."""
        path = self.folder / f"{ROLLOUTS_FILE}.episodes.jsonl"
        return read_episodes(path) if path.exists() else None

    def film(self, suite: str, task: str, start: int) -> Path | None:
        """The film of such an episode."""
        folder = self.folder / f"{ROLLOUTS_FILE}.films" / suite
        return next(iter(sorted(folder.glob(f"{glob.escape(task)}_start_{start}.*"))), None)

    def neuron_cosines(self) -> dict[str, Any] | None:
        """Histograms of the cosines between task gradient and reference, neuron by neuron."""
        found = self._json("neuron_cosines.json", check_neuron_cosines)
        return found if found is not None and found["counts"] else None

    def gradient_spectra(self) -> dict[str, Any] | None:
        """Singular values of the gradients of two losses before training."""
        return self._json("analysis/gradient_spectra.json", check_gradient_spectra)

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
        check_hidden_states(states, path)
        return states

    def _lines(self, name: str, check: Callable[[Records, Path], None]) -> Records | None:
        path = self.folder / name
        records = JSONLines(path).read() if path.exists() else []
        check(records, path)
        return records or None

    def _json(self, name: str, check: Callable[[dict[str, Any], Path], None]) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        # Singular values of gradients that are not finite are not finite either.
        found = read_json_object(path, finite=False)
        check(found, path)
        return found


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
