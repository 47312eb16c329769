"""A machine's page, which several benchmarks write."""

import json
import threading

import pytest
from machine_results import MachineResults


@pytest.fixture
def results(tmp_path):
    """Makes what a benchmark's process makes at its start."""
    return lambda: MachineResults("cpu", tmp_path / "tables", tmp_path / "figures")


def measure(results, title, names):
    section = results.section(title, {"width": 3}, again=False)
    for name in names:
        results.unit(section, name, lambda: 1.5)
    results.show(section, ["", f"{title}: {sorted(section['units'])}"])


def test_an_interrupted_benchmark_goes_on(results):
    first = results()
    assert first.unit(first.section("steps", {"width": 3}, again=False), "naive", lambda: 2.5) == 2.5
    again = results()
    section = again.section("steps", {"width": 3}, again=False)
    assert again.unit(section, "naive", lambda: pytest.fail("it is known")) == 2.5
    assert not again.page.exists(), "nothing has been shown"
    assert not again.section("steps", {"width": 4}, again=False)["units"], "of other settings"


def test_benchmarks_that_run_at_once_leave_each_others_sections(results):
    first, second = results(), results()
    measure(first, "steps", ["naive"])
    measure(second, "experts", ["lora"])
    measure(first, "steps", ["naive", "streaming"])
    page = first.page.read_text()
    assert "experts: ['lora']" in page
    assert "steps: ['naive', 'streaming']" in page
    assert page.startswith(f"# {first.machine}\n\n## steps\n\n")


def test_many_at_the_same_moment(results):
    titles = [f"benchmark {index}" for index in range(6)]
    threads = [threading.Thread(target=measure, args=(results(), title, "abcdefgh")) for title in titles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = results()
    assert sorted(kept.sections) == titles
    assert all(len(section["units"]) == 8 for section in json.loads(kept.file.read_text()).values())
    assert kept.page.read_text().count("\n## benchmark ") == 6


def test_what_the_page_alone_has_stays(results):
    """The figures of a machine may be those of another checkout."""
    first = results()
    measure(first, "steps", ["naive"])
    before = first.page.read_text()
    first.file.unlink()
    again = results()
    measure(again, "experts", ["lora"])
    assert again.page.read_text().startswith(before.rstrip("\n"))
    assert "experts: ['lora']" in again.page.read_text()
