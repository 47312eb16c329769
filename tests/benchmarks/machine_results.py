"""What was measured on one machine: kept as JSON from unit to unit, shown as Markdown."""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_aegis.atomic_files import write_text


TABLES = Path(__file__).parent / "results"
FIGURES = Path("outputs/benchmarks")
_PACKAGES = ("torch", "transformers", "accelerate", "peft")


class MachineResults:
    """
    The figures of one machine. A unit, whatever is measured in one go, is kept as soon as it is there: a benchmark
    that was interrupted goes on with the next one. Several benchmarks may run at once: each writes its own sections,
    and leaves what others have written, also what the page alone has of another checkout.

    Args:
        device (`str`): `"cpu"` or `"cuda"`.
        tables, figures (`Path`, *optional*): Folders of the Markdown page and of the JSON file.
    """

    def __init__(self, device: str, tables: Path = TABLES, figures: Path = FIGURES) -> None:
        self.machine = machine_name(device)
        self.page = tables / f"{file_name(self.machine)}.md"
        self.file = figures / f"{file_name(self.machine)}.json"
        self.sections: dict[str, Any] = self._kept()
        self._begun: set[str] = set()

    def section(self, title: str, settings: Mapping[str, Any], again: bool) -> dict[str, Any]:
        """
        The units of a section that were measured with these settings and versions; without them, or with `again`, it
        begins anew.
        """
        self._begun.add(title)
        key = json.loads(json.dumps({"settings": settings, "versions": versions()}))
        found = self.sections.get(title)
        if again or found is None or found["key"] != key:
            self.sections[title] = found = {"key": key, "units": {}, "date": "", "lines": []}
        return found

    def unit(self, section: dict[str, Any], name: str, measure: Callable[[], Any]) -> Any:
        """A unit's figures: those that are kept, or those that are measured now."""
        if name not in section["units"]:
            section["units"][name] = measure()
            section["date"] = datetime.date.today().isoformat()
            self._keep()
        return section["units"][name]

    def show(self, section: dict[str, Any], lines: list[str]) -> None:
        """Puts a section's lines of Markdown on the machine's page."""
        section["lines"] = lines
        self._keep()

    def _kept(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def _keep(self) -> None:
        """Writes this benchmark's sections among those that others may have written since."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.sections = self._kept() | {title: self.sections[title] for title in self._begun}
            write_text(self.file, json.dumps(self.sections, indent=2))
            self._write_page()

    def _write_page(self) -> None:
        shown = {title: _shown(found) for title, found in self.sections.items() if found["lines"]}
        if not shown:
            return
        before = self.page.read_text() if self.page.exists() else ""
        parts = _sections_of(before) | shown
        self.page.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.page, "\n".join([f"# {self.machine}", "", *(f"## {t}\n\n{parts[t]}\n" for t in parts)]))


def _shown(section: Mapping[str, Any]) -> str:
    names = ", ".join(f"{name} {number}" for name, number in section["key"]["versions"].items())
    return "\n".join([f"{section['date']}; {names}.", *section["lines"]])


def _sections_of(page: str) -> dict[str, str]:
    """A page's text by the titles of its sections."""
    found = {}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        found[title] = text.strip("\n")
    return found


def machine_name(device: str) -> str:
    """`CPU AMD EPYC, 2 cores` or `CUDA NVIDIA H200`."""
    if device == "cuda":
        return f"CUDA {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU {(models or [platform.processor() or platform.machine()])[0]}, {cores} cores"


def file_name(machine: str) -> str:
    """The machine's name in small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
