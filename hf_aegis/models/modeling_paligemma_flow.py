"""PaliGemma with a flow-matching action expert: answers questions like before, and acts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PaliGemmaForConditionalGeneration
from transformers import initialization as init
from transformers.models.paligemma.modeling_paligemma import PaliGemmaCausalLMOutputWithPast

from hf_aegis.data.fast_tokenizer import FASTTokenizer
from hf_aegis.functional.flow_matching import (
    flow_matching_loss,
    interpolate,
    sample_timesteps,
    target_velocity,
)
from hf_aegis.models.action_expert import ActionExpert, ExpertLinear
from hf_aegis.models.configuration_paligemma_flow import PaliGemmaFlowConfig
from hf_aegis.models.discrete_head import sample_discrete_actions
from hf_aegis.models.policy_push import push_policy
from hf_aegis.models.vlm_exchange import default_to_eager, flow_config, load_vlm, plain_config


@dataclass
class PaliGemmaFlowOutput(PaliGemmaCausalLMOutputWithPast):
    """
    Output of a forward pass with `actions`. Fields of the plain VLM keep their meaning; there are no `logits`.

    Attributes:
        loss (`Tensor`, a scalar): `flow_loss_scale · flow_mse`, plus `language_loss` when there are `labels`.
        flow_mse (`Tensor`, a scalar): raw mean squared error of the velocity over the steps that are not padding.
        language_loss (`Tensor`, a scalar, *optional*): mean cross-entropy over the labelled tokens.
        velocity (`Tensor` of shape `(B, H, A)`): predicted velocity.
        last_hidden_state (`Tensor` of shape `(B, T, D)`): of the language model, after its final norm; never detached.
    """

    flow_mse: Tensor | None = None
    language_loss: Tensor | None = None
    velocity: Tensor | None = None
    last_hidden_state: Tensor | None = None


class PaliGemmaFlowForAction(PaliGemmaForConditionalGeneration):
    """
    A PaliGemma or PaliGemma 2 with a flow-matching action expert (arXiv 2604.16067).

    Only the submodule `action_expert` is new. Without `actions`, `forward` and `generate` are those of
    [`~transformers.PaliGemmaForConditionalGeneration`], bit for bit, and `to_vlm` gives that model back.

    The attention implementation is `"eager"` unless asked otherwise: Gemma 2 soft-caps its attention scores, which
    `"sdpa"` cannot do, and rounding differs between implementations.

    Args:
        config (`PaliGemmaFlowConfig`): of the whole model.

    Raises:
        ValueError: `"sdpa"` is asked for with a language model that soft-caps its attention scores.

    Example:
        ```python
        >>> model = PaliGemmaFlowForAction.from_vlm("google/paligemma2-3b-mix-224", dtype=torch.bfloat16)
        >>> model(**batch).loss.backward()
        >>> actions = processor.postprocess_actions(model.sample_actions(**observation))
        ```
    """

    config: PaliGemmaFlowConfig
    config_class = PaliGemmaFlowConfig
    _no_split_modules = ["PaliGemmaMultiModalProjector", "ActionExpertLayer"]  # noqa: RUF012
    # The loss is a mean over the micro-batch: the Trainer has to divide it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: PaliGemmaFlowConfig):
        default_to_eager(config)
        super().__init__(config)
        # transformers reads the kind of loss off the class name, and would warn of this one.
        self.loss_type = "ForConditionalGeneration"
        self.action_expert = ActionExpert(config)
        # Initialises the expert; the parent's own call has already done the rest.
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ExpertLinear):
            init.normal_(module.weight, std=module.init_std)

    @classmethod
    def from_vlm(
        cls,
        vlm: str | os.PathLike | PaliGemmaForConditionalGeneration,
        *,
        attn_implementation: str | dict | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        vlm_kwargs: dict[str, Any] | None = None,
        **config_overrides: Any,
    ) -> Self:
        """
        Puts a new action expert on a stock PaliGemma. The expert is drawn from torch's global random state.

        Args:
            vlm (`str`, `os.PathLike` or `PaliGemmaForConditionalGeneration`):
                Checkpoint, local or on the Hub, or a loaded model, whose modules are shared, not copied.
            attn_implementation (`str` or `dict`, *optional*, defaults to `"eager"`): for a checkpoint.
            dtype (`torch.dtype` or `str`, *optional*):
                For a checkpoint, as of `from_pretrained`. The expert gets the dtype of the VLM's embeddings.
            revision (`str`, *optional*): branch, tag or commit of a checkpoint on the Hub.
            token (`str` or `bool`, *optional*): token for the Hub; that of the environment or login by default.
            vlm_kwargs (`dict`, *optional*):
                Further arguments of `PaliGemmaForConditionalGeneration.from_pretrained`, e.g. `subfolder`.
            **config_overrides: fields of [`PaliGemmaFlowConfig`].

        Raises:
            ValueError: the checkpoint is not a PaliGemma or already has an expert (use `from_pretrained`), an override
                is not a field of the expert, or the attention implementation does not fit the language model.
        """
        located = {k: v for k, v in {"revision": revision, "token": token}.items() if v is not None}
        vlm_kwargs = {**(vlm_kwargs or {}), **located}
        if isinstance(vlm, PaliGemmaForConditionalGeneration):
            if attn_implementation is not None or dtype is not None or vlm_kwargs:
                raise ValueError(
                    "attn_implementation, dtype, revision, token and vlm_kwargs are for a checkpoint, "
                    "not a loaded model"
                )
            if isinstance(vlm, PaliGemmaFlowForAction):
                raise ValueError("the model already has an action expert; `to_vlm()` gives its plain VLM")
        else:
            vlm = load_vlm(str(vlm), attn_implementation or "eager", dtype, vlm_kwargs)
        config = flow_config(vlm, config_overrides)
        with torch.device("meta"), init.no_init_weights():
            model = cls(config)
        model.model, model.lm_head = vlm.model, vlm.lm_head
        model.model.config = config
        # Not saved: where this process finds the vision-language model, and its processor.
        model.name_or_path = vlm.name_or_path
        # Built again, off the meta device; a quantised VLM keeps its embeddings in floating point.
        model.action_expert = ActionExpert(config).to(vlm.lm_head.weight.device, vlm.lm_head.weight.dtype)
        model.action_expert.apply(model._init_weights)
        model.generation_config = vlm.generation_config
        return model.train(vlm.training)

    @classmethod
    def from_pretrained(cls, *args: Any, use_safetensors: bool | None = True, **kwargs: Any) -> Any:
        """As of transformers, but for weights that are pickles, which are not read unless that is asked for."""
        return super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: str | Sequence[str] = (),
    ) -> CommitInfo:
        """
        Pushes weights, configuration and a card in one commit; arguments are those of transformers. Other than there,
        `private=True` and a public repository is an error, and a push that fails leaves a folder to push again.

        Raises:
            HubUploadError: if the push fails.
        """
        return push_policy(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            tags=[tags] if isinstance(tags, str) else tags,
        )

    def to_vlm(self) -> PaliGemmaForConditionalGeneration:
        """
        The plain vision-language model, sharing this model's weights: `model.to_vlm().save_pretrained(folder)` writes
        a stock PaliGemma checkpoint.
        """
        config = plain_config(self.config)
        with torch.device("meta"), init.no_init_weights():
            vlm = PaliGemmaForConditionalGeneration(config)
        vlm.model, vlm.lm_head = self.model, self.lm_head
        vlm.generation_config = self.generation_config
        return vlm.train(self.training)

    def freeze_vision_tower(self) -> None:
        """Stops training the vision tower, as in every condition of arXiv 2604.16067; the projector keeps training."""
        self.model.vision_tower.requires_grad_(False)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of the plain VLM; `pixel_values` may also have shape `(B, n, 3, h, w)`."""
        if "pixel_values" in kwargs:
            kwargs["pixel_values"] = self._flat_cameras(kwargs["pixel_values"])
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        state: Tensor | None = None,
        actions: Tensor | None = None,
        action_is_pad: Tensor | None = None,
        noise: Tensor | None = None,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> PaliGemmaFlowOutput | PaliGemmaCausalLMOutputWithPast | tuple:
        """
        With `actions`, the flow-matching loss, without ever computing logits of unlabelled tokens. Without, the plain
        VLM, to which everything but the five flow arguments is handed.

        Args:
            input_ids, attention_mask (`Tensor` of shape `(B, T)`): as of the plain VLM.
            pixel_values (`Tensor` of shape `(B, n, 3, h, w)` or `(B·n, 3, h, w)`):
                `n` cameras, at the vision tower's own size `h = w`, which the processor resizes to.
            token_type_ids (`Tensor` of shape `(B, T)`, *optional*):
                0 prefix, read in both directions; 1 suffix, causal. When it is missing from a batch with actions and
                without labels, the whole prompt is prefix: transformers would silently make it causal.
            labels (`Tensor` of shape `(B, T)`, *optional*):
                With `actions`, adds the cross-entropy of the labelled tokens (discrete action tokens) to the loss. The
                expert only looks at the prefix: the suffix holds the answer.
            state (`Tensor` of shape `(B, S)`, *optional*): normalised; not read when `use_state` is off.
            actions (`Tensor` of shape `(B, H, A)`, *optional*): normalised.
            action_is_pad (`Tensor` of shape `(B, H)`, bool, *optional*): `True` past the end of the episode.
            noise (`Tensor` of shape `(B, H, A)`, *optional*): ε; drawn from a standard Gaussian when not given.
            timestep (`Tensor` of shape `(B,)`, *optional*): t; drawn as the configuration says when not given.
            generator (`torch.Generator`, *optional*): for both draws; torch's global one when not given.
            position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep, mm_encoder_outputs, **kwargs:
                As of the plain VLM. They are spelt out because `generate` looks for them in the signature.

        Returns:
            [`PaliGemmaFlowOutput`] with `actions`; a tuple of its fields with `return_dict=False`.

        Raises:
            ValueError: a shape differs from the configuration or the number of prompts, the state is missing, labels
                come without `token_type_ids` or label nothing, or a cache is asked for.
        """
        pixel_values = self._flat_cameras(pixel_values)
        if actions is None:
            flow = {"state": state, "action_is_pad": action_is_pad, "noise": noise, "timestep": timestep}
            if given := [name for name, value in flow.items() if value is not None]:
                raise ValueError(f"{', '.join(given)} given without `actions`; to act, call `sample_actions`")
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                token_type_ids=token_type_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                mm_encoder_outputs=mm_encoder_outputs,
                **kwargs,
            )

        return_dict = kwargs.pop("return_dict", None)
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a batch of actions needs `input_ids`, and no `inputs_embeds`")
        # A single prompt would otherwise be stretched over many chunks of actions without a word.
        self._check_shapes(input_ids.shape[0], state=state, actions=actions, noise=noise, timestep=timestep)
        if labels is not None and token_type_ids is None:
            raise ValueError("`labels` with `actions` need `token_type_ids`, to tell the prompt from the answer")
        if use_cache or past_key_values is not None:
            raise ValueError("a batch of actions takes no key-value cache: drop `use_cache` and `past_key_values`")
        outputs, prefix_mask = self._encode(
            input_ids,
            pixel_values,
            attention_mask,
            token_type_ids,
            position_ids=position_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        actions = actions.float()
        if noise is None:
            noise = torch.randn(actions.shape, device=actions.device, generator=generator)
        if timestep is None:
            timestep = sample_timesteps(
                actions.shape[0],
                self.config.time_sampling,
                alpha=self.config.time_sampling_beta_alpha,
                beta=self.config.time_sampling_beta_beta,
                scale=self.config.time_sampling_scale,
                offset=self.config.time_sampling_offset,
                device=actions.device,
                generator=generator,
            )
        velocity = self.action_expert(
            interpolate(noise.float(), actions, timestep.float()),
            timestep,
            state,
            hidden_states if self.config.flow_gradient_to_vlm else hidden_states.detach(),
            prefix_mask,
        )
        flow_mse = flow_matching_loss(velocity, target_velocity(noise.float(), actions), action_is_pad)
        loss = self.config.flow_loss_scale * flow_mse
        language_loss = None
        if labels is not None:
            language_loss = self._language_loss(hidden_states, labels)
            loss = loss + language_loss

        output = PaliGemmaFlowOutput(
            loss=loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            flow_mse=flow_mse,
            language_loss=language_loss,
            velocity=velocity,
            last_hidden_state=hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def sample_actions(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        state: Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        head: Literal["flow", "fast"] = "flow",
        action_tokenizer: FASTTokenizer | None = None,
        max_new_tokens: int | None = None,
    ) -> Tensor:
        """
        Predicts a chunk of actions: one pass through the vision-language model, then Euler steps of the expert from
        noise to actions. The cross-attention's keys and values are computed once. With `head="fast"` the language
        model generates the chunk instead, as FAST tokens, and the expert is not asked.

        `model.action_expert.compile(fullgraph=True)` and `model.model.compile()` make this faster, each once;
        `torch.compile(model.sample_actions, fullgraph=True)` works too, as one graph that takes longer to compile.

        Args:
            input_ids, attention_mask, token_type_ids, pixel_values, state: as of `forward`.
            noise (`Tensor` of shape `(B, H, A)`, *optional*): start; drawn from a standard Gaussian when not given.
            num_steps (`int`, *optional*): Euler steps; `config.num_inference_steps` when not given.
            generator (`torch.Generator`, *optional*): for the noise; torch's global one when not given.
            head (`"flow"` or `"fast"`, *optional*, defaults to `"flow"`): what predicts the actions.
            action_tokenizer, max_new_tokens: of the FAST head, as of [`sample_discrete_actions`].

        Returns:
            `Tensor` of shape `(B, H, A)`, float32, normalised; see `PaliGemmaFlowProcessor.postprocess_actions`. A
            chunk that the FAST head failed to write is NaN, which `postprocess_actions` refuses.

        Raises:
            ValueError: a shape differs from the configuration, the state is missing, `num_steps` is below 1, or an
                argument of one head is given to the other or missing.
        """
        flow = {"noise": noise, "num_steps": num_steps, "generator": generator}
        fast = {"action_tokenizer": action_tokenizer, "max_new_tokens": max_new_tokens}
        if head not in ("flow", "fast"):
            raise ValueError(f"head must be 'flow' or 'fast', found {head!r}")
        if given := [name for name, value in (fast if head == "flow" else flow).items() if value is not None]:
            raise ValueError(f"{', '.join(given)} mean nothing to head={head!r}")
        if head == "fast":
            return sample_discrete_actions(
                self, action_tokenizer, input_ids, pixel_values, attention_mask, token_type_ids, max_new_tokens
            )
        shape = (input_ids.shape[0], self.config.chunk_size, self.config.action_dim)
        if noise is None:
            noise = torch.randn(shape, device=input_ids.device, generator=generator)
        self._check_shapes(shape[0], state=state, noise=noise)
        outputs, prefix_mask = self._encode(
            input_ids, self._flat_cameras(pixel_values), attention_mask, token_type_ids
        )
        cache = self.action_expert.encode_context(outputs.last_hidden_state, prefix_mask)
        num_steps = self.config.num_inference_steps if num_steps is None else num_steps
        return self.action_expert.sample(noise, cache, state, num_steps)

    def _encode(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor]:
        """The VLM's output without cache and head, and the mask `(B, T)` of the prefix tokens the expert may read."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            use_cache=False,
            **kwargs,
        )
        return outputs, attention_mask.bool() & (token_type_ids == 0)

    def _language_loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the labelled tokens; the head runs on the positions that predict them alone."""
        labelled = labels[:, 1:] != -100
        if not labelled.any():
            raise ValueError("`labels` label no token (all -100); leave them out of a batch of actions")
        logits = self.lm_head(hidden_states[:, :-1][labelled]).float()
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return functional.cross_entropy(logits, labels[:, 1:][labelled])

    def _check_shapes(self, batch_size: int, state: Tensor | None, **tensors: Tensor | None) -> None:
        chunk = (batch_size, self.config.chunk_size, self.config.action_dim)
        expected = {"actions": chunk, "noise": chunk, "timestep": (batch_size,)}
        if self.config.use_state:
            if state is None:
                raise ValueError("`state` is missing: the configuration has use_state=True")
            tensors["state"], expected["state"] = state, (batch_size, self.config.state_dim)
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != expected[name]:
                raise ValueError(f"`{name}` must have shape {expected[name]}, found {tuple(tensor.shape)}")

    def _flat_cameras(self, pixel_values: Tensor | None) -> Tensor | None:
        """Cameras `(B, n, 3, h, w)` or `(B·n, 3, h, w)` along the batch dimension, checked before SigLIP sees them."""
        if pixel_values is None:
            return None
        vision: Any = self.config.vision_config
        channels, size = getattr(vision, "num_channels", 3), vision.image_size
        expected = (channels, size, size)
        shape = tuple(pixel_values.shape)
        if len(shape) not in (4, 5) or shape[-3:] != expected or 0 in shape:
            raise ValueError(
                f"`pixel_values` must have shape (batch, *{expected}) or (batch, cameras, *{expected}), "
                f"found {shape}: let the processor of this model prepare the images, it resizes them"
            )
        return pixel_values.flatten(0, 1) if len(shape) == 5 else pixel_values
