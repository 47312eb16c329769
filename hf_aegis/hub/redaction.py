"""Texts that tokens have been taken out of, before they reach an error, a log or a card."""

import re

from huggingface_hub import get_token


REDACTED = "[redacted]"

_PATTERNS = (
    # User access tokens, those of OAuth and of jobs, and organisations' old ones; not names such as hf_hub_download.
    re.compile(r"()\bhf_(?:(?:oauth|jwt)_[\w.-]+|[A-Za-z0-9]{20,})"),
    re.compile(r"()\bapi_(?:org_)?[A-Za-z0-9]{20,}"),
    # What stands behind the name of the header, and the credentials wherever they stand.
    re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*)[^\r\n,;}\]]+"),
    re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"),
    # In addresses: user and password, and signed queries.
    re.compile(r"(\w://)[^/\s@'\"]+(?=@)"),
    re.compile(r"(?i)([?&](?:x-amz-[a-z-]+|(?:access_?)?token|signature|policy|key-pair-id|sig)=)[^&\s'\"]+"),
)


def redacted(text: str, token: str | bool | None = None) -> str:
    """
    A text without credentials: tokens of the Hub, the values of `Authorization` headers, passwords and signatures in
    addresses, the token of this process's environment or login, and `token`.

    Args:
        text (`str`):
            What is about to be shown.
        token (`str` or `bool`, *optional*):
            The token that a call was given, whatever it looks like.

    Returns:
        `str`: the text, with `[redacted]` in their places.
    """
    for secret in {token, get_token()}:
        if isinstance(secret, str) and secret.strip():
            # As it is, and as Python quotes it in other errors.
            for written in (secret.strip(), repr(secret.strip())[1:-1]):
                text = text.replace(written, REDACTED)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


def redacted_cause(error: BaseException, token: str | bool | None = None) -> BaseException | None:
    """
    The cause that a traceback may show: `error`, or `None` where it, or what it came from, has a token in its text.
    """
    found: BaseException | None = error
    while found is not None:
        if redacted(str(found), token) != str(found):
            return None
        found = found.__cause__ or found.__context__
    return error
