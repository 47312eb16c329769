"""Which checkpoint of an interrupted run can be resumed."""

import json
import logging
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """
    The newest checkpoint under `output_dir` that was written to its end, or `None`.

    The trainer writes a checkpoint's `trainer_state.json` last; a run that was killed while saving leaves a folder
    without it, or with half of it. Such folders are passed over, with a warning.
    """
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    for folder in sorted(folders, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, json.JSONDecodeError):
            logger.warning("%s was not written to its end and is passed over", folder)
            continue
        return folder
    return None
