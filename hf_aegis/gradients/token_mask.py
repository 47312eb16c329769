"""Which tokens count: the attention mask of the model call that is under way, or a kind of its tokens."""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_aegis.anchors import unwrap_model
from hf_aegis.anchors.token_kinds import check_tokens, find_image_token_id, select_tokens


class TokenMask:
    """
    Follows the attention masks that a model, wrapped or not, is called with.

    A mask that an inner model is given goes before the wrapper's: prompt-learning adapters lengthen it on the way.

    Args:
        model (`torch.nn.Module`): The model whose calls are followed.
        tokens (`str`, *optional*, defaults to `"all"`):
            `"image"` or `"text"` restricts the masks to one kind of tokens, which the calls' `input_ids` tell.

    Raises:
        ValueError: If `tokens` is unknown, or the model has no image tokens to tell from others.
    """

    def __init__(self, model: nn.Module, tokens: str = "all") -> None:
        check_tokens(tokens)
        self.model = model
        self.tokens = tokens
        self._image_token_id = None if tokens == "all" else find_image_token_id(model)
        self._inner = unwrap_model(model)
        # Attention mask and token ids of each call under way, the outermost first.
        self._calls: list[tuple[Tensor | None, Tensor | None]] = []

    def follow(self) -> list[RemovableHandle]:
        """Hooks the model; the caller removes the hooks."""
        self._calls.clear()
        handles = []
        for module in dict.fromkeys((self.model, self._inner)):
            handles.append(module.register_forward_pre_hook(self._on_call, with_kwargs=True))
            handles.append(module.register_forward_hook(self._on_return, always_call=True))
        return handles

    def current(self) -> Tensor | None:
        """
        The mask `(B, T)` of the call under way, `None` if it was given none and all tokens count.

        Raises:
            RuntimeError: If no call of the model is under way.
            ValueError: If the kinds of tokens are to be told apart, but the call had no `input_ids` of the mask's
                shape.
        """
        if not self._calls:
            raise RuntimeError(
                f"the decoder layers ran outside of a call of the {type(self.model).__name__}, so nothing says which "
                "tokens are padding: call the model that the shield was made for, or make one for the part you call"
            )
        return select_tokens(*self._calls[-1], self.tokens, self._image_token_id)

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = self._argument("attention_mask", module, args, kwargs)
        outer, outer_ids = self._calls[-1] if self._calls else (None, None)
        ids = self._argument("input_ids", module, args, kwargs)
        ids = ids if isinstance(ids, Tensor) else outer_ids
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._calls.append((mask, ids))
        elif mask is None or outer is not None:
            self._calls.append((outer, ids))
        else:
            found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the shield needs a (batch, tokens) attention_mask to know which tokens count, found {found}"
            )

    def _on_return(self, *_: Any) -> None:
        if self._calls:
            self._calls.pop()

    def _argument(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get(name) is not None or not args:
            return kwargs.get(name)
        for owner in (module, self._inner):
            signature = inspect.signature(owner.forward)
            if name in signature.parameters:
                return signature.bind_partial(*args).arguments.get(name)
        return None
