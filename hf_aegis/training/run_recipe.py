"""What a run was asked to do, as its folder tells it: to others, and to who starts it again."""

import dataclasses
import hashlib
import json
import re
from typing import Any, Self

import yaml
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.run_arguments import RunArguments
from hf_aegis.yaml_files import parse_yaml


RECIPE_FILE = "recipe.yaml"

_HASH_LINE = re.compile(r"# The arguments, paths in full, hash to ([0-9a-f]{64})\.\n")


@dataclasses.dataclass(frozen=True)
class RunRecipe:
    """
    The resolved arguments of a run.

    What is written holds paths as they are called elsewhere too, relative to the working directory or by their last
    name, since a run's folder is for others to read. The hash of the full ones tells whether it is the same run.

    Args:
        arguments (`dict[str, Any]`):
            The run's arguments, and of the training's what differs from the defaults, as JSON would have them; nothing
            that says where the results are pushed, and no token.
    """

    arguments: dict[str, Any]

    @classmethod
    def of(cls, run: RunArguments, args: AEGISConfig) -> Self:
        """The recipe of a run's and of the training's arguments."""
        return cls({**_plain(dataclasses.asdict(run)), "output_dir": args.output_dir, **changed_arguments(args)})

    @property
    def portable(self) -> dict[str, Any]:
        """The arguments without the paths of this machine."""
        return without_machine_paths(self.arguments)

    def to_yaml(self) -> str:
        """The text of `recipe.yaml`."""
        hash_line = f"# The arguments, paths in full, hash to {self._hash()}.\n"
        return hash_line + yaml.safe_dump(self.portable, sort_keys=False)

    def difference(self, text: str) -> str | None:
        """
        What is different in a `recipe.yaml`, for an error; `None` for one of the same arguments.

        Raises:
            ValueError: If the text is no YAML mapping.
        """
        noted = _HASH_LINE.match(text)
        if noted is not None and noted[1] == self._hash():
            return None
        earlier = parse_yaml(text, RECIPE_FILE)
        if not isinstance(earlier, dict):
            raise ValueError(f"{RECIPE_FILE}: expected a mapping of arguments, found {type(earlier).__name__}")
        # One without a hash has paths in full.
        own = self.arguments if noted is None else self.portable
        different = sorted((key for key in earlier.keys() | own.keys() if earlier.get(key) != own.get(key)), key=str)
        if different:
            key = different[0]
            return f"{key} is {earlier.get(key)!r} there and {own.get(key)!r} here"
        return None if noted is None else "a folder or file was another there, of the same name as here"

    def _hash(self) -> str:
        return hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode()).hexdigest()


def changed_arguments(args: AEGISConfig) -> dict[str, Any]:
    """The arguments of a training that differ from the defaults, but for those that say where it is pushed."""
    return _plain(
        {
            f.name: getattr(args, f.name)
            for f in dataclasses.fields(args)
            if f.init and not _is_about_pushing(f.name) and not _is_default(f, getattr(args, f.name))
        }
    )


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    """
    Whether a field has the value that it has when nothing is said. Other arguments to compare with are not made:
    making any sets up the device for the whole process.
    """
    resolved = {"report_to": [], "accelerator_config": AcceleratorConfig()}
    if field.name in resolved and value == resolved[field.name]:
        return True
    default = field.default_factory() if callable(field.default_factory) else field.default
    # `None` is resolved to `False`, for one.
    return value == default or not (value or default)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Through JSON, so that what is compared with a recipe read from disk has the types it would have there."""
    return json.loads(json.dumps(values, default=str))


def _is_about_pushing(name: str) -> bool:
    # With these the token.
    return name == "push_to_hub" or name.startswith("hub_")
