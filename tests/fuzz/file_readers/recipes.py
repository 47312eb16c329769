"""Recipes: of a training, of a comparison, of a recording, and the one that a run leaves."""

from pathlib import Path
from random import Random
from typing import Any

import yaml
from fuzz_engine import Mutation, mutate_value, reading

from file_readers.file_reader import FileReader
from hf_aegis.cli.compare import CompareArguments
from hf_aegis.cli.conditions import resolve_anchors, resolve_conditions, train_hints
from hf_aegis.cli.recipe import option_types, parse_recipe, read_recipe, require_keys
from hf_aegis.data.libero_recorder import RecordingConfig
from hf_aegis.training.run_recipe import RunRecipe


RECIPES = Path(__file__).parents[3] / "recipes"

_LINES = (
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
    *("b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]", "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]"),
    *("&x {y: *x}", "shared: &s {<<: *s}", "<<: *a", "<<: [*a, *a]", "? [1, 2]", "? {a: 1}", "- 1", "---", "..."),
    *("extends: recipe.yaml", "extends: ../../../etc/passwd", "extends: /dev/null", "extends: 3", "extends: a\0b"),
    *(
        "seed: 0x_",
        "seed: 1:99:99",
        "seed: 2001-99-99",
        "seed: .nan",
        "seed: 1_000",
        "seed: !!binary aaa",
        "seed: =",
    ),
    *("max_steps: !!python/object/apply:os.system [true]", "%YAML 9.9", "%TAG ! tag:a", "\ttab: 1", "é: \u2028"),
    *("max_steps: " + "9" * 5000, "a: " + "[" * 2000, "a: " + "{a: " * 300, "lora: |\n  text", "gse: >\n\n"),
)


def _mutate_yaml(data: bytes, random: Random) -> bytes:
    try:
        value = yaml.safe_load(data)
        for _ in range(random.choice((1, 1, 2))):
            value = mutate_value(value, random)
        return yaml.safe_dump(value).encode()
    # PyYAML reads and writes what is damaged in many ways.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return data


def _mutate_lines(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    kind = random.randrange(4)
    if kind == 0:
        lines.insert(place, random.choice(lines))
    elif kind == 1:
        lines[place] = b"  " + lines[place]
    else:
        lines.insert(place, random.choice(_LINES).encode())
    return b"\n".join(lines)


YAML: tuple[Mutation, ...] = (_mutate_yaml, _mutate_yaml, _mutate_lines)


def training_recipe(folder: Path) -> FileReader:
    hints = train_hints()
    seeds = [(RECIPES / name).read_bytes() for name in ("embedded_aegis.yaml", "embedded_vla_gse.yaml")]

    def read(path: Path) -> Any:
        return read_recipe(path, hints)

    return FileReader(seeds, reading(folder / "recipe.yaml", read), ".yaml", YAML)


def comparison_recipe(folder: Path) -> FileReader:
    hints = option_types([CompareArguments])
    seed = (
        b"output_dir: out\nseeds: [0, 1]\ngap: [naive, aegis]\n"
        b"shared: {max_steps: 3, expert: {expert_num_layers: 1}}\n"
        b"anchors: {easy: {dataset: easy-vqa, num_samples: 8}}\nlibero: {suite: [libero_object], episodes: 1}\n"
        b"conditions:\n  naive: {preserve: none}\n  aegis: {anchor: easy, learning_rate: 1e-4}\n"
    )

    def read(path: Path) -> Any:
        values = read_recipe(path, hints)
        require_keys(CompareArguments, values, str(path))
        try:
            asked = CompareArguments(**values)
        except ValueError as error:  # names the field; the command line adds what it was reading
            raise ValueError(f"{path}: {error}") from error
        anchors = asked.anchors or {}
        found = resolve_conditions(asked.conditions, asked.shared or {}, asked.override or {}, anchors, path)
        return resolve_anchors(anchors, found, path)

    return FileReader([seed], reading(folder / "recipe.yaml", read), "recipe.yaml", YAML)


def recording_recipe(folder: Path) -> FileReader:
    """Through the parser of TRL, which builds the dataclass, where the recipe's own checks let it."""
    seed = (RECIPES / "libero_demo_record.yaml").read_bytes()

    hints = option_types([RecordingConfig])

    def read(path: Path) -> Any:
        # Making the parser takes longer than all the rest.
        read_recipe(path, hints)
        return parse_recipe([RecordingConfig], ["--config", str(path)])

    return FileReader([seed], reading(folder / "recipe.yaml", read), "", YAML)


def run_recipe(folder: Path) -> FileReader:
    recipe = RunRecipe({"output_dir": str(folder), "seed": 3, "lora": {"r": 4}, "learning_rate": 1e-4})
    seed = recipe.to_yaml().encode()

    def read(path: Path) -> Any:
        return recipe.difference(path.read_bytes().decode("utf-8", errors="replace"))

    older = seed[seed.index(b"\n") + 1 :]
    return FileReader([seed, older], reading(folder / "recipe.yaml", read), "recipe.yaml", YAML)


RECIPE_READERS = {
    "training_recipe": training_recipe,
    "comparison_recipe": comparison_recipe,
    "recording_recipe": recording_recipe,
    "run_recipe": run_recipe,
}
