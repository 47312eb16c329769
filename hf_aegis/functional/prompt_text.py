"""Questions and instructions as they come: whether there is something to read, and whether it is text alone."""

import re
import unicodedata
from collections.abc import Iterable


MAX_PROMPT_LENGTH = 1000
"""Characters of a question or an instruction. The longest of VQA v2's has 100, of LIBERO's about as many."""

CONTROL_TOKENS = ("<image>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
"""What Gemma's tokenizers read as a token of their own, wherever it is written."""

# Places and shapes in a picture, PaliGemma's words for what it has seen.
_PLACE = re.compile(r"<loc[0-9]{4}>|<seg[0-9]{3}>")
_SHOWN = 60


def prompt_fault(text: str, max_length: int = MAX_PROMPT_LENGTH) -> str | None:
    """
    What keeps a text from being asked.

    Args:
        text (`str`): A question or an instruction.
        max_length (`int`, *optional*, defaults to `1000`): Characters that it may have.

    Returns:
        `str`: A clause such as `"has 2000 characters, expected at most 1000"`; `None` of a text that can be asked.
    """
    if len(text) > max_length:
        return f"has {len(text)} characters, expected at most {max_length}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"is no valid Unicode: {text[:_SHOWN]!r} holds half of a surrogate pair"
    # Letters, numbers, punctuation and symbols; not what is blank, invisible, or a mark on nothing.
    if not any(unicodedata.category(character)[0] in "LNPS" for character in text):
        return f"is empty, or all of it is invisible: {text[:_SHOWN]!r}"
    return None


def find_control_token(text: str, tokens: Iterable[str] = CONTROL_TOKENS, places: bool = True) -> str | None:
    """
    A token of the model's own that is written out in a text: the tokenizer would take it for the token, so that
    whoever writes the text could add pictures, end it, or put words into the model's mouth.

    Args:
        text (`str`): A question or an instruction.
        tokens (`Iterable[str]`, *optional*): Tokens to look for; by default those of Gemma's tokenizers.
        places (`bool`, *optional*, defaults to `True`):
            Whether to look for `<loc0000>` and `<seg000>`, too, as the page for visitors does. To processors they are
            words like others.

    Returns:
        `str`: One of them, or `None`.
    """
    if found := next((token for token in tokens if token and token in text), None):
        return found
    place = _PLACE.search(text) if places else None
    return place[0] if place else None
