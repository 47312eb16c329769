"""Which trainable parameters are projected together."""

from collections.abc import Iterable

from torch import nn


LAYER_PREFIX = "layers."
NON_LAYER_GROUP = "embeddings"


class ParameterGroups:
    """
    Assigns every trainable parameter of a model to a projection group (arXiv 2604.16067, §3.3).

    One group per transformer layer (`layers.0`, …); one, `embeddings`, for what else the decoder trains (token
    embeddings, final norm, output head); one for each other part of the model that feeds the decoder, by the name of
    its module (`multi_modal_projector`, …). On PaliGemma2-3B with a frozen vision tower that makes 26 + 2 groups.

    Args:
        model (`torch.nn.Module`): The model that is trained.
        layers (`Iterable[torch.nn.Module]`): Its decoder layers, lowest first.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}
        layers = list(layers)
        module_names = {id(module): name for name, module in model.named_modules()}
        missing = [index for index, layer in enumerate(layers) if id(layer) not in module_names]
        if missing:
            raise ValueError(f"layers {missing} are not modules of the {type(model).__name__} that is trained")
        self._layer_of: dict[str, str] = {}
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                if (name := self.names.get(id(parameter))) is not None:
                    self._layer_of.setdefault(name, f"{LAYER_PREFIX}{index}")
        first = module_names[id(layers[0])].split(".")
        self._decoder_path = first[: -2 if first[-1].isdigit() else -1]
        output_embeddings = _output_embeddings(model)
        self._head = (
            {self.names.get(id(p)) for p in output_embeddings.parameters()} if output_embeddings is not None else set()
        )
        self._reached: set[str] = set()
        self._group_of = {name: self._find_group(name) for name in self.parameters}

    def note_reached(self, names: Iterable[str]) -> None:
        """Notes parameters outside the decoder that feed it; from then on they are protected."""
        self._reached.update(names)

    def is_protected(self, name: str) -> bool:
        """Whether a parameter belongs to the decoder or feeds it, rather than only reading from it."""
        return (
            name in self._reached
            or self.group_of(name).startswith(LAYER_PREFIX)
            or self.group_of(name) == NON_LAYER_GROUP
        )

    def group_of(self, name: str) -> str:
        """The group of the trainable parameter called `name`."""
        return self._group_of[name]

    def _find_group(self, name: str) -> str:
        if (layer := self._layer_of.get(name)) is not None:
            return layer
        if name in self._head:
            return NON_LAYER_GROUP
        parts = name.split(".")
        shared = 0
        for mine, theirs in zip(parts, self._decoder_path, strict=False):
            if mine != theirs:
                break
            shared += 1
        if shared == len(self._decoder_path):
            return NON_LAYER_GROUP
        return parts[shared]


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None
