"""How a model's routers spread the tokens over its experts, during training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_aegis.training.json_lines import EXPERTS_FILE, JSONLines
from hf_aegis.tuners.gse import RoutingRecord


class ExpertLoadCallback(TrainerCallback):
    """
    Writes a line to `experts.jsonl` whenever the training's loss is logged: for each layer, of the last batch, the
    share of tokens that each specialized expert got (`load`, in sum `top_k`), its mean probability (`probability`) and
    the mean entropy of the tokens' routing in nats (`entropy`).

    Args:
        read (`Callable`): Gives the model's routing records, by layer and adapter.
        output_dir (`str`): The run's folder.
    """

    def __init__(self, read: Callable[[], Mapping[tuple[str, str], RoutingRecord]], output_dir: str) -> None:
        self.lines = JSONLines(Path(output_dir) / EXPERTS_FILE)
        self._read = read
        self._records: Mapping[tuple[str, str], RoutingRecord] = {}

    def observe(self) -> None:
        """Takes the routing of the forward pass that was just made. It is read off the device when it is written."""
        self._records = self._read()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._records = {}
        if state.is_world_process_zero:
            self.lines.rewind(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self._records and logs is not None and "loss" in logs:
            several = len({adapter for _, adapter in self._records}) > 1
            layers = {
                f"{layer} ({adapter})" if several else layer: _figures(record)
                for (layer, adapter), record in self._records.items()
            }
            self.lines.append([{"step": state.global_step, "layers": layers}])


def _figures(record: RoutingRecord) -> dict[str, Any]:
    return {
        "load": record.load.tolist(),
        "probability": record.probability().tolist(),
        "entropy": float(record.entropy()),
    }
