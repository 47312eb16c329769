"""Which tokens count: the attention mask of the model call that is under way."""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_aegis.anchors import unwrap_model


class TokenMask:
    """
    Follows the attention masks that a model, wrapped or not, is called with.

    A mask that an inner model is given goes before the wrapper's: prompt-learning adapters lengthen it on the way.

    Args:
        model (`torch.nn.Module`): The model whose calls are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._inner = unwrap_model(model)
        self._calls: list[Tensor | None] = []

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
        The mask `(B, T)` of the call under way, `None` if it was given none.

        Raises:
            `RuntimeError`: If no call of the model is under way.
        """
        if not self._calls:
            raise RuntimeError(
                f"the decoder layers ran outside of a call of the {type(self.model).__name__}, so nothing says which "
                "tokens are padding: call the model that the shield was made for, or make one for the part you call"
            )
        return self._calls[-1]

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            mask = self._positional(module, args)
        outer = self._calls[-1] if self._calls else None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._calls.append(mask)
        elif mask is None or outer is not None:
            self._calls.append(outer)
        else:
            found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the shield needs a (batch, tokens) attention_mask to know which tokens count, found {found}"
            )

    def _on_return(self, *_: Any) -> None:
        if self._calls:
            self._calls.pop()

    def _positional(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        for owner in (module, self._inner):
            signature = inspect.signature(owner.forward)
            if "attention_mask" in signature.parameters:
                return signature.bind_partial(*args).arguments.get("attention_mask")
        return None
