"""The engine finds what is planted, and survives it."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_engine import JSON, fuzz, reading, replay

from hf_aegis.data.statistics import load_statistics


SOUND = b'{"name": "state", "values": [1, 2, 3]}'


def planted(fault: Callable[[Any], Any]) -> Callable[[bytes], Any]:
    """A reader that refuses what is no JSON of its kind, but for a fault at values that are no list."""

    def reader(data: bytes) -> None:
        try:
            found = json.loads(data)
            values = found["values"] if isinstance(found, dict) and "values" in found else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"file: {error}") from error
        if not isinstance(values, list):
            fault(values)

    return reader


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda values: {}[1], "KeyError"),
        (lambda values: bytearray(1 << 40), "MemoryError"),
        (lambda values: json.loads("{"), "JSONDecodeError"),
        (lambda values: int("a"), "unnamed ValueError"),
        (lambda values: os.kill(os.getpid(), signal.SIGSEGV), "crash (SIGSEGV)"),
        (lambda values: time.sleep(60), "time"),
    ],
)
def test_a_planted_fault_is_found_and_made_small(fault: Callable[[Any], Any], name: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"naming": "file", "seconds": 0.1 if name == "time" else 10.0}
    report = fuzz([SOUND], planted(fault), (ValueError,), 30, structured=JSON, **arguments)
    assert {finding.fault for finding in report.findings} == {name}
    assert report.inputs == 30 and report.outcomes[None] > 0
    assert all(len(finding.data) < len(SOUND) for finding in report.findings)
    with pytest.raises(AssertionError, match=r"1 findings in 30 inputs"):
        report.check()
    report.save(tmp_path / "findings")
    assert [f.fault for f in replay(tmp_path / "findings", planted(fault), (ValueError,), **arguments).findings]
    sound = replay(tmp_path / "findings", planted(lambda values: None), (ValueError,), **arguments)
    sound.check()
    assert sound.inputs == 1


def test_inputs_repeat_and_those_that_lead_somewhere_new_are_kept(tmp_path: Path) -> None:
    feature = {key: [0.0] for key in ("q01", "q99", "mean", "std", "min", "max")} | {"count": 1}
    sound = json.dumps({name: {"name": name, **feature} for name in ("state", "actions")}).encode()
    reports = [
        fuzz([sound], reading(tmp_path / "sound.json", load_statistics), (Exception,), 60, seed, structured=JSON)
        for seed in (0, 0, 1)
    ]
    assert reports[0] == reports[1] and reports[0].outcomes != reports[2].outcomes
    assert reports[0].kept >= 3 and reports[0].new_lines > reports[0].kept


def test_a_sound_input_has_to_be_read() -> None:
    with pytest.raises(AssertionError, match=r"a sound input is not read: ValueError"):
        fuzz([b"{"], planted(lambda values: None), (ValueError,), 1)
