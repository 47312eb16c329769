"""Files that stand alone: statistics, answered questions, episodes, logs, VQA folders, tokenizers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_engine import JSON, JSON_LINES, reading
from PIL import Image

from file_readers.file_reader import FileReader
from hf_aegis.data import FASTTokenizer
from hf_aegis.data.statistics import load_statistics, save_statistics
from hf_aegis.data.vqa_sources import load_vqa
from hf_aegis.evaluation.prediction_file import PredictionFile
from hf_aegis.evaluation.rollouts.episode_file import EpisodeFile
from hf_aegis.evaluation.vqa_scores import VQAResult
from hf_aegis.functional.normalization import DatasetStatistics, FeatureStatistics
from hf_aegis.reports.comparison_files import read_episodes
from hf_aegis.training.json_lines import JSONLines


def statistics(folder: Path) -> FileReader:
    path = folder / "statistics.json"
    samples = np.linspace(-1, 1, 12).reshape(6, 2)
    found = DatasetStatistics(*(FeatureStatistics.from_samples(name, samples) for name in ("state", "actions")))
    save_statistics(found, path)
    old = json.dumps(found.to_dict()).encode()
    return FileReader([path.read_bytes(), old], reading(path, load_statistics), "statistics.json", JSON)


def predictions(folder: Path) -> FileReader:
    path = folder / "predictions.jsonl"
    settings = {"model": "m", "count": 4}
    text = {"question": "q?", "digest": "d", "question_type": "color", "name": "n", "question_id": "1"}
    rows = [
        {**text, "answer": "red", "cross_entropy": 0.5, "prediction": "red", "accuracy": 1.0},
        {**text, "answer": "a", "answers": ["a", "b", "a", "c"], "prediction": "a", "answer_type": "other"},
        {**text, "answer": "a", "cross_entropy": float("nan")},
    ]
    seeds = [
        b"".join(json.dumps(line).encode() + b"\n" for line in ({**version, "settings": settings}, *rows))
        for version in ({}, {"format_version": 1})
    ]

    def read(path: Path) -> Any:
        records = PredictionFile(path, settings, 1).records
        return VQAResult.of(records).to_dict() if records else None

    return FileReader(seeds, reading(path, read), "predictions.jsonl", JSON_LINES)


def episodes(folder: Path) -> FileReader:
    path = folder / "libero.json.episodes.jsonl"
    settings = {"policy": "model", "seed": 3}
    ended = {"suite": "libero_object", "task": "pick_up", "start": 0, "seed": 1, "success": True, "steps": 9}
    rows = [{**ended, "wall_s": 0.5, "error": None, "seconds": {"policy": 0.1}}]
    rows += [{**rows[0], "start": 1, "success": None, "error": "crashed", "seconds": {}, "protocol": "p"}]
    seeds = [
        b"".join(json.dumps(line).encode() + b"\n" for line in ({**version, "settings": settings}, *rows))
        for version in ({}, {"format_version": 1})
    ]

    def read(path: Path) -> Any:
        read_episodes(path)
        with EpisodeFile(path, settings) as file:
            return file.results

    return FileReader(seeds, reading(path, read), "libero.json.episodes.jsonl", JSON_LINES)


def logs(folder: Path) -> FileReader:
    path = folder / "metrics.jsonl"
    rows: list[dict[str, Any]] = [{"step": 0, "loss": 1.5}, {"step": 1, "loss": None}, {"step": 2, "note": "é"}]
    seed = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def read(path: Path) -> Any:
        JSONLines(path).read()
        JSONLines(path).append([{"step": 3}])
        JSONLines(path).rewind(1)
        return JSONLines(path).read()

    return FileReader([seed, seed[:-5]], reading(path, read), "metrics.jsonl", JSON_LINES)


def vqa_folder(folder: Path) -> FileReader:
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    row = {"image": "a.png", "question": "what?", "answer": "red", "question_type": "color", "question_id": 7}
    rows = [row, {**row, "answers": ["a", "b", "c", "d"]}, {**row, "answers": [{"answer": "a"}] * 4, "answer": None}]
    seed = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def read(path: Path) -> Any:
        return list(load_vqa(str(folder), "test", seed=0))

    return FileReader([seed], reading(folder / "test.jsonl", read), "test.jsonl", JSON_LINES)


def fast_configuration(folder: Path) -> FileReader:
    chunks = list(np.random.default_rng(0).uniform(-1, 1, (20, 4, 2)))
    fast = FASTTokenizer.fit(chunks, scale=2, vocab_size=300)
    fast.save_pretrained(folder)
    path = folder / "processor_config.json"
    old = json.dumps({k: v for k, v in json.loads(path.read_bytes()).items() if k != "format_version"}).encode()

    def read(path: Path) -> Any:
        return FASTTokenizer.from_pretrained(folder).num_tokens

    return FileReader([path.read_bytes(), old], reading(path, read), "processor_config.json", JSON)


def fast_vocabulary(folder: Path) -> FileReader:
    chunks = list(np.random.default_rng(0).uniform(-1, 1, (20, 4, 2)))
    fast = FASTTokenizer.fit(chunks, scale=2, vocab_size=80)
    fast.save_pretrained(folder)
    path = folder / "tokenizer.json"

    def read(path: Path) -> Any:
        loaded = FASTTokenizer.from_pretrained(folder)
        return loaded.decode(loaded(chunks[0], out_of_range="clip"))

    return FileReader([path.read_bytes()], reading(path, read), str(folder), JSON)


SINGLE_FILE_READERS = {
    "statistics": statistics,
    "predictions": predictions,
    "episodes": episodes,
    "logs": logs,
    "vqa_folder": vqa_folder,
    "fast_configuration": fast_configuration,
    "fast_vocabulary": fast_vocabulary,
}
