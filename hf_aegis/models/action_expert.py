"""The action expert: a transformer that reads a vision-language model's output and predicts a velocity of actions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_aegis.functional.flow_matching import euler_integrate
from hf_aegis.models.configuration_paligemma_flow import PaliGemmaFlowConfig


class ExpertLinear(nn.Linear):
    """
    Linear layer that carries the spread of its own initial weights, `gain / √in_features`: the model's `_init_weights`
    sees one leaf module at a time and cannot know where in the expert it stands.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0):
        super().__init__(in_features, out_features)
        self.init_std = gain * in_features**-0.5


class CrossAttentionCache(NamedTuple):
    """
    What the expert needs of the vision-language model's output, computed once and read at every Euler step.

    Attributes:
        keys, values (`tuple[Tensor, ...]`): one tensor of shape `(B, heads, T, head_dim)` per expert layer.
        mask (`Tensor` of shape `(B, 1, 1, T)`, bool): `True` where the expert may look.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor


class ActionExpert(nn.Module):
    """
    Pre-norm transformer decoder over `[state token, H action tokens]` (arXiv 2604.16067).

    Its own tokens attend to each other in both directions; then they cross-attend to the vision-language model's last
    hidden states, which pass a learned projection and a layer norm first, so that their scale, which differs widely
    between checkpoints, does not matter. Time enters each action token as in π0: the embedded action and a sinusoidal
    embedding of `t` pass a two-layer perceptron together. Position in the chunk is a fixed sinusoid.

    Padded action steps are not hidden from the others: when the policy acts, no step is padding.

    The module computes in the dtype of its weights (or of autocast); time and positions are embedded in float32.

    Args:
        config (`PaliGemmaFlowConfig`): sizes, see there.
    """

    def __init__(self, config: PaliGemmaFlowConfig):
        super().__init__()
        width, depth = config.expert_hidden_size, config.expert_num_layers
        # The residual stream sums three blocks per layer: scaling their outputs keeps its variance near one.
        residual_gain = (3 * depth) ** -0.5
        self.min_period, self.max_period = config.min_period, config.max_period
        self.vlm_projection = ExpertLinear(config.get_text_config().hidden_size, width)
        self.vlm_norm = nn.LayerNorm(width)
        self.state_proj = ExpertLinear(config.state_dim, width) if config.use_state else None
        self.action_in_proj = ExpertLinear(config.action_dim, width)
        self.action_time_mlp_in = ExpertLinear(2 * width, width)
        self.action_time_mlp_out = ExpertLinear(width, width)
        layers = [ActionExpertLayer(config, residual_gain) for _ in range(depth)]
        self.layers: Sequence[ActionExpertLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        # The first prediction is close to zero velocity: the loss starts at the variance of the target.
        self.action_out_proj = ExpertLinear(width, config.action_dim, gain=0.02)

    def encode_context(self, hidden_states: Tensor, attention_mask: Tensor) -> CrossAttentionCache:
        """
        Projects the vision-language model's output to every layer's cross-attention keys and values.

        Args:
            hidden_states (`Tensor` of shape `(B, T, D)`): after the VLM's final norm.
            attention_mask (`Tensor` of shape `(B, T)`): non-zero where the expert may look.
        """
        hidden_states = hidden_states.to(self.vlm_projection.weight.dtype)
        context = self.vlm_norm(self.vlm_projection(hidden_states))
        pairs = [layer.project_context(context) for layer in self.layers]
        keys, values = zip(*pairs, strict=True)
        return CrossAttentionCache(keys, values, attention_mask.bool()[:, None, None, :])

    def forward(
        self,
        noisy_actions: Tensor,
        timestep: Tensor,
        state: Tensor | None = None,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: CrossAttentionCache | None = None,
    ) -> Tensor:
        """
        Predicts the velocity `v_θ(x_t, t, h)`.

        Args:
            noisy_actions (`Tensor` of shape `(B, H, A)`): x_t.
            timestep (`Tensor` of shape `(B,)`): t in [0, 1]; 0 is noise.
            state (`Tensor` of shape `(B, S)`, *optional*): normalised; read when the configuration says `use_state`.
            hidden_states, attention_mask (`Tensor`, *optional*): as of `encode_context`, when there is no `cache`.
            cache (`CrossAttentionCache`, *optional*): result of `encode_context`.

        Returns:
            `Tensor` of shape `(B, H, A)`: the velocity.

        Raises:
            ValueError: neither or both of `cache` and `hidden_states` with its mask are given, or the state is
                missing.
        """
        if cache is None:
            if hidden_states is None or attention_mask is None:
                raise ValueError("the action expert needs `cache`, or `hidden_states` and `attention_mask`")
            cache = self.encode_context(hidden_states, attention_mask)
        elif hidden_states is not None:
            raise ValueError("the action expert takes `cache` or `hidden_states`, not both")

        dtype = self.action_in_proj.weight.dtype
        actions = self.action_in_proj(noisy_actions.to(dtype))
        time = self._embed_time(timestep).to(actions.dtype)[:, None, :].expand_as(actions)
        tokens = self.action_time_mlp_in(torch.cat([actions, time], dim=-1))
        tokens = self.action_time_mlp_out(functional.silu(tokens))
        tokens = tokens + self._embed_positions(tokens)
        if self.state_proj is not None:
            if state is None:
                raise ValueError("`state` is missing: the configuration has use_state=True")
            tokens = torch.cat([self.state_proj(state.to(dtype))[:, None, :], tokens], dim=1)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            tokens = layer(tokens, keys, values, cache.mask)
        return self.action_out_proj(self.norm(tokens[:, -noisy_actions.shape[1] :]))

    def sample(self, noise: Tensor, cache: CrossAttentionCache, state: Tensor | None, num_steps: int) -> Tensor:
        """
        Follows the velocity from noise to actions in Euler steps, all of which read one cache.

        Every step calls the module with tensors of the same shapes: compiled in place (`expert.compile()`) it is one
        graph, whatever the number of steps. Compiled as a whole, the steps are unrolled into a graph `num_steps` times
        as large.

        Args:
            noise (`Tensor` of shape `(B, H, A)`): the start.
            cache (`CrossAttentionCache`): result of `encode_context`.
            state (`Tensor` of shape `(B, S)`, *optional*): as of `forward`.
            num_steps (`int`): Euler steps, at least 1.

        Returns:
            `Tensor` of shape `(B, H, A)`, float32: the actions.

        Raises:
            ValueError: `num_steps` is below 1, or as of `forward`.
        """
        return euler_integrate(lambda x, t: self(x, t, state, cache=cache).float(), noise.float(), num_steps)

    def _embed_time(self, timestep: Tensor) -> Tensor:
        fraction = torch.linspace(0.0, 1.0, self.norm.normalized_shape[0] // 2, device=timestep.device)
        period = self.min_period * (self.max_period / self.min_period) ** fraction
        angle = timestep.float()[:, None] * (2 * math.pi / period)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def _embed_positions(self, tokens: Tensor) -> Tensor:
        half = tokens.shape[-1] // 2
        frequency = 10_000.0 ** (-torch.arange(half, device=tokens.device, dtype=torch.float32) / half)
        angle = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(tokens.dtype)


class ActionExpertLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention and feed-forward block, each behind a layer norm and added to the stream."""

    def __init__(self, config: PaliGemmaFlowConfig, residual_gain: float):
        super().__init__()
        width = config.expert_hidden_size
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, config.expert_num_heads, residual_gain)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, config.expert_num_heads, residual_gain)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = ExpertLinear(width, config.expert_intermediate_size)
        self.down_proj = ExpertLinear(config.expert_intermediate_size, width, gain=residual_gain)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-attention's keys and values of a context of shape `(B, T, E)`."""
        return self.cross_attention.project_context(context)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """
        Args:
            tokens (`Tensor` of shape `(B, N, E)`): the expert's stream.
            keys, values (`Tensor` of shape `(B, heads, T, head_dim)`): of the vision-language model's output.
            mask (`Tensor` of shape `(B, 1, 1, T)`, bool): which of the `T` may be read.
        """
        normed = self.self_attention_norm(tokens)
        tokens = tokens + self.self_attention(normed, *self.self_attention.project_context(normed))
        tokens = tokens + self.cross_attention(self.cross_attention_norm(tokens), keys, values, mask)
        return tokens + self.down_proj(functional.gelu(self.up_proj(self.mlp_norm(tokens)), approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention whose keys and values are projected apart from its queries, so that they can be kept."""

    def __init__(self, width: int, num_heads: int, residual_gain: float):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = ExpertLinear(width, width)
        self.k_proj = ExpertLinear(width, width)
        self.v_proj = ExpertLinear(width, width)
        self.o_proj = ExpertLinear(width, width, gain=residual_gain)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of shape `(B, heads, T, head_dim)` of a context of shape `(B, T, E)`."""
        return self._split(self.k_proj(context)), self._split(self.v_proj(context))

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from `tokens` of shape `(B, N, E)`; same shape out."""
        attended = functional.scaled_dot_product_attention(
            self._split(self.q_proj(tokens)), keys, values, attn_mask=mask
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
