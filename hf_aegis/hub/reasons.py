"""Why the Hub did not do what was asked, in one line, and what to do about it."""

from json import JSONDecodeError

from httpx2 import InvalidURL
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_aegis.hub.redaction import redacted


MALFORMED = (TypeError, AttributeError, LookupError)
"""What huggingface_hub raises of an answer that is JSON, but not what it expects: it looks into it unchecked."""

FAILURES = (
    *(OSError, HTTPError, InvalidURL, EntryNotFoundError, HFValidationError, ValueError, RuntimeError),
    *MALFORMED,
)
"""What huggingface_hub raises where a request or a transfer fails; it has no class that covers them."""

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def describe_repo(repo_id: str, repo_type: str, revision: str | None = None) -> str:
    """`"the dataset repository org/name (revision v2)"`."""
    return f"the {repo_type} repository {repo_id}" + (f" (revision {revision})" if revision else "")


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """
    One line: the Hub's own words, or what kept them from coming, and what to do about it.

    Args:
        error (`BaseException`):
            One of [`FAILURES`].
        token (`str` or `bool`, *optional*):
            The token that the call was given; it is never shown.
    """
    return redacted(_reason(error), token)


def _reason(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which allows no network call; unset it"
    if isinstance(error, GatedRepoError):
        return f"it is gated: ask for access at {_page(error)}, and {_LOG_IN}{_said(error)}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no such repository, or it is private and this token may not see it: check its id, or {_LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return "it has no such branch, tag or commit"
    if isinstance(error, LocalEntryNotFoundError):
        return _not_cached(error)
    if isinstance(error, EntryNotFoundError):
        return "it has no such file"
    if isinstance(error, HfHubHTTPError):
        return _refused(error)
    if isinstance(error, (*MALFORMED, JSONDecodeError)):
        return f"the Hub at {constants.ENDPOINT} gave an answer that cannot be understood ({type(error).__name__})"
    text = _one_line(str(error)) or type(error).__name__
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):
        # The transfer of a large file: "Error while uploading ...".
        return f"{text}: {_reason(error.__cause__)}"
    if isinstance(error, HTTPError):
        return f"the Hub at {constants.ENDPOINT} could not be reached ({text}); check the connection"
    return text


def _refused(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = _one_line(error.server_message or str(error))
    if status == 401:
        return f"the Hub does not accept the token ({said}); {_LOG_IN}"
    if status == 403:
        return f"the token does not permit it ({said}); use one that may write there"
    if status in (409, 412):
        return f"something else was pushed at the same time ({said}); push again"
    if status == 429:
        return f"the Hub answers too many requests ({said}); wait a while"
    if status >= 500:
        return f"the Hub failed with status {status} ({said})"
    return f"the Hub refused with status {status} ({said})"


def _not_cached(error: LocalEntryNotFoundError) -> str:
    """The reason is in the cause, where the Hub was asked at all."""
    cause = error.__cause__
    if isinstance(cause, (HTTPError, OfflineModeIsEnabled)):
        return f"it is not in the cache, and {_reason(cause)}"
    if cause is None:
        return "it is not in the cache, and a download was not allowed (local_files_only)"
    return f"it is not in the cache, and the Hub did not deliver it: {_one_line(str(cause))}"


def _page(error: GatedRepoError) -> str:
    repo_type, repo_id = getattr(error, "repo_type", None), getattr(error, "repo_id", None)
    prefix = constants.REPO_TYPES_URL_PREFIXES.get(repo_type or "", "")
    return f"{constants.ENDPOINT}/{prefix}{repo_id}" if repo_id else "its page"


def _said(error: HfHubHTTPError) -> str:
    return f" ({_one_line(error.server_message)})" if error.server_message else ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
