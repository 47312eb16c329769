import json
import math
import subprocess
import sys

import pytest

from hf_aegis.training.json_lines import JSONLines


def test_reading_records_needs_no_trainer():
    code = "import sys, hf_aegis.training.json_lines; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def lines(tmp_path):
    lines = JSONLines(tmp_path / "new" / "metrics.jsonl")
    lines.rewind(0)
    return lines


def test_rewinding_drops_what_a_resumed_run_writes_again(lines):
    records = [{"step": step, "loss": step / 3, "name": "ü\u2028"} for step in (0, 1, 1, 2, 3)]
    lines.append(records[:2])
    lines.append(records[2:])
    assert lines.read() == records
    lines.rewind(1)
    assert lines.read() == records[:3]
    lines.rewind(0)
    assert lines.read() == []
    assert [path.name for path in lines.path.parent.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_finite_is_written_as_null(lines):
    lines.append([{"step": 1, "loss": math.nan, "dot": [1.0, -math.inf], "summary": {"cosine": (math.inf, 0.5)}}])
    text = lines.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "dot": [1.0, None],
        "summary": {"cosine": [None, 0.5]},
    }


def test_a_half_written_last_line_is_passed_over_and_removed(lines):
    lines.append([{"step": 1}, {"step": 2}])
    with lines.path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert lines.read() == [{"step": 1}, {"step": 2}]
    lines.rewind(2)
    lines.append([{"step": 3}])
    assert lines.read() == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_half_written_last_line_does_not_spoil_what_follows(lines):
    lines.append([{"step": 1}])
    with lines.path.open("a") as file:
        file.write('{"step": 2, "lo')
    lines.append([{"step": 2}])
    assert lines.read() == [{"step": 1}, {"step": 2}]


def test_only_newlines_end_a_record(lines):
    """Unicode has other line separators, which another writer need not have escaped."""
    records = [{"step": 1, "name": "a\u2028b\x85c"}, {"step": 2}]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    lines.path.write_text(text, encoding="utf-8")
    assert lines.read() == records


def test_a_corrupt_line_elsewhere_is_an_error_that_names_it(lines):
    lines.append([{"step": 1}])
    with lines.path.open("a") as file:
        file.write("nonsense\n")
    lines.append([{"step": 2}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        lines.read()
