"""An anchor's way to a folder and to the Hub, and back."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from huggingface_hub import CommitInfo
from torch import Tensor

from hf_aegis.anchors.fingerprint import AnchorFingerprint
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace
from hf_aegis.anchors.publication import push_anchor
from hf_aegis.anchors.storage import locate_anchor, read_anchor, write_anchor


if TYPE_CHECKING:
    from hf_aegis.anchors.anchor import ActivationAnchor


class StoredAnchor:
    """
    What [`ActivationAnchor`] has of storing: `save_pretrained`, `push_to_hub` and `from_pretrained`, as Hugging Face's
    own classes have them.
    """

    mean: Tensor
    variance: Tensor
    fingerprint: AnchorFingerprint
    subspaces: Mapping[str, InputSubspace]
    sensitivities: Mapping[str, PairSensitivity]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """
        Writes `anchor.safetensors` and `anchor_config.json`, each atomically.

        Args:
            folder (`str` or `os.PathLike`):
                Created where it is missing.

        Returns:
            `Path`: the folder.
        """
        moments = {"mean": self.mean, "variance": self.variance}
        return write_anchor(folder, moments, self.fingerprint, self.subspaces, self.sensitivities)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        dataset_license: str | None = None,
    ) -> CommitInfo:
        """
        Pushes this anchor to a dataset repository on the Hub, created where it is missing: the files of
        [`~ActivationAnchor.save_pretrained`], tables of layers and subspaces for `load_dataset` and the Hub's viewer,
        and a card, in one commit.

        Args:
            repo_id (`str`):
                `"org/name"`.
            private (`bool`, *optional*):
                Whether a new repository is private; by default, as the namespace has it. To ask for a private one and
                find a public one is an error.
            revision (`str`, *optional*):
                Branch, started from the main branch where it is missing.
            token (`str` or `bool`, *optional*):
                Token for the Hub; the stored one by default.
            commit_message (`str`, *optional*):
                First line of the commit's message.
            create_pr (`bool`, *optional*, defaults to `False`):
                Opens a pull request in the place of a commit.
            dataset_license (`str`, *optional*):
                Licence of the data that the anchor was collected on, by the Hub's name for it, such as `"cc-by-4.0"`.

        Returns:
            `CommitInfo`: of huggingface_hub: `commit_url`, `oid`, `pr_url`.

        Raises:
            HubUploadError: if the push fails. All that was to be pushed stays in a folder, which the error names.
        """
        folder = self.save_pretrained(tempfile.mkdtemp(prefix="hf-aegis-anchor-"))
        commit = push_anchor(
            cast("ActivationAnchor", self),
            folder,
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            dataset_license=dataset_license,
        )
        shutil.rmtree(folder)
        return commit

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """
        Loads an anchor from a folder, or from a dataset repository on the Hub.

        Args:
            folder_or_repo_id (`str` or `os.PathLike`):
                A local folder, or else a repository id such as `"org/paligemma2-3b-mix-224-vqav2-anchor"`.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*):
                Token for the Hub; the stored one by default.
            cache_dir (`str` or `os.PathLike`, *optional*):
                Where downloads are kept.
            local_files_only (`bool`, *optional*, defaults to `False`):
                Uses the cache only, without a network call.

        Returns:
            [`ActivationAnchor`], on the CPU.

        Raises:
            OSError: if neither a folder nor a repository holds the files.
            ValueError: if a file is corrupt, is no activation anchor, or has a newer format.
        """
        tensors_file, config_file = locate_anchor(
            folder_or_repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        moments, fingerprint, subspaces, sensitivities = read_anchor(tensors_file, config_file)
        try:
            return cls(moments["mean"], moments["variance"], fingerprint, subspaces, sensitivities)  # type: ignore[call-arg]
        except ValueError as error:
            raise ValueError(f"{tensors_file}: {error}") from error
