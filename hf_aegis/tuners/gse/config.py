"""Configuration of [`GSEModel`]."""

import enum
import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from hf_aegis.format_version import FORMAT_KEY, NEWEST_VERSIONS, check_format_version
from hf_aegis.functional.spectral_experts import BACKBONE_ADJUSTMENTS
from hf_aegis.functional.truncated_svd import SVD_METHODS


_KIND = "GSE adapter"


class GSEType(enum.StrEnum):
    """The `peft_type` of [`GSEConfig`]. PEFT's own `PeftType` cannot be extended, but a string is as good."""

    GSE = "GSE"


@dataclass
class GSEConfig(PeftConfig):
    r"""
    Generalized and specialized experts on linear layers (VLA-GSE, arXiv 2605.06175).

    Each targeted layer gets `num_experts` low-rank experts, made from slices of its weight's spectrum. The first,
    from the strongest slices, are always active; of the others a router chooses `top_k` for each token. What the
    experts start with is taken off the frozen weight's output by a fixed low-rank term. The weight itself stays as it
    is, so that the base model comes back by `disable_adapter` or `unload`, and quantised layers work.

    Args:
        r (`int`, *optional*, defaults to `16`):
            Rank of all experts together. Where it is not a multiple of `num_experts`, the first get one more.
        target_modules (`list[str]` or `str`, *optional*):
            The modules to adapt: ends of their names, a regular expression that fits whole names, or `"all-linear"`
            for all linear layers but the output head. By default those that LoRA would adapt.
        exclude_modules (`list[str]` or `str`, *optional*):
            Modules to leave out; as `target_modules`.
        num_experts (`int`, *optional*, defaults to `8`): Generalized and specialized experts.
        num_generalized (`int`, *optional*, defaults to `1`):
            How many are always active, \\(n_g\\). As many as `num_experts` leave nothing to route, and the adapter can
            be merged.
        top_k (`int`, *optional*, defaults to `2`): Specialized experts that each token gets.
        rho (`float`, *optional*, defaults to `10.0`):
            \\(\rho\\): experts start at their slice of the weight divided by it.
        eta (`float`, *optional*, defaults to `1.0`):
            \\(\eta\\) in the scale \\(s_i = \sqrt{3 \eta \, d_{in} / r_i}\\).
        base_scale (`float`, *optional*, defaults to `2.0`):
            \\(s_{base}\\) of gradient scale balancing: specialized experts have the scale \\(s_{base}
            \operatorname{mean}_k(\operatorname{tr} S_k) / \operatorname{tr} S_j\\). `None` gives them \\(s_i\\) too,
            which is what the authors' training script does.
        backbone_adjustment (`str`, *optional*, defaults to `"expectation"`):
            What is taken off the weight's output. `"expectation"`: what generalized experts add, and what specialized
            ones add on average over an even routing. `"full"`: what all specialized experts would add together, as in
            the authors' code; the output then starts further from the base model's. `"none"`: nothing.
        svd (`str`, *optional*, defaults to `"exact"`):
            `"exact"`, or `"randomized"`: much faster on large weights, and close to it.
        svd_seed (`int`, *optional*, defaults to `0`): Of the randomised decomposition.
        svd_oversampling (`int`, *optional*, defaults to `16`): Directions that it sketches beyond `r`.
        svd_power_iterations (`int`, *optional*, defaults to `4`): Its power iterations; more come closer.
        router_aux_loss_coef (`float`, *optional*, defaults to `0.01`):
            Weight of the load-balancing loss, see [`GSEModel.get_auxiliary_loss`].
        init_weights (`bool`, *optional*, defaults to `True`):
            `False` starts without a decomposition: A as a linear layer's weight, B at zero, nothing taken off the
            backbone, all scales \\(s_i\\). The model then starts as the base model.
        layers_to_transform (`list[int]` or `int`, *optional*): Indices of the layers to adapt; by default all.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the list of layers, where PEFT does not know it.
        modules_to_save (`list[str]`, *optional*): Modules that train in full and are saved with the adapter.
        check_base_weights (`bool`, *optional*, defaults to `True`):
            Whether a saved adapter is refused on a base model whose targeted layers' weights are not those it was made
            for. It is asked when the adapter is put on the model, which hashes these weights; not when a file is
            loaded into an adapter that the model has already.
        format_version (`int`, *optional*, defaults to `1`):
            Of the adapter's files. Those of a newer version than this package reads are refused.
        base_weights_sha256 (`str`, *optional*):
            Their hash. It is filled in when the adapter is made. A configuration that is created with it, as a saved
            one is, waits for the adapter's saved weights and decomposes nothing.

    Raises:
        ValueError: If a value is out of range; the message names the field.
    """

    r: int = field(default=16, metadata={"help": "Rank of all experts together."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Ends of names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    num_experts: int = field(default=8, metadata={"help": "Generalized and specialized experts."})
    num_generalized: int = field(default=1, metadata={"help": "Experts that are always active."})
    top_k: int = field(default=2, metadata={"help": "Specialized experts that each token gets."})
    rho: float = field(default=10.0, metadata={"help": "What the weight's slices are divided by."})
    eta: float = field(default=1.0, metadata={"help": "Factor under the root of the experts' scales."})
    base_scale: float | None = field(default=2.0, metadata={"help": "Base of gradient scale balancing, or none."})
    backbone_adjustment: str = field(
        default="expectation",
        metadata={"help": "What is taken off the weight's output.", "choices": BACKBONE_ADJUSTMENTS},
    )
    svd: str = field(default="exact", metadata={"help": "How weights are decomposed.", "choices": SVD_METHODS})
    svd_seed: int = field(default=0, metadata={"help": "Seed of the randomised decomposition."})
    svd_oversampling: int = field(default=16, metadata={"help": "Directions that it sketches beyond r."})
    svd_power_iterations: int = field(default=4, metadata={"help": "Its power iterations."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    init_weights: bool = field(default=True, metadata={"help": "Whether experts start from the weight's spectrum."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that train in full."})
    check_base_weights: bool = field(default=True, metadata={"help": "Refuse another base model on loading."})
    format_version: int = field(
        default=NEWEST_VERSIONS[_KIND], metadata={"help": "Of the adapter's files; not to be chosen."}
    )
    base_weights_sha256: str | None = field(
        default=None, metadata={"help": "Hash of the targeted layers; filled in when the adapter is made."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GSEType.GSE
        check_format_version({FORMAT_KEY: self.format_version}, _KIND, "adapter_config.json")
        # As in PEFT's own configurations: the order means nothing, and membership is asked often.
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        # No field, so it is not saved: a configuration in use has its hash too, and may be used again.
        self._awaits_weights = self.base_weights_sha256 is not None
        self._check()

    @property
    def num_specialized(self) -> int:
        """Experts that tokens are routed to, \\(n_s\\)."""
        return self.num_experts - self.num_generalized

    @property
    def awaits_weights(self) -> bool:
        """Whether this is the configuration of a saved adapter, whose weights are to be loaded."""
        return self._awaits_weights

    def _check(self) -> None:
        for name, choices in (("backbone_adjustment", BACKBONE_ADJUSTMENTS), ("svd", SVD_METHODS)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {choices}, found {value!r}")
        self._require_whole("num_experts", 1)
        self._require_whole("r", self.num_experts, "num_experts, so that each expert has a rank")
        self._require_whole("num_generalized", 0)
        if self.num_generalized > self.num_experts:
            raise ValueError(
                f"num_generalized must be at most num_experts={self.num_experts}, found {self.num_generalized}"
            )
        self._require_whole("top_k", 1)
        if 0 < self.num_specialized < self.top_k:
            raise ValueError(
                f"top_k must be at most the {self.num_specialized} specialized experts (num_experts - "
                f"num_generalized), found {self.top_k}"
            )
        for name in ("svd_seed", "svd_oversampling", "svd_power_iterations"):
            self._require_whole(name, 0)
        for name in ("rho", "eta", "base_scale"):
            value = getattr(self, name)
            if not (name == "base_scale" and value is None) and not (_is_number(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, found {value!r}")
        if not _is_number(self.router_aux_loss_coef) or self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef must not be negative, found {self.router_aux_loss_coef!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be combined with target_modules as a regular expression")

    def _require_whole(self, name: str, least: int, why: str = "") -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {why or least}, found {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
