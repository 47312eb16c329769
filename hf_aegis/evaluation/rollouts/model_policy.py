"""A trained model as a policy: observations in, actions in the simulator's units out."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from hf_aegis.data.libero_format import CAMERAS, STATE_FEATURES
from hf_aegis.data.libero_pictures import PictureSettings
from hf_aegis.evaluation.evaluating import evaluating
from hf_aegis.evaluation.rollouts.policy import FEATURE_WIDTHS, Observation, PolicyError, PolicyRequest, checked_chunk
from hf_aegis.json_files import read_json_object
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor


_OBSERVATION = ("input_ids", "pixel_values", "attention_mask", "token_type_ids", "state")
# Where a training run leaves adapters that cannot be merged into the weights beside them.
_ADAPTER_FOLDER = "adapter"
_MERGED_ADAPTERS = ("LORA",)


class ModelPolicy:
    """
    A [`PaliGemmaFlowForAction`] that acts.

    It is a [`BatchedPolicy`], and with `reset` and `act` also a [`Policy`] of one episode. Images and states go in as
    [`~data.LiberoDataset`] gives them to the training: upright, and the state in its order. The noise that the flow
    starts from is a function of the episode's seed and step alone, whichever requests come along in the batch; what
    differs between batches is rounding.

    Args:
        model (`PaliGemmaFlowForAction` or `PeftModel` of it): Runs on its own device and in its own dtype.
        processor (`PaliGemmaFlowProcessor`): With the statistics of the training data.
        head (`"flow"` or `"fast"`, *optional*, defaults to `"flow"`): What predicts the actions.
        state_features (`Sequence[str]`, *optional*): The proprioception that makes up the state, in order; by default
            what the processor says, or else joints and fingers, as of [`~data.LiberoDataset`]. A model with
            `use_state=False` has none.
        num_inference_steps (`int`, *optional*): Euler steps of the flow; by default the model's.

    Raises:
        ValueError: If the processor has no statistics, or lacks what the head needs, or the state is not what the
            model was trained on.
    """

    def __init__(
        self,
        model: Any,
        processor: PaliGemmaFlowProcessor,
        head: Literal["flow", "fast"] = "flow",
        state_features: Sequence[str] | None = None,
        num_inference_steps: int | None = None,
    ):
        if processor.statistics is None:
            raise ValueError("the processor has no statistics of the training data, so actions would have no units")
        if head not in ("flow", "fast"):
            raise ValueError(f"head must be 'flow' or 'fast', found {head!r}")
        if head == "fast" and (processor.action_tokenizer is None or num_inference_steps is not None):
            raise ValueError("head='fast' needs a processor with a FAST tokenizer, and has no num_inference_steps")
        self.model = model
        self.processor = processor
        self.head = head
        self.state_features = _state_features(model, processor, state_features)
        self.num_inference_steps = num_inference_steps
        self._instruction: str | None = None
        self._seed = 0

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        attn_implementation: str = "eager",
        **options: Any,
    ) -> Self:
        """
        Loads model and processor, and adapters that lie in the folder `adapter` of a training run and are not merged.

        Args:
            source (`str` or `os.PathLike`): Folder or Hub id.
            revision (`str`, *optional*): Of a model on the Hub.
            dtype, device, attn_implementation (`str`, *optional*): Of the model.
            options: Of the class.

        Raises:
            OSError: If there is no such model.
            ValueError: If it has no action expert, or as of the class.
        """
        from transformers import AutoConfig, AutoProcessor

        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        config = AutoConfig.from_pretrained(source, **pinned)
        if config.model_type != PaliGemmaFlowForAction.config_class.model_type:
            raise ValueError(f"{source} is a {config.model_type!r} model without an action expert: it cannot act")
        model: Any = PaliGemmaFlowForAction.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, **pinned
        )
        if _has_unmerged_adapter(Path(source)):
            from peft import PeftModel

            import hf_aegis.tuners  # noqa: F401 (registers what adapters may be)

            with warnings.catch_warnings():
                # peft asks transformers by a name that is deprecated there.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                model = PeftModel.from_pretrained(model, str(Path(source) / _ADAPTER_FOLDER)).get_base_model()
        processor = AutoProcessor.from_pretrained(source, **pinned)
        return cls(model.to(device).eval(), processor, **options)

    @property
    def cameras(self) -> Sequence[str]:
        """The cameras that the model was trained to look through, in order."""
        return tuple(self.processor.cameras or CAMERAS)

    @property
    def chunk_size(self) -> int:
        """Actions per chunk."""
        return self.model.config.chunk_size

    def reset(self, instruction: str, seed: int = 0) -> None:
        """Begins an episode; `seed` is of the noise that the flow starts from."""
        self._instruction, self._seed = instruction, seed

    def act(self, observation: Observation) -> np.ndarray:
        """
        The next chunk of actions, `(H, 7)`.

        Raises:
            ValueError: If there was no `reset`, or the observation is not what the model was trained on.
            PolicyError: If the model's answer is not finite.
        """
        if self._instruction is None:
            raise ValueError("act was called before reset: the policy has no instruction")
        (chunk,) = self.act_together([PolicyRequest(self._instruction, observation, self._seed)])
        if isinstance(chunk, PolicyError):
            raise chunk
        return chunk

    def act_together(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray | PolicyError]:
        """
        Chunks of actions for several episodes.

        Raises:
            ValueError: If an observation is not what the model was trained on: a camera or a part of the state is
                missing or of another shape, a value is not finite.
        """
        if not requests:
            return []
        images = [self._images(request.observation.images) for request in requests]
        text = [request.instruction for request in requests]
        if self.state_features:
            states = [self._state(request.observation.proprioception) for request in requests]
            batch = self.processor(images=images, text=text, state=np.stack(states))
        else:
            batch = self.processor.prepare_action_inputs(images, text)
        options: dict[str, Any] = {"head": self.head}
        if self.head == "fast":
            options["action_tokenizer"] = self.processor.action_tokenizer
        with evaluating(self.model) as device:
            inputs = {name: batch[name].to(device) for name in _OBSERVATION if name in batch}
            if self.head == "flow":
                options |= {"noise": self._noise(requests).to(device), "num_steps": self.num_inference_steps}
            sampled = self.model.sample_actions(**inputs, **options).float().cpu().numpy()
        return [self._executable(actions) for actions in sampled]

    def _images(self, images: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if missing := [name for name in self.cameras if name not in images]:
            raise ValueError(f"the policy looks through {list(self.cameras)}; missing are images of {missing}")
        return [images[name] for name in self.cameras]

    def _state(self, proprioception: Mapping[str, np.ndarray]) -> np.ndarray:
        if missing := [name for name in self.state_features if name not in proprioception]:
            raise ValueError(f"the policy's state is made of {list(self.state_features)}; missing are {missing}")
        state = np.concatenate([np.asarray(proprioception[name], dtype=np.float32) for name in self.state_features])
        if state.shape != (expected := (sum(FEATURE_WIDTHS[name] for name in self.state_features),)):
            raise ValueError(
                f"the policy's state {list(self.state_features)} has shape {expected}, found {state.shape}"
            )
        if not np.isfinite(state).all():
            raise ValueError(f"the state holds NaN or infinity: {state.tolist()}")
        return state

    def _noise(self, requests: Sequence[PolicyRequest]) -> torch.Tensor:
        shape = (self.model.config.chunk_size, self.model.config.action_dim)
        drawn = [
            np.random.default_rng([request.seed, request.observation.step]).standard_normal(shape, dtype=np.float32)
            for request in requests
        ]
        return torch.from_numpy(np.stack(drawn))

    def _executable(self, actions: np.ndarray) -> np.ndarray | PolicyError:
        try:
            finite = checked_chunk(actions, actions.shape[-1])
            return checked_chunk(np.asarray(self.processor.postprocess_actions(finite)))
        except PolicyError as error:
            return error


def trained_pictures(source: str | os.PathLike, revision: str | None = None) -> PictureSettings | None:
    """
    How the pictures were rendered that a saved model was trained on, without loading it; `None` where it does not say.

    Raises:
        OSError: If there is no such model.
        ValueError: If what it says cannot be read.
    """
    pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
    values, _ = PaliGemmaFlowProcessor.get_processor_dict(source, **pinned)
    return None if (found := values.get("pictures")) is None else PictureSettings.from_dict(found)


def _state_features(model: Any, processor: PaliGemmaFlowProcessor, asked: Sequence[str] | None) -> tuple[str, ...]:
    known = processor.state_features
    if not model.config.use_state:
        if asked:
            raise ValueError(f"the model takes no state (use_state=False), found state_features {list(asked)}")
        return ()
    if asked is not None and known is not None and list(asked) != known:
        raise ValueError(f"the model's state was made of {known} in training, found state_features {list(asked)}")
    features = tuple(asked or known or STATE_FEATURES)
    if unknown := [name for name in features if name not in FEATURE_WIDTHS]:
        raise ValueError(f"state_features: unknown {unknown}, expected some of {list(FEATURE_WIDTHS)}")
    assert processor.statistics is not None  # checked at the door
    width, expected = sum(FEATURE_WIDTHS[name] for name in features), processor.statistics.state.dimension
    if width != expected:
        raise ValueError(f"state_features {list(features)} make {width} values, the model's state has {expected}")
    return features


def _has_unmerged_adapter(folder: Path) -> bool:
    config = folder / _ADAPTER_FOLDER / "adapter_config.json"
    return config.is_file() and read_json_object(config).get("peft_type") not in _MERGED_ADAPTERS
