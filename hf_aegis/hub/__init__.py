"""
The Hugging Face Hub: folders pushed in one commit, files downloaded from one commit, cards rendered from templates,
and error texts that say what to do and hold no token. Knows nothing of models, anchors or runs.
"""

from hf_aegis.hub.card import find_template, render_card
from hf_aegis.hub.commit import hub_commit
from hf_aegis.hub.download import HubDownloadError, download_files
from hf_aegis.hub.names import is_repo_id
from hf_aegis.hub.redaction import redacted
from hf_aegis.hub.upload import HubUploadError, ensure_repo, push_folder


__all__ = [
    "HubDownloadError",
    "HubUploadError",
    "download_files",
    "ensure_repo",
    "find_template",
    "hub_commit",
    "is_repo_id",
    "push_folder",
    "redacted",
    "render_card",
]
