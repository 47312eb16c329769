"""The table of a comparison, on folders made by hand."""

import csv
import json
import re

import pytest

from hf_aegis.reports.results_table import (
    RESULT_FILES,
    collect_results,
    csv_table,
    markdown_table,
    pretrained_scores,
    write_results,
)


VERSIONS = {"torch": "2.15", "hf-aegis": "0.1"}


def comparison(folder, results, seeds=(0, 1, 2), before=0.8, jobs=1, failures=()):
    """A comparison's folder; `results` by condition and seed."""
    machine = {"cores": 2, "jobs": jobs, "threads": 1}
    settings = {"command": "hf-aegis compare", "machine": machine, "seeds": list(seeds), "conditions": results}
    (folder / "compare.json").write_text(json.dumps(settings))
    (folder / "failures.json").write_text(json.dumps(list(failures)))
    if before is not None:
        by_type = {"color": {"accuracy": 0.7, "count": 3}}
        scores = {"cross_entropy": 0.1, "accuracy": before, "by_type": by_type, "fingerprint": "q", "device": "cpu"}
        (folder / "pretrained.json").write_text(json.dumps(scores))
    for condition, runs in results.items():
        for seed, result in runs.items():
            path = folder / "runs" / condition / f"seed_{seed}" / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(result))
    return folder


def row(text, name):
    lines = text.splitlines()
    header, found = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], _line(lines, name)))
    return dict(zip(header, found, strict=True))


def _line(lines, name):
    return next(line for line in lines if line.startswith(f"| {name} |"))


@pytest.fixture
def three_seeds(tmp_path):
    about = {"versions": VERSIONS, "fingerprints": {"vqa_final": "q"}}
    naive = {
        # Mean 0.6, deviations 0.1 and -0.1 and 0: variance 0.02 / 2.
        seed: {
            "vqa_accuracy": accuracy,
            "flow_mse": 0.25,
            "step_ms": 100.0 + seed,
            "vqa_accuracy_by_type": {"color": 1},
        }
        | {"trainable_parameters": 1_340_000, **about}
        for seed, accuracy in ((0, 0.5), (1, 0.7), (2, 0.6))
    }
    aegis = {0: {"vqa_accuracy": 0.75, "flow_mse": 0.5, "throttle_rate": 0.4, "energy_shed": 0.0062, **about}}
    return comparison(tmp_path, {"naive": naive, "aegis": aegis, "lora": {}})


def test_means_and_deviations_over_seeds(three_seeds):
    conditions = collect_results(three_seeds)["conditions"]
    assert list(conditions) == ["naive", "aegis", "lora"]
    assert [condition["runs"] for condition in conditions.values()] == [3, 1, 0]
    naive = conditions["naive"]["measures"]
    assert naive["vqa_accuracy"] == {"mean": pytest.approx(0.6), "std": pytest.approx(0.1), "n": 3}
    assert naive["vqa_accuracy_change"] == {"mean": pytest.approx(-0.2), "std": pytest.approx(0.1), "n": 3}
    assert naive["flow_mse"] == {"mean": 0.25, "std": 0.0, "n": 3}
    assert naive["step_ms"] == {"mean": 101.0, "std": 1.0, "n": 3}
    assert naive["vqa_accuracy_by_type.color"]["n"] == 3
    assert conditions["aegis"]["measures"]["vqa_accuracy"] == {"mean": 0.75, "std": None, "n": 1}
    assert conditions["lora"]["measures"] == {}


def test_a_record_per_run_has_every_number(three_seeds):
    results = collect_results(three_seeds)
    assert [(run["condition"], run["seed"]) for run in results["runs"]] == [
        *(("naive", seed) for seed in (0, 1, 2)),
        ("aegis", 0),
    ]
    assert results["runs"][3] == {
        "condition": "aegis",
        "seed": 0,
        "vqa_accuracy": 0.75,
        "flow_mse": 0.5,
        "throttle_rate": 0.4,
        "energy_shed": 0.0062,
        "vqa_accuracy_change": pytest.approx(-0.05),
    }
    assert results["versions"] == [VERSIONS]
    assert results["before"]["vqa_accuracy_by_type.color"] == 0.7
    assert results["command"] == "hf-aegis compare"
    assert results["machine"]["cores"] == 2


def test_shares_of_a_gap_are_taken_seed_by_seed(tmp_path):
    flows = {"naive": (0.30, 0.20), "stop_gradient": (0.40, 0.40, 0.50), "held": (0.32, 0.15, 0.35)}
    folder = comparison(tmp_path, {k: {i: {"flow_mse": v} for i, v in enumerate(own)} for k, own in flows.items()})
    settings = json.loads((folder / "compare.json").read_text())
    assert "flow_gap_share" not in collect_results(folder)["conditions"]["held"]["measures"]
    (folder / "compare.json").write_text(json.dumps({**settings, "gap": ["stop_gradient", "naive"]}))
    results = collect_results(folder)
    shares = [run.get("flow_gap_share") for run in results["runs"] if run["condition"] == "held"]
    # 0.08 of 0.10, 0.25 of 0.20; the third seed has no naive run.
    assert shares == [pytest.approx(0.8), pytest.approx(1.25), None]
    assert results["conditions"]["naive"]["measures"]["flow_gap_share"]["mean"] == 1
    text = markdown_table(results)
    assert row(text, "stop_gradient")["share of the gap (%)"] == "0 ± 0 (2 of 3)"
    assert row(text, "held")["share of the gap (%)"] == "102 ± 32 (2 of 3)"
    assert "between stop_gradient and naive with the same seed" in text


def test_the_table_shows_spread_and_what_is_missing(three_seeds):
    text = markdown_table(collect_results(three_seeds))
    naive, aegis, lora = (row(text, name) for name in ("naive", "aegis", "lora"))
    assert naive["seeds"] == "3"
    assert naive["VQA accuracy (%)"] == "60.0 ± 10.0"
    assert naive["change (points)"] == "-20.0 ± 10.0"
    assert naive["held-out flow MSE"] == "0.2500 ± 0.0000"
    assert naive["step (ms)"] == "101 ± 1"
    assert naive["trainable parameters"] == "1,340,000"
    assert naive["throttle rate (%)"] == "–"
    assert aegis["seeds"] == "1 of 3"
    assert aegis["VQA accuracy (%)"] == "75.0"
    assert (aegis["throttle rate (%)"], aegis["energy shed (%)"]) == ("40.0", "0.62")
    assert lora["seeds"] == "0 of 3"
    assert set(list(lora.values())[2:]) == {"–"}
    before = row(text, "before fine-tuning")
    assert (before["VQA CE (nats/token)"], before["VQA accuracy (%)"]) == ("0.1000", "80.0")
    assert before["held-out flow MSE"] == before["change (points)"] == "–"
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "side by side" not in text


def test_a_number_that_was_not_finite_does_not_count_as_a_seed(tmp_path):
    runs = {seed: {"flow_mse": value} for seed, value in enumerate((0.25, None, 0.75))}
    results = collect_results(comparison(tmp_path, {"naive": runs}, before=None))
    assert results["before"] is None
    assert results["conditions"]["naive"]["measures"]["flow_mse"] == {
        "mean": 0.5,
        "std": pytest.approx(0.125**0.5),
        "n": 2,
    }
    found = row(markdown_table(results), "naive")
    assert (found["seeds"], found["held-out flow MSE"]) == ("3", "0.5000 ± 0.3536 (2 of 3)")


def test_failures_and_company_are_told_below_the_table(tmp_path):
    failure = {"condition": "naive", "seed": 1, "error": "ended with code 1 (all of it in logs/naive_seed_1.log)"}
    folder = comparison(tmp_path, {"naive": {0: {"flow_mse": 0.25}}}, seeds=(0, 1), jobs=2, failures=[failure])
    results = collect_results(folder)
    assert results["failed"] == [failure]
    text = markdown_table(results)
    assert "Failed: naive, seed 1: ended with code 1 (all of it in logs/naive_seed_1.log)" in text
    assert "Step times were measured with 2 processes side by side." in text


def test_the_files_hold_the_same(three_seeds):
    results = write_results(three_seeds)
    assert json.loads((three_seeds / "results.json").read_text()) == results
    assert (three_seeds / "results.md").read_text() == markdown_table(results)
    assert (three_seeds / "results.csv").read_text() == csv_table(results)
    with (three_seeds / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(line["condition"], line["seed"]) for line in rows] == [
        (run["condition"], str(run["seed"])) for run in results["runs"]
    ]
    assert (rows[0]["vqa_accuracy"], rows[0]["throttle_rate"], rows[3]["throttle_rate"]) == ("0.5", "", "0.4")


def test_an_unfinished_comparison_has_a_table(tmp_path):
    results = write_results(comparison(tmp_path, {"naive": {}}, before=None))
    assert row((tmp_path / "results.md").read_text(), "naive")["seeds"] == "0 of 3"
    assert results["runs"] == []
    assert (tmp_path / "results.csv").read_text() == "condition,seed\n"


def test_scores_on_other_questions_are_refused(tmp_path):
    folder = comparison(tmp_path, {"naive": {0: {"vqa_accuracy": 0.5, "fingerprints": {"vqa_final": "other"}}}})
    with pytest.raises(ValueError, match=r"seed_0/result\.json: key 'fingerprints\.vqa_final' is other, but .* is q"):
        collect_results(folder)


def test_a_folder_without_a_comparison_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"compare\.json"):
        collect_results(tmp_path)


def test_columns_are_those_that_were_measured(tmp_path):
    fast = {"vqa_accuracy": 0.9, "action_mse": 0.3, "fast_action_mse": None, "fast_decode_failures": 256}
    folder = comparison(tmp_path, {"naive": {0: {"vqa_accuracy": 0.5, "action_mse": 0.25}}, "fast": {0: fast}})
    text = markdown_table(collect_results(folder))
    naive, found = row(text, "naive"), row(text, "fast")
    assert "step (ms)" not in naive
    assert (naive["open-loop action MSE"], naive["FAST open-loop action MSE"]) == ("0.2500", "–")
    # Nothing decoded: a number that could not be measured, and says why.
    assert (found["FAST open-loop action MSE"], found["FAST chunks not decodable"]) == ("–", "256")


def test_any_match_is_read_of_both(tmp_path):
    folder = comparison(tmp_path, {"naive": {0: {"vqa_any_match": 0.75, "vqa_any_match_interval": [0.7, 0.8]}}})
    scores = json.loads((folder / "pretrained.json").read_text())
    scores |= {"any_match": 0.95, "by_answer_type": {"number": {"accuracy": 0.5, "count": 2}}}
    (folder / "pretrained.json").write_text(json.dumps(scores))
    results = collect_results(folder)
    text = markdown_table(results)
    assert (row(text, "naive")["any-match (%)"], row(text, "before fine-tuning")["any-match (%)"]) == ("75.0", "95.0")
    assert results["before"]["vqa_accuracy_by_answer_type.number"] == 0.5
    assert pretrained_scores(folder / "pretrained.json")["vqa_accuracy_by_type"] == {"color": 0.7}


def test_no_machine_is_told_of(tmp_path):
    failure = {"condition": "naive", "seed": 1, "error": "no /data/a.hdf5 (all of it in /home/me/logs/naive.log)"}
    folder = comparison(tmp_path, {"naive": {0: {"flow_mse": 0.25}}}, failures=[failure])
    settings = json.loads((folder / "compare.json").read_text())
    settings |= {
        "command": f"hf-aegis compare --output_dir {tmp_path}",
        "conditions": {"naive": {"model": "/data/vlm"}},
    }
    (folder / "compare.json").write_text(json.dumps(settings))
    write_results(folder)
    for name in RESULT_FILES:
        text = (folder / name).read_text()
        assert not re.search(r"(/data|/home|/tmp)\b", text)
        assert str(tmp_path) not in text
    assert "all of it in naive.log" in (folder / "results.md").read_text()


def test_combinations_that_add_a_gradient_shed_no_energy(tmp_path):
    runs = {0: {"energy_shed": -138.8, "throttle_rate": 0.5}}
    folder = comparison(tmp_path, {"a_gem": {0: {"energy_shed": 0.25}}, "pcgrad": runs})
    settings = json.loads((folder / "compare.json").read_text())
    settings["conditions"] = {"a_gem": {"combiner": "one_sided"}, "pcgrad": {"combiner": "pcgrad"}}
    (folder / "compare.json").write_text(json.dumps(settings))
    results = collect_results(folder)
    text = markdown_table(results)
    assert (row(text, "a_gem")["energy shed (%)"], row(text, "pcgrad")["energy shed (%)"]) == ("25.00", "–")
    assert row(text, "pcgrad")["throttle rate (%)"] == "50.0"
    # What the run noted is not hidden.
    assert results["runs"][1]["energy_shed"] == -138.8
