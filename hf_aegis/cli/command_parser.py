"""The parser of a command: its options are added when it is first used, and may be those of a recipe."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hf_aegis.cli.recipe import parse_recipe, recipe_path


class CommandParser(argparse.ArgumentParser):
    """
    An [`~argparse.ArgumentParser`] for commands whose options take long to import: those of the other commands are
    not looked up. Errors are one line, and options cannot be abbreviated.

    Args:
        configure (`Callable`, *optional*): Adds the options; called with this parser when it first parses.
        kwargs: Arguments of [`~argparse.ArgumentParser`].
    """

    def __init__(self, *, configure: "Callable[[CommandParser], None] | None" = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self._configure = configure
        self._recipe: tuple[type, ...] = ()

    def take_recipe(self, *dataclass_types: type) -> None:
        """
        Makes the fields of dataclasses the options of this command, and `--config` a file of them.

        The instances are in the parsed arguments' `recipe`, a tuple in the order given, and the file's path, if there
        is one, in `config`. See [`~cli.recipe.parse_recipe`].
        """
        self._recipe = dataclass_types

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._configure is not None:
            configure, self._configure = self._configure, None
            configure(self)
        if not self._recipe:
            return super().parse_known_args(args, namespace)
        namespace = argparse.Namespace() if namespace is None else namespace
        options = sys.argv[1:] if args is None else args
        namespace.config, _ = recipe_path(options)
        namespace.recipe = parse_recipe(
            self._recipe, options, prog=self.prog, description=self.description, epilog=self.epilog
        )
        return namespace, []

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")
