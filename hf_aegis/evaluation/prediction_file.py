"""A file of answered questions that a killed run continues: JSON lines, the settings first, then batch after batch."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_aegis.atomic_files import write_text
from hf_aegis.data.vqa_samples import VQASample, annotations
from hf_aegis.evaluation.vqa import sample_digest
from hf_aegis.evaluation.vqa_scores import VQARecord
from hf_aegis.format_version import check_format_version, written_version
from hf_aegis.json_files import parse_json_object


_KIND = "VQA predictions"
_ANEW = "Delete the file, or choose another output, to start anew."


class PredictionFile:
    """
    Answered questions, appended a batch at a time. What a killed run left of a batch is dropped, so that batches are
    the same ones as of a run that was not killed.

    Args:
        path (`Path`): the file; made if it does not exist.
        settings (`dict[str, Any]`): what the answers depend on, as JSON values.
        batch_size (`int`): questions that are appended together.

    Attributes:
        records (`list[VQARecord]`): the questions that were answered before.

    Raises:
        ValueError: if the file was written with other settings, each named with both values, is not such a file, or
            has a newer format.
    """

    def __init__(self, path: Path, settings: dict[str, Any], batch_size: int):
        self.path = path
        self.records: list[VQARecord] = []
        settings = json.loads(json.dumps(settings))
        content = path.read_bytes() if path.exists() else b""
        # A line without its end was being written when the run was killed.
        lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
        if not lines:
            write_text(path, json.dumps({**written_version(_KIND), "settings": settings}) + "\n")
            return
        first = parse_json_object(lines[0], f"{path}, line 1")
        check_format_version(first, _KIND, f"{path}, line 1")
        self._check(first.get("settings"), settings)
        keep = (len(lines) - 1) // batch_size * batch_size
        if len(lines) - 1 == settings.get("count"):
            keep = len(lines) - 1
        for number, line in enumerate(lines[1 : keep + 1], start=2):
            # Of a model that has diverged the cross-entropy may not be finite.
            values = parse_json_object(line, f"{path}, line {number}", finite=False)
            try:
                self.records.append(VQARecord.from_dict(values))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not an answered question: {error}") from error
        if (size := sum(len(line) + 1 for line in lines[: keep + 1])) != len(content):
            os.truncate(path, size)

    def append(self, records: Sequence[VQARecord]) -> None:
        """Writes a batch through to the disk."""
        text = "".join(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def check(self, samples: Sequence[VQASample]) -> None:
        """
        Whether the questions answered before are the first of those asked now, about the same images. All texts are
        compared before the first image is decoded.

        Args:
            samples (`Sequence[VQASample]`): all that is asked.

        Raises:
            ValueError: if one is not; it is named with what is asked now.
        """
        if len(self.records) > len(samples):
            raise ValueError(f"{self.path} holds {len(self.records)} answers to {len(samples)} questions. {_ANEW}")
        samples = samples[: len(self.records)]
        for line, (record, annotation) in enumerate(zip(self.records, annotations(samples), strict=True), start=2):
            if record.annotation != annotation:
                raise ValueError(
                    f"{self.path}, line {line}: holds {record.annotation}, where {annotation} is asked now. {_ANEW}"
                )
        pairs = zip(self.records, samples, strict=True)
        bar = tqdm(pairs, total=len(samples), desc="Answered before", unit="question", leave=False, disable=None)
        for line, (record, sample) in enumerate(bar, start=2):
            if record.digest != sample_digest(sample):
                raise ValueError(
                    f"{self.path}, line {line}: the answer to {sample.name or sample.question!r} was given to another "
                    f"image. {_ANEW}"
                )

    def _check(self, found: Any, settings: dict[str, Any]) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}, line 1: expected the key 'settings' with an object; found {found!r}.")
        differing = [
            f"{key} is {found.get(key)!r} there and {settings.get(key)!r} here"
            for key in sorted(found.keys() | settings)
            if found.get(key) != settings.get(key)
        ]
        if differing:
            raise ValueError(f"{self.path} was begun with other settings: {'; '.join(differing)}. {_ANEW}")
