"""What of a training's output folder goes to the Hub."""

import contextlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_aegis.atomic_files import write_text
from hf_aegis.hub import HubUploadError, push_folder
from hf_aegis.machine_paths import portable_name, without_machine_paths
from hf_aegis.models.policy_push import WEIGHTS
from hf_aegis.publishing import CARD_FILE
from hf_aegis.publishing.adapter_card import ADAPTER_CONFIG


LAST_CHECKPOINT = "last-checkpoint"
"""Folder of a repository with the newest checkpoint, as the Trainer's hub strategy `"checkpoint"` names it."""

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Ends of the names of files that are pickles, or hold some."""

# Checkpoints are for resuming; pickles are nothing that anybody should have to trust; the rest is of this machine:
# locks, files being written, what trackers log.
NOT_PUSHED = (
    f"{PREFIX_CHECKPOINT_DIR}-*",
    *(f"*{suffix}" for suffix in _PICKLED),
    TRAINER_STATE_NAME,
    ".*",
    "*/.*",
    "_*",
    "*.tfevents.*",
)

_STAGED_PREFIX = ".push-"


def push_run(folder: str | os.PathLike[str], repo_id: str, **options: Any) -> CommitInfo:
    """
    Pushes what a training has left in its output folder, in one commit: the model with its processor, logs, results
    and card; no checkpoints and no pickle, and no paths of this machine.

    Args:
        folder (`str` or `os.PathLike`): The output folder, or that of an adapter.
        repo_id (`str`): The model repository.
        options: `private`, `revision`, `token`, `commit_message`, `create_pr` of [`~hub.push_folder`].

    Raises:
        HubUploadError: If the push fails, for whatever reason; the folder stays as it is.
    """
    replacements = {
        path.relative_to(folder).as_posix(): portable_adapter(path)
        for path in Path(folder).rglob(ADAPTER_CONFIG)
        if not path.relative_to(folder).parts[0].startswith((PREFIX_CHECKPOINT_DIR, "."))
    }
    # A repository with weights in shards and whole, one of them old, would be loaded from whichever comes first.
    stale = WEIGHTS if any(Path(folder).glob(WEIGHTS)) else None
    try:
        return push_folder(
            folder, repo_id, ignore_patterns=NOT_PUSHED, delete_patterns=stale, replacements=replacements, **options
        )
    except HubUploadError as error:
        command = ["hf-aegis", "push", os.fspath(Path(folder).absolute()), repo_id]
        command += ["--private"] if options.get("private") else []
        command += ["--revision", options["revision"]] if options.get("revision") else []
        command += ["--create_pr"] if options.get("create_pr") else []
        raise HubUploadError(f"{error}; `{shlex.join(command)}` does the same", error.why) from error.__cause__


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A new folder in a training's output folder, for what is pushed. It stays, unless the block raises an error."""
    staged = Path(tempfile.mkdtemp(prefix=_STAGED_PREFIX, dir=folder))
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def delete_staged(folder: Path) -> None:
    """Deletes what a killed process has staged in a training's output folder: links keep weights on the disk."""
    for staged in folder.glob(f"{_STAGED_PREFIX}*"):
        shutil.rmtree(staged, ignore_errors=True)


def stage_checkpoint(folder: Path, checkpoint: Path, place: str | None, staged: Path) -> None:
    """
    Puts into a folder what is pushed of a training under way: the model of a checkpoint and the logs so far, and
    on request the checkpoint itself. Large files are linked, not copied, so that they stay when the Trainer
    deletes the checkpoint before they are on the Hub.

    Args:
        folder (`Path`): The training's output folder.
        checkpoint (`Path`): The checkpoint, written to its end.
        place (`str`, *optional*): Folder of the repository for the checkpoint; by default it is not pushed.
        staged (`Path`): The folder to be pushed, on the same file system.
    """
    for path in sorted(folder.iterdir()):
        # The logs are still being written, so they are copied; weights of an earlier push are not those of now.
        if path.is_file() and path.suffix in (".jsonl", ".json", ".yaml") and not _is_left_out(path):
            shutil.copy(path, staged)
    for path in sorted(checkpoint.rglob("*")):
        if not path.is_file() or _is_left_out(path):
            continue
        inside = path.relative_to(checkpoint)
        if not _is_state(path):
            _link(path, staged / inside)
        if place is not None:
            _link(path, staged / place / inside)
    for path in staged.rglob(ADAPTER_CONFIG):
        _replace(path, portable_adapter(path).decode())
    if place is not None and (state := staged / place / TRAINER_STATE_NAME).exists():
        _replace(state, json.dumps(without_machine_paths(json.loads(state.read_text())), indent=2))


def _is_state(path: Path) -> bool:
    """Whether a checkpoint's file is of the training rather than of the model."""
    return path.suffix in _PICKLED or path.name in (TRAINER_STATE_NAME, "expert_ema.safetensors")


def _is_left_out(path: Path) -> bool:
    # Peft writes a card of its own beside each adapter, which is not filled in and names the base model's folder.
    return path.name in (TRAINING_ARGS_NAME, CARD_FILE) or path.name.startswith((".", "_"))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has links.
        shutil.copy(source, target)


def _replace(path: Path, text: str) -> None:
    """Never writes into a file that may be a link to a checkpoint's."""
    write_text(path, text)


def portable_adapter(path: Path) -> bytes:
    """An adapter's configuration whose base model is called what it is called elsewhere."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if base := config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = portable_name(base)
    return json.dumps(config, indent=2, sort_keys=True).encode()
