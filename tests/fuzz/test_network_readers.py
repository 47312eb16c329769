"""What comes over the network, damaged in ten thousand ways, is read or refused in the words of this package."""

import dataclasses
from collections import Counter
from pathlib import Path
from random import Random

import network_readers
import pytest
from fuzz_engine import fuzz, mutate_bytes, replay
from network_readers.hub_answers import SENDABLE

from hf_aegis.hub import HubDownloadError, push_folder
from hf_aegis.training.hub_checkpoint import download_checkpoint


FINDINGS = Path(__file__).parent / "findings"
READERS = {"pictures": 150, "questions": 60, "messages": 150, "hub_answers": 60}
"""How many inputs `make test` makes."""
SECONDS = 10.0
"""What SECURITY.md promises of each."""


def case(name, request):
    make = getattr(network_readers, name)
    if name != "hub_answers":
        return make()
    hub = request.getfixturevalue("hub")
    return make(hub.home.parent, hub.cache)


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_are_read_or_refused(name, request):
    found = case(name, request)
    options = {"structured": found.structured, "seconds": SECONDS}
    fuzz(found.seeds, found.reader, found.allowed, number=READERS[name], seed=0, **options).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_inputs_are_read_or_refused(name, request):
    found = case(name, request)
    options = {"structured": found.structured, "seconds": SECONDS}
    report = fuzz(found.seeds, found.reader, found.allowed, number=10_000, seed=1, **options)
    print(f"\n{name}: {report.inputs} inputs, {dict(report.outcomes)}, {report.kept} led to new lines")
    report.check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Not enough free disk space:UserWarning")
def test_damaged_answers_over_http_are_read_or_refused(hub, tmp_path):
    """As `hub_answers`, with a server and sockets: any answer may be damaged, in its body or its headers."""
    files = {"last-checkpoint/trainer_state.json": b'{"global_step": 1}', "last-checkpoint/model.safetensors": b"abc"}
    for name, content in files.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    push_folder(tmp_path / "source", "org/name")
    outcomes = Counter()
    for index in range(300):
        random = Random(index)

        def change(answer, random=random):
            body = mutate_bytes(answer.body, random) if random.randrange(2) else answer.body
            headers = dict(answer.headers)
            if body == answer.body and headers:
                headers[random.choice(list(headers))] = random.choice(SENDABLE)
            return dataclasses.replace(answer, body=body, headers=headers)

        hub.clear_cache()
        place = random.choice(("/api/models/", "/resolve/", "/lfs/"))
        hub.fail_next(None, place, kind="change", after=random.randrange(2), times=99, change=change)
        before = set(tmp_path.rglob("*"))
        try:
            checkpoint = download_checkpoint("org/name", tmp_path / "out")
            outcomes["read"] += 1
            for path in checkpoint.iterdir():
                assert path.read_bytes() == files[f"last-checkpoint/{path.name}"]
        except HubDownloadError:
            outcomes["refused"] += 1
        finally:
            hub.faults.clear()
        assert set(tmp_path.rglob("*")) - before <= {tmp_path / "out"}
    print(f"\n{dict(outcomes)}")
    assert min(outcomes["refused"], outcomes["read"]) > 20


@pytest.mark.parametrize("name", [name for name in READERS if (FINDINGS / name).is_dir()])
def test_former_findings_are_read_or_refused(name, request):
    found = case(name, request)
    replay(FINDINGS / name, found.reader, found.allowed, seconds=SECONDS).check()
