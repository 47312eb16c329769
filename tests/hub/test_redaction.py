import pytest

from hf_aegis.hub.redaction import redacted, redacted_cause


TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    "text",
    [
        f"token {TOKEN} is not valid",
        f"Illegal header value b'Bearer {TOKEN}\\n'",
        "authorization: Bearer abc.def-ghi",
        "{'Authorization': 'Basic dXNlcjpwYXNz'}",
        f"https://user:{TOKEN}@huggingface.co/org/name",
        "https://user:pass-word@huggingface.co/org/name",
        "https://s3.example/key?X-Amz-Credential=AKIA1&X-Amz-Signature=5f3a&partNumber=2",
        "https://cdn.example/key?Policy=eyJ&Signature=5f3a&Key-Pair-Id=K1",
        "hf_oauth_eyJhbGciOi.eyJzdWIi.c2lnbmF0dXJl",
        "hf_jwt_eyJhbGciOi.eyJzdWIi.c2lnbmF0dXJl",
        "api_org_" + "q" * 34,
        "given: my own secret!",
    ],
)
def test_no_credential_survives(text):
    shown = redacted(text, "my own secret!")
    assert "[redacted]" in shown
    secrets = (TOKEN, "abc.def", "dXNlcjpwYXNz", "pass-word", "AKIA1", "5f3a", "eyJ", "qqqq", "my own secret")
    assert not any(secret in shown for secret in secrets)


def test_the_login_s_token_does_not_survive_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-words")
    assert redacted("what of plain-words here") == "what of [redacted] here"


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download and hf_aegis.anchors at https://huggingface.co/org/name?download=true",
        "Invalid credentials in Authorization header",
        "4f1b" * 10 + " is a commit, tokens_sha256 a key, api_version another",
    ],
)
def test_what_is_no_credential_stays(text):
    assert redacted(text) == text
    assert redacted(text, True) == text
    assert redacted(text, "") == text


def test_a_cause_that_holds_a_token_is_not_shown():
    plain, telling, further = ValueError("plain"), ValueError(TOKEN), ValueError("further")
    further.__context__ = telling
    assert redacted_cause(plain) is plain
    assert redacted_cause(telling) is None
    assert redacted_cause(further) is None
