"""YAML as recipes have it: plain values, each key once, and aliases that do not multiply."""

import os
from pathlib import Path
from typing import Any

import yaml


_MOST_VALUES = 100_000
"""Far more than any recipe has, with aliases taken out."""
_DEEPEST = 100
"""As of JSON: far from where Python itself gives up, which depends on who calls."""


def parse_yaml(text: str | bytes, where: object) -> Any:
    """
    The value of a YAML text.

    Args:
        text (`str` or `bytes`): The text, in UTF-8.
        where (`Any`): Where it stands, for messages.

    Raises:
        ValueError: if it is not UTF-8 or not YAML, names a key twice, has a tag, nests too deeply, holds itself, or
            would grow beyond 100,000 values by its aliases.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return yaml.load(decoded, _PlainLoader)
    except RecursionError:
        raise ValueError(f"{where}: not valid YAML: nested too deeply") from None
    # PyYAML has its own error for what is no YAML, and others for what is no date or too large a number.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from error


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """
    The value in a YAML file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: as [`parse_yaml`]; the file is named.
    """
    return parse_yaml(Path(path).read_bytes(), os.fspath(path))


class _PlainLoader(yaml.SafeLoader):
    """
    PyYAML's safe loader without tags, doubled keys, deep nesting, and values that hold themselves or are repeated
    without end.
    """

    _depth = 0

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # Here already: PyYAML looks far ahead of what it composes, in time that grows with the square of the depth.
        if self.flow_level == _DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag!r} is refused", event.start_mark)
        if self._depth == _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _check(node, {}, set())
        return node


def _check(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """How many values a node has, with aliases taken out; refuses those without end, and keys given twice."""
    if id(node) in above:
        raise yaml.composer.ComposerError(None, None, "a value holds itself", node.start_mark)
    if id(node) not in known:
        above.add(id(node))
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (name := (key.tag, key.value)) in keys:
                    text = f"the key {key.value!r} stands there twice"
                    raise yaml.composer.ComposerError(None, None, text, key.start_mark)
                keys.add(name)
            parts = [part for pair in node.value for part in pair]
        size = 1 + sum(_check(part, known, above) for part in parts)
        above.discard(id(node))
        if size > _MOST_VALUES:
            text = f"more than {_MOST_VALUES} values, aliases taken out"
            raise yaml.composer.ComposerError(None, None, text, node.start_mark)
        known[id(node)] = size
    return known[id(node)]
