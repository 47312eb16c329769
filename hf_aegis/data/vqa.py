"""Questions about images: the easy-VQA set, and the collator that turns samples into PaliGemma inputs."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature

from hf_aegis.data.pictures import read_picture
from hf_aegis.data.vqa_samples import VQAAnnotation, VQASample, VQASamples, choose
from hf_aegis.functional.prompt_text import find_control_token, prompt_fault


__all__ = ["VQA_PROMPT", "VQAAnnotation", "VQACollator", "VQASample", "VQASamples", "load_easy_vqa"]

VQA_PROMPT = "answer en {question}"
"""The prompt PaliGemma was pre-trained with for short answers in English."""


def load_easy_vqa(split: str, max_samples: int | None = None, seed: int | None = None) -> list[VQASample]:
    """
    The published easy-VQA set (coloured shapes, 64 x 64 pixels) from the PyPI package `easy-vqa`.

    Its questions fall into three types: `"yes/no"`, `"color"` and `"shape"`. Only 107 questions are distinct and each
    image holds one shape; answering from the question alone scores 67.0 % on the test split.

    Args:
        split (`str`): `"train"` (38,575 questions on 4,000 images) or `"test"` (9,673 questions on 1,000 images).
        max_samples (`int`, *optional*): how many samples to keep; all of them by default.
        seed (`int`, *optional*):
            Shuffles the samples before `max_samples` cuts them. Without it the package's own order is kept.

    Returns:
        `list[VQASample]`: samples that share one image object per image.

    Raises:
        ImportError: if the package `easy-vqa` is not installed.
        ValueError: if the split is unknown, or `max_samples` is not between 1 and the split's size.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError('easy-VQA comes with the extra `demo`: pip install "hf-aegis[demo]"') from error

    if split == "train":
        (questions, answers, image_ids), paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    elif split == "test":
        (questions, answers, image_ids), paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        raise ValueError(f"easy-VQA has the splits 'train' and 'test'; found split={split!r}.")
    order = choose(len(questions), max_samples, seed, f"easy-VQA's {split} split")
    images: dict[int, Image.Image] = {}
    samples = []
    for index in order:
        image_id = image_ids[index]
        if image_id not in images:
            images[image_id] = read_picture(paths[image_id])
        samples.append(
            VQASample(
                image=images[image_id],
                question=questions[index],
                answer=answers[index],
                question_type=_easy_vqa_type(answers[index]),
                name=f"easy-vqa/{split}/{index} (image {image_id})",
                question_id=f"{split}/{index}",
            )
        )
    return samples


def _easy_vqa_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


class VQACollator:
    """
    Turns [`VQASample`]s into PaliGemma inputs.

    Called, it gives teacher-forced inputs: the prompt is the bidirectional prefix (`token_type_ids` 0), the answer and
    the end-of-sequence token the causal suffix (`token_type_ids` 1), attended and labelled. Padding is on the right,
    so that positions count from the first image token as they do in generation. [`~VQACollator.prompts`] gives inputs
    for generation, padded on the left.

    Args:
        processor (`PaliGemmaProcessor`): the model's processor.
        prompt (`str`, *optional*, defaults to `"answer en {question}"`): what is asked; must contain `{question}`.

    Raises:
        ValueError: if the prompt lacks `{question}`.
    """

    def __init__(self, processor: Any, prompt: str = VQA_PROMPT):
        if "{question}" not in prompt:
            raise ValueError(f"The prompt must contain '{{question}}'; found {prompt!r}.")
        self.processor = processor
        self.prompt = prompt

    def __call__(self, samples: Sequence[VQASample]) -> BatchFeature:
        """
        Teacher-forced inputs.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask`, `token_type_ids` and `labels` `(B, T)`, `pixel_values`
            `(B, 3, h, w)`; `labels` is -100 outside the answer and its end-of-sequence token.

        Raises:
            ValueError: if there are no samples, an image is not RGB or is empty, or a question or answer is empty, no
                text, longer than 1000 characters or holds one of the tokenizer's special tokens; the sample is named.
        """
        samples = list(samples)
        return self._process(samples, padding_side="right", suffix=[sample.answer for sample in samples])

    def prompts(self, samples: Sequence[VQASample]) -> BatchFeature:
        """
        Prompt-only inputs for generation, padded on the left: `input_ids`, `attention_mask`, `token_type_ids`
        `(B, T)` and `pixel_values` `(B, 3, h, w)`. Raises as the call does.
        """
        inputs = self._process(samples, padding_side="left")
        del inputs["labels"]
        return inputs

    def _process(self, samples: Sequence[VQASample], **kwargs: Any) -> BatchFeature:
        if not samples:
            raise ValueError("VQACollator needs at least one sample; found none.")
        samples = list(samples)
        for index, sample in enumerate(samples):
            _check_image(sample, index)
            self._check_text(sample, index, "question", sample.question)
            if "suffix" in kwargs:
                self._check_text(sample, index, "answer", sample.answer)
        # NumPy first: the processor builds its labels with NumPy, which warns about tensors.
        inputs = self.processor(
            images=[sample.image for sample in samples],
            text=["<image>" + self.prompt.format(question=sample.question) for sample in samples],
            padding="longest",
            return_tensors="np",
            **kwargs,
        )
        return BatchFeature(dict(inputs), tensor_type="pt")

    def _check_text(self, sample: VQASample, index: int, name: str, text: str) -> None:
        special = (self.processor.image_token, *self.processor.tokenizer.all_special_tokens)
        fault = prompt_fault(text)
        if fault is None and (token := find_control_token(text, special, places=False)):
            fault = f"holds {token!r}, which the tokenizer takes for a token of the model's own: {text[:60]!r}"
        if fault is not None:
            raise ValueError(f"The {name} of VQA sample {_name(sample, index)} {fault}.")


def _name(sample: VQASample, index: int) -> str:
    return sample.name or f"{index} of the batch ({sample.question[:60]!r})"


def _check_image(sample: VQASample, index: int) -> None:
    # A silent conversion would hide a wrong file: alpha dropped over black, grey turned to colour, a mask read as RGB.
    name = _name(sample, index)
    if not isinstance(sample.image, Image.Image):
        raise ValueError(
            f"The image of VQA sample {name} must be a PIL image; found {type(sample.image).__name__}. "
            f"Open it with PIL.Image.open(path)."
        )
    if 0 in sample.image.size:
        raise ValueError(f"The image of VQA sample {name} is empty: width x height {sample.image.size}.")
    if sample.image.mode != "RGB":
        raise ValueError(
            f"The image of VQA sample {name} must have mode 'RGB'; found {sample.image.mode!r}. "
            f"Convert it on purpose with image.convert('RGB')."
        )
