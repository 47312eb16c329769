"""Exponential moving average of an action expert's weights."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from hf_aegis.atomic_files import replacing
from hf_aegis.format_version import check_format_version, written_version
from hf_aegis.gradients import gathered, local_part, own_part
from hf_aegis.json_files import require_keys


EMA_FILE = "expert_ema.safetensors"
_KIND = "expert average"
_NUMBER = re.compile(r"[0-9]{1,18}")


class ExpertEMA:
    """
    Keeps a float32 moving average of parameters, `average += (1 - decay) (parameter - average)`.

    The decay is warmed up as `min(decay, (1 + step) / (10 + step))`, lest a short run's average be its random start.

    Where parameters are spread over processes (FSDP2), each process averages its own part of them.

    Args:
        parameters (`Mapping[str, torch.nn.Parameter]`): What is averaged, by name.
        decay (`float`): Upper bound of the decay, in (0, 1).

    Raises:
        ValueError: If there is nothing to average.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float) -> None:
        if not parameters:
            raise ValueError("there are no expert parameters to average; set expert_ema_decay=0")
        self.parameters = dict(parameters)
        self.decay = decay
        self.step = 0
        self.average = {name: local_part(p.detach()).float().clone() for name, p in self.parameters.items()}

    def follow(self, parameters: Mapping[str, Parameter]) -> None:
        """
        Goes on with other objects in place of the parameters, by the same names: those that FSDP2 has made of them,
        of whose average this process keeps its own part.
        """
        for name in self.parameters:
            if parameters[name] is not self.parameters[name]:
                self.average[name] = own_part(self.average[name], parameters[name])
                self.parameters[name] = parameters[name]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters after an optimiser step."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        averages = list(self.average.values())
        parts = [local_part(p.detach()) for p in self.parameters.values()]
        current = [p.to(a.device, a.dtype) for p, a in zip(parts, averages, strict=True)]
        torch._foreach_lerp_(averages, current, 1.0 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Puts the average into the parameters."""
        for name, parameter in self.parameters.items():
            local_part(parameter.detach()).copy_(self.average[name])

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model with averaged weights for the time of a `with` block."""
        trained = {name: local_part(p.detach()).clone() for name, p in self.parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    local_part(parameter.detach()).copy_(trained[name])

    def save(self, folder: str | os.PathLike, writes: bool = True) -> None:
        """
        Writes `expert_ema.safetensors` into `folder`, atomically. Of processes that parameters are spread over all
        have to call it, and one `writes`.
        """
        tensors: dict[str, Tensor] = {}
        for name, average in self.average.items():
            whole = gathered(average, self.parameters[name])
            if writes:
                tensors[name] = whole.contiguous().cpu()
        if not writes:
            return
        with replacing(Path(folder) / EMA_FILE) as staged:
            version = {key: str(value) for key, value in written_version(_KIND).items()}
            save_file(tensors, staged, metadata={"format": "pt", "step": str(self.step), **version})

    def load(self, folder: str | os.PathLike) -> None:
        """
        Reads what [`save`] wrote.

        Raises:
            ValueError: If the file is missing, is no such file, averages other parameters, or has a newer format.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / EMA_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint was saved without an expert average")
        try:
            stored = load_file(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        # All that a header holds is text.
        numbers = {key: int(text) if _NUMBER.fullmatch(text) else text for key, text in metadata.items()}
        check_format_version(numbers, _KIND, path)
        require_keys(numbers, {"step": int}, path)
        for name, parameter in self.parameters.items():
            if name not in stored or stored[name].shape != parameter.shape:
                found = tuple(stored[name].shape) if name in stored else "nothing"
                raise ValueError(f"{path}: expected {name} of shape {tuple(parameter.shape)}, found {found}")
        if more := sorted(stored.keys() - self.average.keys()):
            raise ValueError(f"{path} averages {more[0]!r}, which is not among the expert's trainable parameters")
        for name, average in self.average.items():
            average.copy_(own_part(stored[name], self.parameters[name]))
        self.step = numbers["step"]
