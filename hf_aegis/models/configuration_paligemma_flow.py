"""Configuration of a PaliGemma with a flow-matching action expert."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PaliGemmaConfig
from transformers.utils import CONFIG_NAME

from hf_aegis.format_version import NEWEST_VERSIONS, check_format_version
from hf_aegis.functional.flow_matching import check_beta_sampling


_KIND = "policy"


@strict
class PaliGemmaFlowConfig(PaliGemmaConfig):
    r"""
    A [`~transformers.PaliGemmaConfig`] with the fields of the action expert. Every field of the vision-language model
    keeps its name and meaning; where π0 ([`~transformers.PI0Config`]) has the same notion, its name is used.

    Args:
        action_dim (`int`, *optional*, defaults to 7): values `A` of one action.
        state_dim (`int`, *optional*, defaults to 9): values `S` of the proprioceptive state.
        chunk_size (`int`, *optional*, defaults to 50): action steps `H` predicted at once.
        use_state (`bool`, *optional*, defaults to `True`):
            Whether the state enters the expert as a token. Without it a `state` given to the model is not read.
        expert_hidden_size (`int`, *optional*, defaults to 1024): width of the expert, even.
        expert_num_layers (`int`, *optional*, defaults to 12): layers of the expert.
        expert_num_heads (`int`, *optional*, defaults to 16): attention heads; divides `expert_hidden_size`.
        expert_intermediate_size (`int`, *optional*, defaults to 4096): width of the expert's feed-forward blocks.
        flow_gradient_to_vlm (`bool`, *optional*, defaults to `True`):
            Whether the flow loss trains the vision-language model. `False` detaches the hidden states (stop-gradient).
        flow_loss_scale (`float`, *optional*, defaults to 10.0): s of the loss `s · mean((v - u)²)`.
        num_inference_steps (`int`, *optional*, defaults to 10): Euler steps from noise to actions.
        time_sampling (`"beta"` or `"uniform"`, *optional*, defaults to `"beta"`):
            Distribution of the training times, see [`~functional.flow_matching.sample_timesteps`].
        time_sampling_beta_alpha, time_sampling_beta_beta (`float`, *optional*, default to 1.5 and 1.0):
            Shape of the Beta distribution, of openpi's time, which runs against ours.
        time_sampling_scale, time_sampling_offset (`float`, *optional*, default to 0.999 and 0.001):
            Scale and offset of openpi's time.
        min_period, max_period (`float`, *optional*, default to 4e-3 and 4.0):
            Shortest and longest period of the sinusoidal time embedding, in units of t.
        vlm_name_or_path (`str`, *optional*):
            Where the vision-language model came from, an id on the Hub or the name of a folder; written by
            `PaliGemmaFlowForAction.from_vlm`.
        vlm_revision (`str`, *optional*): the commit it was loaded at, where it came from the Hub; as before.
        format_version (`int`, *optional*, defaults to 1):
            Of the model's files. Those of a newer version than this package reads are refused.

    The sizes of the expert are this project's choice: the AEGIS preprint (arXiv 2604.16067) does not give them.

    Raises:
        StrictDataclassError: a value has the wrong type, or is out of range; the message names the field.
    """

    model_type = "paligemma_flow"
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "last_hidden_state"]  # noqa: RUF012

    action_dim: int = 7
    state_dim: int = 9
    chunk_size: int = 50
    use_state: bool = True
    expert_hidden_size: int = 1024
    expert_num_layers: int = 12
    expert_num_heads: int = 16
    expert_intermediate_size: int = 4096
    flow_gradient_to_vlm: bool = True
    flow_loss_scale: float | int = 10.0
    num_inference_steps: int = 10
    time_sampling: Literal["beta", "uniform"] = "beta"
    time_sampling_beta_alpha: float | int = 1.5
    time_sampling_beta_beta: float | int = 1.0
    time_sampling_scale: float | int = 0.999
    time_sampling_offset: float | int = 0.001
    min_period: float | int = 4e-3
    max_period: float | int = 4.0
    vlm_name_or_path: str | None = None
    vlm_revision: str | None = None
    format_version: int = NEWEST_VERSIONS[_KIND]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As of [`~transformers.PreTrainedConfig`].

        Raises:
            ValueError: the model has a newer format.
        """
        check_format_version(config_dict, _KIND, config_dict.get("_name_or_path") or CONFIG_NAME)
        return super().from_dict(config_dict, **kwargs)

    def validate_flow(self) -> None:
        """Part of the `@strict` validation: ranges of the expert's and the flow's fields."""
        for name in (
            "action_dim",
            "state_dim",
            "chunk_size",
            "expert_hidden_size",
            "expert_num_layers",
            "expert_num_heads",
            "expert_intermediate_size",
            "num_inference_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.expert_hidden_size % 2:
            raise ValueError(f"expert_hidden_size must be even, found {self.expert_hidden_size}")
        if self.expert_hidden_size % self.expert_num_heads:
            raise ValueError(
                f"expert_num_heads must divide expert_hidden_size, "
                f"found {self.expert_num_heads} and {self.expert_hidden_size}"
            )
        if not self.flow_loss_scale > 0:
            raise ValueError(f"flow_loss_scale must be positive, found {self.flow_loss_scale}")
        if not 0 < self.min_period < self.max_period:
            raise ValueError(
                f"periods must satisfy 0 < min_period < max_period, found {self.min_period} and {self.max_period}"
            )
        check_beta_sampling(
            self.time_sampling_beta_alpha,
            self.time_sampling_beta_beta,
            self.time_sampling_scale,
            self.time_sampling_offset,
        )
