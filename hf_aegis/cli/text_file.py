"""Text files that are never half-written."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by a file with `text`; an interruption leaves what was there."""
    staged = path.with_name(f"{path.name}.partial")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)
