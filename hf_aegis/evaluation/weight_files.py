"""Which weights a model has."""

import hashlib
from pathlib import Path


def policy_fingerprint(source: str, revision: str | None = None) -> str:
    """
    What tells policies apart: the hash of a folder's weights, unmerged adapters included, or id and commit on the Hub.
    """
    from hf_aegis.hub import hub_commit

    return hash_weights(Path(source), "adapter") or f"{source}@{hub_commit('model', source, revision)}"


def hash_weights(folder: Path, *beside: str) -> str | None:
    """
    SHA-256 of the weight files in a folder, their names included; `None` where there is no such folder.

    Args:
        folder (`Path`): A model's.
        beside (`str`): Folders in it whose weights belong to the model as well, if they are there.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for place in (folder, *(folder / name for name in beside)):
        for path in sorted([*place.glob("*.safetensors"), *place.glob("*.bin")]):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
