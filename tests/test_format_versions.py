"""Files of every kind: those of before there were versions load, those of the future are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_aegis import GSEConfig
from hf_aegis.anchors import ActivationAnchor, AnchorFingerprint
from hf_aegis.anchors.moments_over_batches import MomentsOverBatches
from hf_aegis.anchors.partial_collection import PartialCollection
from hf_aegis.atomic_files import write_text
from hf_aegis.cli import demo
from hf_aegis.data import FASTTokenizer
from hf_aegis.data.libero_format import LiberoConvention, read_recording
from hf_aegis.data.statistics import load_statistics, save_statistics
from hf_aegis.evaluation.prediction_file import PredictionFile
from hf_aegis.evaluation.rollouts.episode_file import EpisodeFile
from hf_aegis.format_version import NEWEST_VERSIONS
from hf_aegis.functional.normalization import DatasetStatistics, FeatureStatistics
from hf_aegis.models import PaliGemmaFlowConfig, PaliGemmaFlowProcessor
from hf_aegis.reports.comparison_files import (
    read_episodes,
    read_failures,
    read_result,
    read_rollout_scores,
    read_scores,
    read_settings,
)
from hf_aegis.reports.results_table import write_results
from hf_aegis.reports.run_logs import RunLogs
from hf_aegis.training.expert_ema import ExpertEMA
from hf_aegis.training.non_finite_guard import NonFiniteGuard


RESULTS = Path(__file__).parents[1] / "recipes" / "results"


def _stamp_json(path: Path, version: int | None) -> None:
    """Gives a JSON file, or the first line of JSON lines, another version, or none."""
    first, *lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    values = {key: value for key, value in json.loads(first).items() if key != "format_version"}
    path.write_text("\n".join([json.dumps({**values, **_key(version)}), *lines]))


def _stamp_header(path: Path, key: str | None, version: int | None) -> None:
    """The same for the metadata of a safetensors file, or for the JSON at one of its keys."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    if key is None:
        del metadata["format_version"]
        metadata |= {name: str(value) for name, value in _key(version).items()}
    else:
        values = {name: value for name, value in json.loads(metadata[key]).items() if name != "format_version"}
        metadata[key] = json.dumps({**values, **_key(version)})
    save_file(load_file(path), path, metadata)


def _key(version: int | None) -> dict[str, int]:
    return {} if version is None else {"format_version": version}


def _anchor(folder: Path, version: int | None) -> Any:
    counts = {"num_layers": 1, "width": 2, "num_samples": 1, "num_tokens": 1, "num_batches": 1}
    fingerprint = AnchorFingerprint(**counts, weights_sha256="0", moments="batch")
    ActivationAnchor(torch.zeros(1, 2), torch.ones(1, 2), fingerprint).save_pretrained(folder)
    _stamp_json(folder / "anchor_config.json", version)
    return ActivationAnchor.from_pretrained(folder)


def _partial_collection(folder: Path, version: int | None) -> Any:
    sums = MomentsOverBatches("pooled", None)
    sums.add(torch.zeros(1, 2), torch.ones(1, 2), 3, 1)
    collection = PartialCollection(folder, {"seed": 0}, every=1)
    collection.batch_done("moments", 4, sums)
    _stamp_header(folder / "moments-0-of-1.safetensors", "partial_collection", version)
    assert collection.begin("moments", MomentsOverBatches("pooled", None)) == 4


def _statistics(folder: Path, version: int | None) -> Any:
    feature = FeatureStatistics.from_samples("state", torch.rand(3, 2).numpy())
    save_statistics(DatasetStatistics(feature, feature), folder / "statistics.json")
    _stamp_json(folder / "statistics.json", version)
    return load_statistics(folder / "statistics.json")


def _demonstrations(folder: Path, version: int | None) -> Any:
    stated = json.loads(LiberoConvention("before_action", "top_left").to_json())
    assert stated.pop("format_version") == NEWEST_VERSIONS["demonstrations"]
    return LiberoConvention.from_json(json.dumps({**stated, **_key(version)}))


def _recording(folder: Path, version: int | None) -> Any:
    return read_recording({"hf_aegis_recording": json.dumps({"settings": {}, **_key(version)})})


def _policy(folder: Path, version: int | None) -> Any:
    saved = PaliGemmaFlowConfig().to_dict()
    assert saved.pop("format_version") == NEWEST_VERSIONS["policy"]
    return PaliGemmaFlowConfig.from_dict({**saved, **_key(version)})


def _policy_processor(folder: Path, version: int | None) -> Any:
    write_text(folder / "processor_config.json", json.dumps({"cameras": ["a"], **_key(version)}))
    values, _ = PaliGemmaFlowProcessor.get_processor_dict(folder)
    assert "format_version" not in values


def _fast_tokenizer(folder: Path, version: int | None) -> Any:
    FASTTokenizer.fit([torch.rand(4, 2).numpy()], scale=2, vocab_size=300).save_pretrained(folder)
    _stamp_json(folder / "processor_config.json", version)
    return FASTTokenizer.from_pretrained(folder)


def _gse_adapter(folder: Path, version: int | None) -> Any:
    GSEConfig(target_modules=["q_proj"]).save_pretrained(folder)
    _stamp_json(folder / "adapter_config.json", version)
    return GSEConfig.from_pretrained(str(folder))


def _expert_average(folder: Path, version: int | None) -> Any:
    average = ExpertEMA({"a": torch.nn.Parameter(torch.rand(2))}, 0.9)
    average.update()
    average.save(folder)
    _stamp_header(folder / "expert_ema.safetensors", None, version)
    average.load(folder)


def _callback_state(folder: Path, version: int | None) -> Any:
    guard = NonFiniteGuard()
    state = guard.state()
    assert state.pop("format_version") == NEWEST_VERSIONS["callback state"]
    stored = {"NonFiniteGuard": {**state, **_key(version)}}
    trainer_state = TrainerState(global_step=3, stateful_callbacks=stored)  # type: ignore[arg-type]
    guard.on_train_begin(TrainingArguments(folder, use_cpu=True), trainer_state, TrainerControl())


def _of_results(name: str, read: Callable[[Path], Any]) -> Callable[[Path, int | None], Any]:
    """Of a file that is committed without a version."""

    def reader(folder: Path, version: int | None) -> Any:
        source = sorted((RESULTS / "compare_acting").rglob(name))[0]
        path = folder / name
        path.write_bytes(source.read_bytes())
        if version is not None:
            _stamp_json(path, version)
        return read(path)

    return reader


def _demo(folder: Path, version: int | None) -> Any:
    demo._keep({"seed": 0}, folder / "demo.json")
    _stamp_json(folder / "demo.json", version)
    demo._keep({"seed": 0}, folder / "demo.json")


def _predictions(folder: Path, version: int | None) -> Any:
    path = folder / "predictions.jsonl"
    PredictionFile(path, {"model": "m"}, 1)
    _stamp_json(path, version)
    return PredictionFile(path, {"model": "m"}, 1)


def _episodes(folder: Path, version: int | None) -> Any:
    path = folder / "episodes.jsonl"
    with EpisodeFile(path, {"seed": 0}):
        pass
    _stamp_json(path, version)
    with EpisodeFile(path, {"seed": 0}):
        return read_episodes(path)


KINDS: dict[str, Callable[[Path, int | None], Any]] = {
    "activation anchor": _anchor,
    "partial collection": _partial_collection,
    "dataset statistics": _statistics,
    "demonstrations": _demonstrations,
    "recording": _recording,
    "policy": _policy,
    "policy processor": _policy_processor,
    "FAST tokenizer": _fast_tokenizer,
    "GSE adapter": _gse_adapter,
    "expert average": _expert_average,
    "callback state": _callback_state,
    "training result": _of_results("result.json", read_result),
    "comparison": _of_results("compare.json", read_settings),
    "demo": _demo,
    "VQA scores": _of_results("pretrained.json", read_scores),
    "VQA predictions": _predictions,
    "rollout scores": _of_results("libero.json", read_rollout_scores),
    "episodes": _episodes,
}


@pytest.mark.parametrize("kind", NEWEST_VERSIONS)
def test_files_of_the_past_load_and_those_of_the_future_are_refused(kind: str, tmp_path: Path) -> None:
    newest = NEWEST_VERSIONS[kind]
    KINDS[kind](tmp_path, None)
    KINDS[kind](tmp_path, 1)
    with pytest.raises(ValueError, match=rf"key 'format_version' is {newest + 1} \({kind}\), .* reads 1 to {newest}"):
        KINDS[kind](tmp_path, newest + 1)


def test_results_that_were_committed_before_there_were_versions_load() -> None:
    runs = 0
    for folder in sorted(path.parent for path in RESULTS.glob("*/compare.json")):
        settings = read_settings(folder / "compare.json")
        read_scores(folder / "pretrained.json")
        read_failures(folder / "failures.json")
        for path in sorted(folder.rglob("result.json")):
            read_result(path)
            logs = RunLogs(path.parent.parent.name, int(path.parent.name.removeprefix("seed_")), path.parent)
            assert logs.condition in settings["conditions"]
            assert logs.metrics() is not None and logs.fingerprints()
            runs += 1
        for path in sorted(folder.rglob("libero.json")):
            read_rollout_scores(path)
            assert read_episodes(path.with_name("libero.json.episodes.jsonl"))
    assert runs > 40


def test_a_comparison_writes_its_version(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"conditions": {"naive": {}}, "seeds": [0]}))
    assert write_results(tmp_path)["format_version"] == NEWEST_VERSIONS["comparison"]
    assert json.loads((tmp_path / "results.json").read_text())["format_version"] == 1
