"""Reference directions that serve more than one backward pass."""

from collections.abc import Callable, Mapping

from torch import Tensor


class KeptReferences:
    """
    Keeps the reference directions of one backward pass for those that follow it.

    Args:
        interval (`int`): The number of backward passes that one computation of them serves. With 1 nothing is kept.

    Raises:
        ValueError: If `interval` is less than 1.
    """

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"reference_interval must be at least 1, found {interval}")
        self.interval = interval
        self._references: dict[str, Tensor] = {}
        self._age = 0

    @property
    def references(self) -> Mapping[str, Tensor]:
        """Those that are kept, by parameters' names."""
        return self._references

    def begin(self) -> bool:
        """Called when a backward pass begins; returns whether it has to compute reference directions of its own."""
        self._age += 1
        if self._references and self._age < self.interval:
            return False
        self.clear()
        return True

    def keeping(self, then: Callable[[str, str, Tensor], None] | None) -> Callable[[str, str, Tensor], None] | None:
        """What a [`GradientProjector`] is to call with each new reference direction; it calls `then` as well."""
        if self.interval == 1:
            return then

        def keep(unit: str, name: str, reference: Tensor) -> None:
            self._references[name] = reference
            if then is not None:
                then(unit, name, reference)

        return keep

    def clear(self) -> None:
        """Lets go of them, so that the next backward pass computes its own."""
        self._references.clear()
        self._age = 0
