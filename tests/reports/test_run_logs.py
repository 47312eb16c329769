import re

import numpy as np
import pytest

from hf_aegis.reports.run_logs import RunLogs, runs_by_condition


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_comparison):
    outcomes = dict.fromkeys(("zebra", "aegis", "naive"), (1.0, 0.5, 0.3))
    return write_comparison(tmp_path_factory.mktemp("comparison"), outcomes, seeds=(10, 2), layers=1)


def test_runs_are_in_the_order_in_which_they_are_told(folder):
    runs = [{"condition": name, "seed": seed} for name in ("zebra", "aegis", "naive") for seed in (10, 2)]
    found = runs_by_condition(folder, runs)
    assert list(found) == ["naive", "aegis", "zebra"]
    assert [run.seed for run in found["aegis"]] == [2, 10]
    assert found["aegis"][0].folder == folder / "runs/aegis/seed_2"


def test_logs_are_what_the_run_wrote(folder):
    run = RunLogs("aegis", 2, folder / "runs/aegis/seed_2")
    assert run.metrics()[0]["vqa_accuracy"] == 0.997
    assert run.projection()[0]["groups"][0] == "layers.0"
    assert len(run.gradient_spectra()["layers"]) == 1
    assert run.fingerprints()["held_out"] == "h"
    states = run.hidden_states()
    assert states["before"].shape == states["after"].shape
    assert states["before"].dtype == np.float32


def test_what_a_run_did_not_write_is_none(tmp_path):
    run = RunLogs("naive", 0, tmp_path)
    for read in (run.metrics, run.projection, run.neuron_cosines, run.gradient_spectra, run.hidden_states):
        assert read() is None
    assert run.fingerprints() == {}
    # A training that ended before the first observation, and one before the first log.
    (tmp_path / "neuron_cosines.json").write_text('{"edges": [-1, 1], "counts": {}, "steps": []}')
    (tmp_path / "metrics.jsonl").write_text("")
    assert run.neuron_cosines() is None
    assert run.metrics() is None


def test_broken_files_are_named(tmp_path):
    from safetensors.numpy import save_file

    run = RunLogs("naive", 0, tmp_path)
    path = tmp_path / "neuron_cosines.json"
    path.write_text('{"edges": [')
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: not JSON"):
        run.neuron_cosines()
    path = tmp_path / "analysis/hidden_states.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: not a whole safetensors file"):
        run.hidden_states()
    save_file({"before": np.zeros((2, 2), dtype=np.float32)}, path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: lacks after; found before"):
        run.hidden_states()
