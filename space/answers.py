"""A model's answer to a question about an image, and the answers it nearly gave."""

from typing import NamedTuple

import torch
from loading import Loaded
from PIL import Image

from hf_aegis.data.vqa import VQACollator, VQASample


TOP = 5
_MAX_NEW_TOKENS = 12


class Answer(NamedTuple):
    """An answer as a whole, with the probability that the model gives to it, its end included."""

    text: str
    probability: float


class Answers(NamedTuple):
    """What a model answers (greedily), and its most probable answers, in falling order."""

    given: Answer
    likely: list[Answer]


@torch.inference_mode()
def ask(loaded: Loaded, image: Image.Image, question: str) -> Answers:
    """
    Asks a question, with PaliGemma's prompt for short answers.

    The probable answers come from a beam search: what is written alike is one answer, whatever the tokens.

    Args:
        loaded (`Loaded`): Model and processor.
        image (`PIL.Image.Image`): RGB.
        question (`str`): The question.
    """
    collator = VQACollator(loaded.processor)
    inputs = collator.prompts([VQASample(image=image, question=question, answer="")]).to(loaded.model.device)
    options = {
        "max_new_tokens": _MAX_NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "use_cache": True,
    }
    greedy = loaded.model.generate(**inputs, num_beams=1, **options)
    beams = loaded.model.generate(
        # A sum of log-probabilities, not divided by a length: the probability of the answer.
        **inputs,
        num_beams=TOP,
        num_return_sequences=TOP,
        length_penalty=0.0,
        early_stopping="never",
        **options,
    )
    prompt = inputs["input_ids"].shape[1]
    # Of different tokens written alike, each counts; the same tokens found twice do not.
    found: dict[tuple[int, ...], float] = {}
    steps = loaded.model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True)
    given = _without_padding(greedy.sequences[0, prompt:], loaded)
    found[given] = steps[0, : len(given)].sum().exp().item()
    for sequence, score in zip(beams.sequences[:, prompt:], beams.sequences_scores, strict=True):
        found.setdefault(_without_padding(sequence, loaded), score.exp().item())

    likely: dict[str, float] = {}
    for tokens, probability in found.items():
        text = _decode(tokens, loaded)
        likely[text] = likely.get(text, 0.0) + probability
    ordered = [Answer(text, min(share, 1.0)) for text, share in sorted(likely.items(), key=lambda each: -each[1])]
    text = _decode(given, loaded)
    return Answers(Answer(text, min(likely[text], 1.0)), ordered[:TOP])


def _without_padding(sequence: torch.Tensor, loaded: Loaded) -> tuple[int, ...]:
    """The tokens of an answer up to its end of sequence."""
    tokens = sequence.tolist()
    end = loaded.processor.tokenizer.eos_token_id
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)


def _decode(tokens: tuple[int, ...], loaded: Loaded) -> str:
    return loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
