"""The loop: inputs are made from sound ones and from those that led somewhere new, and read."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzz_engine.mutations import Mutation, mutate_bytes
from fuzz_engine.reader_process import Finding, ReaderProcess


# A file much larger than the sound ones tells nothing new, and slows everything down.
_GROWTH = 4
_LARGEST_ADDITION = 1 << 20


@dataclass
class Report:
    """
    What became of the inputs.

    Attributes:
        inputs (`int`): How many were read.
        outcomes (`Counter`): How many raised what; `None` for those that were read.
        new_lines (`int`): Lines of the package that were reached.
        kept (`int`): Inputs that reached new lines, from which others were made.
        findings (`list[Finding]`): One for each fault and place, as small as it could be made.
    """

    inputs: int = 0
    outcomes: Counter[str | None] = field(default_factory=Counter)
    new_lines: int = 0
    kept: int = 0
    findings: list[Finding] = field(default_factory=list)

    def check(self) -> None:
        """
        Raises:
            AssertionError: if there are findings; each is told with the beginning of its input.
        """
        told = [f"{one.fault}: {one.detail}\n    {one.data[:200]!r} ({len(one.data)} bytes)" for one in self.findings]
        assert not told, f"{len(told)} findings in {self.inputs} inputs:\n" + "\n".join(told)

    def save(self, folder: Path) -> None:
        """Writes each finding's input into a folder, for [`replay`]."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, finding in enumerate(self.findings):
            name = "".join(character if character.isalnum() else "_" for character in finding.fault)
            (folder / f"{name}_{number}").write_bytes(finding.data)


def fuzz(
    seeds: Sequence[bytes],
    reader: Callable[[bytes], Any],
    allowed: tuple[type[BaseException], ...],
    number: int,
    seed: int = 0,
    *,
    structured: Sequence[Mutation] = (),
    naming: str | None = None,
    seconds: float = 30.0,
    memory: int = 1 << 30,
    coverage: bool = True,
) -> Report:
    """
    Reads generated inputs in a process of its own, which has bounded memory and time.

    Inputs are the same for the same arguments. Those that reach lines of hf_aegis that none before has are kept
    beside the sound ones, and others are made from them.

    Args:
        seeds (`Sequence[bytes]`): Sound inputs; the reader has to read each of them.
        reader (`Callable[[bytes], Any]`): What reads one; what it returns does not matter.
        allowed (`tuple`): The exceptions that it documents. `UnicodeError` and `json.JSONDecodeError` are value errors
            that name no file, and count as allowed only where they are given themselves.
        number (`int`): How many inputs are made.
        seed (`int`, *optional*, defaults to 0): Of the mutations.
        structured (`Sequence[Mutation]`, *optional*): Mutations of the parsed form, for two inputs out of three.
        naming (`str`, *optional*): A text that the message of each exception has to hold, such as the file's name.
        seconds (`float`, *optional*, defaults to 30): Most time for an input.
        memory (`int`, *optional*, defaults to 2³⁰): Most bytes that reading may take, of address space.
        coverage (`bool`, *optional*, defaults to `True`): Whether lines are counted, which costs time.

    Raises:
        AssertionError: if the reader does not read one of `seeds`.
    """
    process = ReaderProcess(reader, allowed, naming, seconds, memory, coverage)
    report = Report()
    try:
        corpus = list(seeds)
        for data in seeds:
            outcome = process.read(data)
            assert outcome.raised is None, (
                f"a sound input is not read: {outcome.raised}: {outcome.detail or data[:200]}"
            )
            report.new_lines += outcome.new_lines
        largest = _GROWTH * max(map(len, seeds)) + _LARGEST_ADDITION
        found: dict[tuple[str, str], bytes] = {}
        for index in range(number):
            random = Random(f"{seed}.{index}")
            data = _mutated(seeds, corpus, random, structured)[:largest]
            outcome = process.read(data)
            report.inputs += 1
            report.outcomes[outcome.raised] += 1
            report.new_lines += outcome.new_lines
            if outcome.new_lines:
                corpus.append(data)
                report.kept += 1
            if outcome.fault is not None:
                found.setdefault((outcome.fault, outcome.detail[outcome.detail.rfind("(") :]), data)
        for (fault, place), data in found.items():
            small = _minimised(data, process, fault, place)
            report.findings.append(Finding(small, fault, process.read(small).detail))
    finally:
        process.close()
    return report


def replay(
    folder: Path,
    reader: Callable[[bytes], Any],
    allowed: tuple[type[BaseException], ...],
    *,
    naming: str | None = None,
    seconds: float = 30.0,
    memory: int = 1 << 30,
) -> Report:
    """Reads every input that a folder of former findings holds; the arguments are those of [`fuzz`]."""
    process = ReaderProcess(reader, allowed, naming, seconds, memory, coverage=False)
    report = Report()
    try:
        for path in sorted(folder.glob("*")):
            outcome = process.read(path.read_bytes())
            report.inputs += 1
            report.outcomes[outcome.raised] += 1
            if outcome.fault is not None:
                report.findings.append(Finding(path.read_bytes(), f"{path.name}: {outcome.fault}", outcome.detail))
    finally:
        process.close()
    return report


def reading(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of bytes from one of files: each input is written to `path` first."""

    def reader(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)

    return reader


def _mutated(seeds: Sequence[bytes], corpus: Sequence[bytes], random: Random, structured: Sequence[Mutation]) -> bytes:
    # What led somewhere new is often broken for good, so that half of the inputs begin from a sound one. Of the others
    # later ones more often: they have led the furthest.
    furthest = max(random.randrange(len(corpus)), random.randrange(len(corpus)))
    data = random.choice((random.choice(seeds), corpus[furthest]))
    if structured and random.randrange(3):
        for _ in range(random.choice((1, 1, 2))):
            data = random.choice(structured)(data, random)
        if random.randrange(8):
            return data
    return mutate_bytes(data, random, corpus)


def _minimised(data: bytes, process: ReaderProcess, fault: str, place: str, tries: int = 200) -> bytes:
    """The input with as much left out as keeps its fault."""
    size = len(data) // 2
    while size >= 1 and tries > 0:
        start = 0
        while start < len(data) and tries > 0:
            shorter = data[:start] + data[start + size :]
            outcome = process.read(shorter)
            tries -= 1
            if outcome.fault == fault and outcome.detail.endswith(place):
                data = shorter
            else:
                start += size
        size //= 2
    return data
