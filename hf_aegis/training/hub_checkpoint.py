"""A checkpoint on the Hub that a training is resumed from."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from hf_aegis.hub import HubDownloadError, download_files
from hf_aegis.hub.names import is_commit, is_file_name
from hf_aegis.hub.reasons import FAILURES, describe_repo, reason
from hf_aegis.training.certificate_callback import CERTIFICATE_FILE
from hf_aegis.training.json_lines import EXPERTS_FILE, METRICS_FILE, PROJECTION_FILE
from hf_aegis.training.neuron_cosine_callback import NEURON_COSINES_FILE
from hf_aegis.training.run_upload import LAST_CHECKPOINT


# "org/name", or "org/name@revision".
_ON_THE_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")
_NUMBERED = re.compile(r"checkpoint-(\d+)")
# A checkpoint has a dozen, sharded weights of the largest models a few hundred.
_MAX_FILES = 2000
_LOGS = (METRICS_FILE, PROJECTION_FILE, EXPERTS_FILE, CERTIFICATE_FILE, NEURON_COSINES_FILE)


def is_hub_checkpoint(source: str) -> bool:
    """Whether a checkpoint is to be looked for on the Hub: it reads as an id, and there is no such folder."""
    return _ON_THE_HUB.fullmatch(source) is not None and not Path(source).is_dir()


def download_checkpoint(source: str, output_dir: Path, token: str | bool | None = None) -> Path:
    """
    Downloads the newest checkpoint of a model repository: `last-checkpoint`, or else that of the most steps, as the
    Trainer's hub strategies `"checkpoint"` and `"all_checkpoints"` leave them. With it come the run's logs, which are
    put into `output_dir` where there are none, to be continued.

    Args:
        source (`str`): `"org/name"`, or `"org/name@revision"`.
        output_dir (`Path`): The output folder of the training.
        token (`str` or `bool`, *optional*): Token for the Hub; that of the environment or login by default.

    Returns:
        `Path`: the checkpoint's folder, in the Hub's cache.

    Raises:
        HubDownloadError: If the repository or a file of it cannot be had, or it has no whole checkpoint.
    """
    found = _ON_THE_HUB.fullmatch(source)
    assert found is not None
    repo_id, revision = found["repo"], found["revision"]
    commit, files = _files(repo_id, revision, token)
    folder = _newest(files)
    if folder is None:
        raise HubDownloadError(
            f"no checkpoint in {describe_repo(repo_id, 'model', revision or 'main')} on the Hub: it has neither "
            f"{LAST_CHECKPOINT}/{TRAINER_STATE_NAME} nor checkpoint-*/{TRAINER_STATE_NAME}; only runs with "
            'push_to_hub=True and hub_strategy="checkpoint" or "all_checkpoints" leave one'
        )
    # A pickle that older trainings left there is not needed.
    wanted = [f for f in files if f.startswith(f"{folder}/") and not f.endswith(TRAINING_ARGS_NAME)]
    if len(wanted) > _MAX_FILES:
        raise HubDownloadError(
            f"{folder} in {describe_repo(repo_id, 'model', revision or 'main')} on the Hub has {len(wanted)} files, "
            f"expected at most {_MAX_FILES}: it is no checkpoint of a training"
        )
    logs = [name for name in _LOGS if name in files]
    paths = download_files(repo_id, [*wanted, *logs], revision=commit, token=token)
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in paths[len(wanted) :]:
        if not (output_dir / path.name).exists():
            shutil.copy(path, output_dir / path.name)
    return paths[wanted.index(f"{folder}/{TRAINER_STATE_NAME}")].parent


def _files(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[str, list[str]]:
    """The commit that is meant and the files it has; without the Hub, those in the cache."""
    try:
        if not constants.is_offline_mode():
            info = HfApi(token=token).model_info(repo_id, revision=revision)
            files = [sibling.rfilename for sibling in info.siblings or []]
            if not is_commit(info.sha) or not all(map(is_file_name, files)):
                raise ValueError("the Hub's list of its files cannot be understood")
            return str(info.sha), files
        snapshot = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except FAILURES as error:
        raise HubDownloadError(
            f"no checkpoint from {describe_repo(repo_id, 'model', revision or 'main')} on the Hub: "
            f"{reason(error, token)}"
        ) from None
    return snapshot.name, [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]


def _newest(files: Iterable[str]) -> str | None:
    parts = (f.partition("/") for f in files)
    whole = [folder for folder, _, name in parts if name == TRAINER_STATE_NAME]
    if LAST_CHECKPOINT in whole:
        return LAST_CHECKPOINT
    numbered = [(int(match[1]), name) for name in whole if (match := _NUMBERED.fullmatch(name))]
    return max(numbered)[1] if numbered else None
