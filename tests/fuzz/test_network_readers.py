"""What comes over the network, damaged in ten thousand ways, is read or refused in the words of this package."""

from pathlib import Path

import network_readers
import pytest
from fuzz_engine import fuzz, replay


FINDINGS = Path(__file__).parent / "findings"
READERS = ("pictures", "questions", "messages", "hub_answers")


def case(name, request):
    make = getattr(network_readers, name)
    if name != "hub_answers":
        return make()
    hub = request.getfixturevalue("hub")
    return make(hub.home.parent, hub.cache)


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_are_read_or_refused(name, request):
    found = case(name, request)
    fuzz(found.seeds, found.reader, found.allowed, number=60, seed=0, structured=found.structured).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_inputs_are_read_or_refused(name, request):
    found = case(name, request)
    report = fuzz(found.seeds, found.reader, found.allowed, number=10_000, seed=1, structured=found.structured)
    print(f"\n{name}: {report.inputs} inputs, {dict(report.outcomes)}, {report.kept} led to new lines")
    report.check()


@pytest.mark.parametrize("name", [name for name in READERS if (FINDINGS / name).is_dir()])
def test_former_findings_are_read_or_refused(name, request):
    found = case(name, request)
    replay(FINDINGS / name, found.reader, found.allowed).check()
