"""The answers of several models side by side, as HTML."""

from collections.abc import Sequence
from html import escape

from answers import Answers
from settings import ShownModel


def answer_cards(answered: Sequence[tuple[ShownModel, Answers]], question: str, expected: str | None = None) -> str:
    """
    A card per model: what it answers, how sure it is, and its most probable answers as bars.

    Args:
        answered (`Sequence[tuple[ShownModel, Answers]]`): Models and what they said.
        question (`str`): What they were asked.
        expected (`str`, *optional*): The right answer, where it is known.
    """
    cards = "".join(_card(shown, answers, expected) for shown, answers in answered)
    known = f" The right answer is <strong>{escape(expected)}</strong>." if expected else ""
    return f'<p class="asked">Asked: “{escape(question)}”{known}</p><div class="cards">{cards}</div>'


def _card(shown: ShownModel, answers: Answers, expected: str | None) -> str:
    given = answers.given
    verdict = ""
    if expected is not None:
        right = given.text == expected
        verdict = f'<span class="verdict {"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</span>'
    bars = "".join(
        f'<li><span class="word">{escape(answer.text) or "<em>nothing</em>"}</span>'
        f'<span class="bar" aria-hidden="true"><span style="width:{100 * answer.probability:.2f}%"></span></span>'
        f'<span class="share">{percent(answer.probability)}</span></li>'
        for answer in answers.likely
    )
    return (
        f'<section class="card {shown.key}" data-model="{shown.key}" aria-label="Answer of {escape(shown.label)}">'
        f'<h3>{escape(shown.label)}</h3><p class="summary">{escape(shown.summary)}</p>'
        f'<p class="answer"><span class="given">{escape(given.text) or "<em>nothing</em>"}</span>'
        f'<span class="sure">{percent(given.probability)}</span>{verdict}</p>'
        f'<ol class="bars" aria-label="Most probable answers">{bars}</ol></section>'
    )


def percent(share: float) -> str:
    """A probability in per cent, not more exact than it is worth; small ones do not become zero."""
    if share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.9995 else "> 99.9 %"
