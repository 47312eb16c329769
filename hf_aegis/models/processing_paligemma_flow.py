"""Processor of a PaliGemma with an action expert: prompts and images in, robot units in and out."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PaliGemmaProcessor
from transformers.utils import PROCESSOR_NAME

from hf_aegis.data.fast_tokenizer import FASTTokenizer
from hf_aegis.data.libero_pictures import PictureSettings
from hf_aegis.format_version import FORMAT_KEY, check_format_version, written_version
from hf_aegis.functional.normalization import (
    DatasetStatistics,
    FeatureStatistics,
    normalize,
    unnormalize,
)
from hf_aegis.functional.prompt_text import find_control_token, prompt_fault
from hf_aegis.models.action_tokens import append_suffix, bind_to_vlm, refuse_action_words


Array = np.ndarray | torch.Tensor

_KIND = "policy processor"
# Where a saved processor keeps its FAST tokenizer.
ACTION_TOKENIZER_FOLDER = "action_tokenizer"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_PADDING_OPTIONS = ("padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length")


class PaliGemmaFlowProcessor(PaliGemmaProcessor):
    """
    A [`~transformers.PaliGemmaProcessor`] that also knows the robot's units.

    A call with `state` or `actions` prepares a batch for the action expert: values in robot units are normalised with
    the statistics of the training data, and the prompt is `<image>` once per camera, `<bos>`, the instruction, and a
    newline, PaliGemma's own form. In instructions, underscores and line breaks become spaces, as in openpi. Any other
    call is the stock processor's.

    Args:
        image_processor, tokenizer, chat_template: of the vision-language model.
        statistics (`DatasetStatistics` or its `to_dict()`, *optional*):
            Of the training data; needed to normalise. Saved in `processor_config.json`.
        cameras (`Sequence[str]`, *optional*):
            Names of the cameras, in the order in which the policy was trained to see them. When given, samples with
            another number of images are refused.
        action_tokenizer (`FASTTokenizer`, *optional*):
            Writes normalised actions as tokens, which the language model can learn. It is told the vocabulary of
            `tokenizer`, and prompts that hold one of its ids are refused. Saved in the folder `action_tokenizer`.
        state_features (`Sequence[str]`, *optional*):
            Names of the proprioception that makes up the state, in order. For whoever acts with the policy.
        pictures (`PictureSettings` or its `to_dict()`, *optional*):
            How the images of the training data were rendered. For whoever lets the policy act in a simulator.

    Raises:
        ValueError: the ids of the action tokens do not fit into the vocabulary, or the statistics or pictures are
            malformed.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        statistics: DatasetStatistics | Mapping[str, Any] | None = None,
        cameras: Sequence[str] | None = None,
        action_tokenizer: FASTTokenizer | None = None,
        state_features: Sequence[str] | None = None,
        pictures: PictureSettings | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if isinstance(statistics, Mapping):
            statistics = DatasetStatistics.from_dict(statistics)
        self.statistics = statistics
        self.cameras = None if cameras is None else list(cameras)
        if action_tokenizer is not None:
            bind_to_vlm(action_tokenizer, self.tokenizer)
        self.action_tokenizer = action_tokenizer
        self.state_features = None if state_features is None else list(state_features)
        self.pictures = PictureSettings.from_dict(pictures) if isinstance(pictures, Mapping) else pictures

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Names of the parts that transformers loads and saves; the FAST tokenizer is ours to load."""
        return [name for name in super().get_attributes() if name != "action_tokenizer"]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs: Any) -> tuple[dict, dict]:
        """The contents of `processor_config.json`, with the FAST tokenizer loaded where there is one."""
        values, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        place = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "", PROCESSOR_NAME)
        check_format_version(values, _KIND, place)
        values.pop(FORMAT_KEY, None)
        if values.get("action_tokenizer") is not None:
            options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
            folder = os.path.join(kwargs.get("subfolder") or "", values["action_tokenizer"])
            values["action_tokenizer"] = FASTTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=folder, **options
            )
        return values, unused

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list:
        """As of the stock processor, with the FAST tokenizer, where there is one, in a folder of its own."""
        if self.action_tokenizer is not None:
            # First, so that a push takes it along.
            self.action_tokenizer.save_pretrained(os.path.join(save_directory, ACTION_TOKENIZER_FOLDER))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_vlm_processor(
        cls,
        processor: PaliGemmaProcessor | str | os.PathLike,
        statistics: DatasetStatistics | None = None,
        cameras: Sequence[str] | None = None,
        action_tokenizer: FASTTokenizer | None = None,
        *,
        state_features: Sequence[str] | None = None,
        pictures: PictureSettings | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """
        Extends a stock processor, sharing its tokenizer and image processor.

        Args:
            processor (`PaliGemmaProcessor`, `str` or `os.PathLike`): the processor, or where to load it from.
            statistics, cameras, action_tokenizer, state_features, pictures: as of the class.
            revision (`str`, *optional*): branch, tag or commit of a processor on the Hub.
            token (`str` or `bool`, *optional*): token for the Hub; that of the environment or login by default.

        Raises:
            TypeError: `processor` is, or loads as, something else.
            ValueError: as of the class.
        """
        if isinstance(processor, str | os.PathLike):
            processor = AutoProcessor.from_pretrained(processor, revision=revision or "main", token=token)
        if not isinstance(processor, PaliGemmaProcessor):
            raise TypeError(f"expected a PaliGemmaProcessor, found {type(processor).__name__}")
        return cls(
            processor.image_processor,
            processor.tokenizer,
            chat_template=processor.chat_template,
            statistics=statistics,
            cameras=cameras,
            action_tokenizer=action_tokenizer,
            state_features=state_features,
            pictures=pictures,
        )

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        suffix: Any = None,
        state: Any = None,
        actions: Any = None,
        action_is_pad: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: as of the stock processor; with `state` or `actions` see `prepare_action_inputs`.
            text, suffix: as of the stock processor.
            state (array of shape `(B, S)` or `(S,)`, *optional*): in robot units.
            actions (array of shape `(B, H, A)` or `(H, A)`, *optional*): in robot units.
            action_is_pad (bool array of shape `(B, H)` or `(H,)`, *optional*): `True` past the end of the episode.

        Raises:
            ValueError: statistics are missing, a dimension differs from them, a value is not finite, or as of
                `prepare_action_inputs`.
        """
        if state is None and actions is None:
            if action_is_pad is not None:
                raise ValueError("`action_is_pad` was given without `actions`")
            return super().__call__(images=images, text=text, suffix=suffix, **kwargs)
        if state is not None:
            state = normalize(_as_float32(state), self._statistics("state"))
        if actions is not None:
            actions = normalize(_as_float32(actions), self._statistics("actions"))
        return self.prepare_action_inputs(images, text, state, actions, action_is_pad, suffix=suffix, **kwargs)

    def prepare_action_inputs(
        self,
        images: Sequence[Any],
        text: str | Sequence[str],
        state: Any = None,
        actions: Any = None,
        action_is_pad: Any = None,
        suffix: str | Sequence[str] | None = None,
        action_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        The batch for the action expert from values that are normalised already.

        Args:
            images (`Sequence[Sequence[image]]`):
                For each sample its cameras, in order: RGB `PIL.Image` or uint8 array of shape `(h, w, 3)`. With a
                single `str` as `text`, the cameras of that sample. Any size is resized to the vision tower's, and
                what is not square is squeezed to a square as in stock PaliGemma (LIBERO's frames are square); nothing
                is cropped, so train and act with frames of the same shape.
            text (`str` or `Sequence[str]`): instructions, without `<image>` tokens.
            state (array of shape `(B, S)` or `(S,)`, *optional*): normalised.
            actions (array of shape `(B, H, A)` or `(H, A)`, *optional*): normalised.
            action_is_pad (bool array of shape `(B, H)` or `(H,)`, *optional*): `True` past the end of the episode.
            suffix (`str` or `Sequence[str]`, *optional*): answers to learn beside the actions; adds `labels`.
            action_tokens (`bool`, *optional*, defaults to `False`):
                Whether the answer to learn is the actions themselves: the ids of their FAST tokens and `<eos>`. The
                whole chunk is written, past the end of the episode too, as the dataset fills it up; `action_is_pad`
                does not reach the tokens, each of which concerns all time steps. Padding is on the right.
            **kwargs: of the stock processor. Padding is on the right unless said otherwise.

        Returns:
            `BatchFeature` of tensors: `input_ids`, `attention_mask`, `token_type_ids` of shape `(B, T)`,
            `pixel_values` of shape `(B, n, 3, h, w)`, and of what was given `state`, `actions`, `action_is_pad`
            and `labels`.

        Raises:
            ValueError: numbers of samples, cameras or dimensions do not fit, an image is empty or not RGB
                uint8, or an instruction is empty, no text, longer than 1000 characters, or holds a token of the
                model's own (`<image>`, `<eos>`, or a word that stands for an action of the FAST tokenizer); with
                `action_tokens`, there is no FAST tokenizer, there are no actions, or a `suffix` or padding is asked
                for as well.
        """
        if action_tokens:
            self._check_action_tokens(actions, suffix, kwargs)
        single = isinstance(text, str)
        instructions = [text] if isinstance(text, str) else list(text)
        samples = self._check_images([images] if single else images, len(instructions))
        prompts = [self.image_token * len(samples[0]) + self._clean(instruction) for instruction in instructions]
        # NumPy first: the stock processor makes its labels through np.array, which warns on torch tensors.
        options = {"padding": True, "padding_side": "right"} | kwargs | {"return_tensors": "np"}
        suffixes = [suffix] if isinstance(suffix, str) else suffix
        batch = super().__call__(images=samples, text=prompts, suffix=suffixes, **options)
        if self.action_tokenizer is not None:
            refuse_action_words(batch, instructions, self.action_tokenizer, self.tokenizer)
        if action_tokens:
            chunks = _batched(_as_float32(actions), "actions", 3, len(samples), single)
            append_suffix(batch, self._action_suffixes(chunks), self.tokenizer.pad_token_id)
        batch = batch.convert_to_tensors("pt")
        if suffix is None and not action_tokens:
            # The stock processor labels nothing (-100 everywhere), which would ask the model for a loss over no token.
            del batch["labels"]
        batch["pixel_values"] = batch["pixel_values"].unflatten(0, (len(samples), -1))

        for name, values, ndim in (("state", state, 2), ("actions", actions, 3)):
            if values is not None:
                tensor = _batched(_as_float32(values), name, ndim, len(samples), single)
                if self.statistics is not None:
                    _check_dimension(tensor, self._statistics(name))
                batch[name] = torch.as_tensor(tensor)
        if action_is_pad is not None:
            if actions is None:
                raise ValueError("`action_is_pad` was given without `actions`")
            is_pad = _batched(np.asarray(action_is_pad), "action_is_pad", 2, len(samples), single)
            if is_pad.dtype != np.bool_ or is_pad.shape != tuple(batch["actions"].shape[:2]):
                raise ValueError(
                    f"`action_is_pad` must be boolean of shape {tuple(batch['actions'].shape[:2])}, "
                    f"found {is_pad.dtype} of shape {is_pad.shape}"
                )
            batch["action_is_pad"] = torch.as_tensor(is_pad)
        return batch

    def postprocess_actions(self, actions: Array) -> Array:
        """
        Turns the model's actions back into robot units.

        Args:
            actions (`np.ndarray` or `torch.Tensor` of shape `(..., A)`): of `sample_actions`; half precision is
                raised to float32. Values outside [-1, 1] are extrapolated, not clipped.

        Returns:
            The same kind of array, same shape.

        Raises:
            ValueError: statistics are missing, the dimension differs from them, or a value is not finite.
        """
        statistics = self._statistics("actions")
        if isinstance(actions, torch.Tensor):
            return unnormalize(actions.to(torch.promote_types(actions.dtype, torch.float32)), statistics)
        return unnormalize(actions.astype(np.promote_types(actions.dtype, np.float32)), statistics)

    def to_dict(self) -> dict[str, Any]:
        """The processor as JSON-ready values, the statistics included."""
        output = super().to_dict() | written_version(_KIND)
        output["statistics"] = None if self.statistics is None else self.statistics.to_dict()
        output["pictures"] = None if self.pictures is None else self.pictures.to_dict()
        output["action_tokenizer"] = None if self.action_tokenizer is None else ACTION_TOKENIZER_FOLDER
        return output

    def _action_suffixes(self, chunks: np.ndarray) -> list[list[int]]:
        fast = self.action_tokenizer
        assert fast is not None  # checked at the door
        return [[*fast.to_vlm_ids(tokens), self.tokenizer.eos_token_id] for tokens in fast(chunks)]

    def _check_action_tokens(self, actions: Any, suffix: Any, options: Mapping[str, Any]) -> None:
        if self.action_tokenizer is None:
            raise ValueError(
                "action_tokens=True needs a FAST tokenizer, and this processor has none: build it with "
                "PaliGemmaFlowProcessor.from_vlm_processor(processor, action_tokenizer=FASTTokenizer.fit(chunks))"
            )
        if actions is None:
            raise ValueError("action_tokens=True was given without `actions`")
        if suffix is not None:
            raise ValueError("action tokens are the suffix: give `suffix` or action_tokens=True, not both")
        if given := [name for name in _PADDING_OPTIONS if name in options]:
            raise ValueError(f"a batch with action tokens is padded on the right; drop {', '.join(given)}")

    def _statistics(self, feature: str) -> FeatureStatistics:
        if self.statistics is None:
            raise ValueError(
                f"`{feature}` in robot units needs the statistics of the training data, and this processor has none: "
                "build it with PaliGemmaFlowProcessor.from_vlm_processor(processor, statistics=dataset.statistics)"
            )
        return getattr(self.statistics, feature)

    def _clean(self, instruction: Any) -> str:
        if not isinstance(instruction, str):
            raise ValueError(f"an instruction must be a str, found {type(instruction).__name__}")
        if fault := prompt_fault(cleaned := " ".join(instruction.replace("_", " ").split())):
            raise ValueError(f"the instruction {fault}")
        # Before the underscores went, which a token's name may have.
        # Places are words like others, where they do not stand for an action.
        special = (self.image_token, *self.tokenizer.all_special_tokens)
        if token := find_control_token(instruction, special, places=False):
            raise ValueError(f"the instruction {instruction!r} holds {token!r}, which is a token of the model's own")
        return cleaned

    def _check_images(self, images: Any, batch_size: int) -> list[list[Image.Image]]:
        if not isinstance(images, Sequence) or not all(isinstance(cameras, Sequence) for cameras in images):
            raise ValueError("`images` must be a list with, for each sample, the list of its cameras' images")
        if len(images) != batch_size:
            raise ValueError(f"found images of {len(images)} samples for {batch_size} instructions")
        if batch_size == 0:
            raise ValueError("the batch is empty")
        expected = len(images[0]) if self.cameras is None else len(self.cameras)
        names = "" if self.cameras is None else f" ({', '.join(self.cameras)})"
        for index, cameras in enumerate(images):
            if len(cameras) != expected or expected == 0:
                raise ValueError(f"sample {index} has {len(cameras)} images, expected {max(expected, 1)}{names}")
        return [
            [_as_rgb(image, f"image {camera} of sample {index}") for camera, image in enumerate(cameras)]
            for index, cameras in enumerate(images)
        ]


def _as_rgb(image: Any, where: str) -> Image.Image:
    expected = "expected an RGB PIL image or a uint8 array of shape (h, w, 3)"
    if isinstance(image, Image.Image):
        if image.mode != "RGB" or 0 in image.size:
            raise ValueError(f"{where} has mode {image.mode!r} and size {image.size}: {expected}")
        return image
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{where} is a {type(image).__name__}: {expected}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{where} is {image.dtype} of shape {image.shape}: {expected}")
    return Image.fromarray(image)


def _as_float32(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float()
    return np.asarray(values, dtype=np.float32)


def _batched(values: np.ndarray, name: str, ndim: int, batch_size: int, single: bool) -> np.ndarray:
    if single and values.ndim == ndim - 1:
        values = values[None]
    if values.ndim != ndim or values.shape[0] != batch_size:
        raise ValueError(
            f"`{name}` must have {ndim} dimensions and {batch_size} samples, found shape {tuple(values.shape)}"
        )
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise ValueError(
            f"`{name}` holds NaN or infinity, first at index {np.argwhere(~np.isfinite(values))[0].tolist()}"
        )
    return values


def _check_dimension(values: np.ndarray, statistics: FeatureStatistics) -> None:
    if values.shape[-1] != statistics.dimension:
        raise ValueError(
            f"`{statistics.name}` has {values.shape[-1]} dimensions, the processor's statistics {statistics.dimension}"
        )
