"""Recipes: types of every kind, the command line over the file, and what is refused."""

import dataclasses
import enum
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from hf_aegis.cli import build_parser, demo
from hf_aegis.cli.conditions import check_runnable, resolve_anchors, resolve_conditions
from hf_aegis.cli.recipe import merged, parse_recipe


RECIPES = Path(__file__).parents[2] / "recipes"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class First:
    folder: str = dataclasses.field(metadata={"help": "Where to write."})
    count: int = dataclasses.field(default=3, metadata={"help": "How many."})
    rate: float = 0.5
    loud: bool = True
    limit: int | None = None
    derived: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1, found {self.count}")
        self.derived = 2 * self.count


@dataclasses.dataclass(frozen=True)
class Second:
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])
    kind: Literal["fast", "slow"] = "fast"
    sizes: dict[str, Any] | None = None
    loose: dict | str | None = None
    colour: Colour | str = "red"
    note: str | None = None


@pytest.fixture
def parse(tmp_path):
    def parse(text, *options):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return parse_recipe((First, Second), ["--config", str(path), *options], prog="hf-aegis test")

    return parse


def test_the_recipe_wins_over_defaults_and_the_command_line_over_the_recipe(parse):
    first, second = parse(
        "folder: out\ncount: 5\nloud: false\nnames: [b, c]\nkind: slow\nsizes: {width: 2}\nlimit: 7",
        *("--count", "8", "--names", "d", "--note", "text", "--limit", "null"),
    )
    assert first == First("out", count=8, rate=0.5, loud=False, limit=None)
    assert first.derived == 16
    assert second == Second(names=["d"], kind="slow", sizes={"width": 2}, note="text")


def test_options_alone_are_enough():
    first, second = parse_recipe(
        (First, Second),
        ["--folder=out", "--no_loud", "--rate", "1e-3", "--sizes", '{"width": [1, 2]}', "--colour", "blue"],
    )
    assert (first.folder, first.loud, first.rate) == ("out", False, 1e-3)
    assert (second.sizes, second.colour) == ({"width": [1, 2]}, "blue")


@pytest.mark.parametrize(("text", "rate"), [("3e-4", 3e-4), ("2", 2.0), ("0.25", 0.25), (".5", 0.5)])
def test_numbers_are_numbers_however_they_are_written(parse, text, rate):
    first, _ = parse(f"folder: out\nrate: {text}")
    assert first.rate == rate
    assert isinstance(first.rate, (int, float))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: '4'", "key 'count' is '4', expected int"),
        ("count: 4.0", "key 'count' is 4.0, expected int"),
        ("count: true", "key 'count' is True, expected int"),
        ("count: null", "key 'count' is None, expected int"),
        ("limit: many", "key 'limit' is 'many', expected int or null"),
        ("rate: fast", "key 'rate' is 'fast', expected float"),
        ("rate: true", "key 'rate' is True, expected float"),
        ("loud: 1", "key 'loud' is 1, expected bool"),
        ("note: 3", "key 'note' is 3, expected str or null"),
        ("names: a", r"key 'names' is 'a', expected list\[str\]"),
        ("names: [a, 1]", r"key 'names' is \['a', 1\], expected list\[str\]"),
        ("kind: best", "key 'kind' is 'best', expected 'fast' or 'slow'"),
        ("sizes: [1]", r"key 'sizes' is \[1\], expected dict\[str, typing.Any\] or null"),
        ("loose: 1", "key 'loose' is 1, expected dict or str or null"),
        ("colour: 1", r"key 'colour' is 1, expected one of \['red', 'blue'\] or str"),
        ("derived: 4", r"unknown keys \['derived'\], expected some of \['colour', 'count', "),
        ("counts: 4\n1: 2", r"unknown keys \['1', 'counts'\]"),
        ("[a]", "expected a mapping of options, found list"),
        ("", "expected a mapping of options, found NoneType"),
        ("count: [", "not valid YAML"),
        ("folder: !!python/name:os.system", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_file_and_key(parse, text, message):
    with pytest.raises(ValueError, match=rf"recipe\.yaml: {message}"):
        parse(text, "--folder", "out")


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"folder: \xff")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        parse_recipe((First,), ["--config", str(path)])


@pytest.mark.parametrize(("written", "expected"), [("true", True), ("false", False), ("null", None)])
def test_fsdp_is_asked_for_as_in_python(tmp_path, written, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nfsdp: {written}\n")
    _, args = build_parser().parse_args(["train", "--config", str(path)]).recipe
    assert args.fsdp is expected
    path.write_text(f"output_dir: {tmp_path}\nfsdp: 1\n")
    with pytest.raises(ValueError, match="key 'fsdp' is 1, expected str or null or bool"):
        build_parser().parse_args(["train", "--config", str(path)])


def test_a_recipe_sets_no_environment_variables(parse, monkeypatch):
    monkeypatch.delenv("HF_AEGIS_RECIPE_TEST", raising=False)
    with pytest.raises(ValueError, match=r"unknown keys \['env'\]"):
        parse("folder: out\nenv: {HF_AEGIS_RECIPE_TEST: '1'}")
    assert "HF_AEGIS_RECIPE_TEST" not in os.environ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the following arguments are required: --folder"),
        (("--folder", "a", "--count", "x"), "argument --count: invalid int value: 'x'"),
        (("--folder", "a", "--count", "0"), "count must be at least 1, found 0"),
        (("--folder", "a", "--coun", "4"), "unrecognized arguments: --coun 4; see hf-aegis --help"),
        (("--folder", "a", "stray"), "unrecognized arguments: stray"),
        (("--folder", "a", "--kind", "best"), "argument --kind: invalid choice: 'best'"),
        (("--folder", "a", "--sizes", "3"), "argument --sizes: '3': expected a JSON object, found 3"),
        (("--folder", "a", "--sizes", "{"), "argument --sizes: '{': not JSON"),
        (("--folder", "a", "--config"), "argument --config: expected one argument"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe((First, Second), options)


def test_a_missing_recipe_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        parse_recipe((First,), ["--folder", "a", "--config", "nowhere.yaml"])


def test_a_file_beside_the_executable_holds_no_options(tmp_path, monkeypatch):
    (tmp_path / "hf-aegis.args").write_text("--count 9")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "hf-aegis")])
    (first,) = parse_recipe((First,), ["--folder", "a"])
    assert first.count == 3


def test_help_lists_options_texts_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_recipe((First, Second), ["--help"], prog="hf-aegis test", description="Tests.")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: hf-aegis test [--config FILE] [--OPTION VALUE ...] Tests.")
    for part in ("--folder FOLDER Where to write.", "How many. (default: 3)", "--kind {fast,slow}", "--config FILE"):
        assert part in text


def command_of(recipe):
    """The command line that a shipped recipe is for; none for one with a program of its own."""
    if recipe.with_suffix(".py").exists():
        return None
    for prefixes, command in (
        (("anchor_",), ["anchor"]),
        (("libero_",), ["data", "record-libero"]),
        (("compare_", "ablations_", "why_", "study_"), ["compare"]),
    ):
        if recipe.name.startswith(prefixes):
            return command
    return ["train"]


def written_in(recipe):
    """The values of a recipe, laid over those of the one that it extends."""
    values = yaml.safe_load(recipe.read_text())
    below = values.pop("extends", None)
    return values if below is None else merged(written_in(recipe.parent / below), values)


# A base of comparisons is no recipe of a command. Those of the studies on text and on π0 have tests of their own.
@pytest.mark.parametrize(
    "recipe",
    [p for p in sorted(RECIPES.glob("*.yaml")) if p.stem not in ("embedded_shared", "text_study", "pi0_libero")],
    ids=lambda path: path.stem,
)
def test_shipped_recipes_parse_and_keep_their_values(recipe):
    values = written_in(recipe)
    command = command_of(recipe)
    if command is None:
        spec = importlib.util.spec_from_file_location(recipe.stem, recipe.with_suffix(".py"))
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        parsed = dataclasses.asdict(program.PretrainConfig.from_yaml(recipe))
        for stage in program.STAGES:
            assert parsed[stage].items() >= values.pop(stage).items()
    else:
        instances = build_parser().parse_args([*command, "--config", str(recipe)]).recipe
        parsed = {name: value for instance in instances for name, value in vars(instance).items()}
    assert len(values) > 2
    assert {name: parsed[name] for name in values} == values


@pytest.mark.parametrize(
    "recipe",
    [path for path in sorted(RECIPES.glob("*.yaml")) if command_of(path) == ["compare"]],
    ids=lambda path: path.stem,
)
def test_every_condition_of_a_shipped_comparison_makes_a_run(recipe):
    (asked,) = build_parser().parse_args(["compare", "--config", str(recipe)]).recipe
    anchors = asked.anchors or {}
    # Training in bf16 is refused without a GPU, unless the CPU is asked for.
    conditions = resolve_conditions(asked.conditions, asked.shared or {}, {"use_cpu": True}, anchors, recipe)
    check_runnable(conditions, recipe)
    assert resolve_anchors(anchors, conditions, recipe).keys() == anchors.keys()
    assert len(asked.seeds) >= 3


def test_embedded_comparisons_share_their_settings_with_the_demo():
    compared, ablated = (written_in(RECIPES / f"{name}_embedded.yaml") for name in ("compare", "ablations"))
    assert compared["shared"] == ablated["shared"]
    assert compared["anchors"]["easy_vqa"] == ablated["anchors"]["easy_vqa"]
    assert compared["conditions"]["aegis"] == ablated["conditions"]["aegis"]
    differ = {name for name, value in demo.TRAINING.items() if compared["shared"].get(name) != value}
    assert differ == {"eval_steps", "save_steps"}


def test_the_embedded_recipe_trains_as_the_demo_does():
    recipe = written_in(RECIPES / "embedded_aegis.yaml")
    # Where it goes, and how often and by what it is measured.
    apart = {"output_dir", "anchor", "seed", "vqa_final_samples", "vqa_steps", "vqa_accuracy", "eval_steps"}
    apart |= {"save_strategy", "save_steps", "analysis_samples", "neuron_cosine_steps"}
    shared = demo.TRAINING | demo.CONDITIONS["aegis"]
    # What the demo leaves to the defaults may be spelt out, as a default.
    defaults = {name: default for name, default in _defaults().items() if name not in shared}
    for name in recipe.keys() - apart:
        assert recipe[name] == (shared | defaults)[name], name
    assert not shared.keys() - recipe.keys()


def _defaults():
    command = build_parser().parse_args(["train", "--output_dir", "o", "--anchor", "a"])
    return {name: value for instance in command.recipe for name, value in vars(instance).items()}


@dataclasses.dataclass
class Extended:
    rate: float = 0.1
    steps: int = 1
    sizes: dict[str, Any] | None = None


def test_a_recipe_extends_another(tmp_path):
    base, middle, top = tmp_path / "base.yaml", tmp_path / "sub" / "middle.yaml", tmp_path / "top.yaml"
    middle.parent.mkdir()
    base.write_text("rate: 0.5\nsteps: 7\nsizes: {layers: 2, heads: 4}\n")
    middle.write_text("extends: ../base.yaml\nsizes: {heads: 8}\n")
    top.write_text("extends: sub/middle.yaml\nsteps: 9\n")
    assert parse_recipe([Extended], ["--config", str(top)]) == (Extended(0.5, 9, {"layers": 2, "heads": 8}),)
    (middle.parent / "ring.yaml").symlink_to("ring.yaml")
    for text, error, message in (
        ("extends: ../top.yaml", ValueError, "middle.yaml: key 'extends' is '../top.yaml', which extends this recipe"),
        ("extends: [a]", ValueError, r"middle.yaml: key 'extends' is \['a'\], expected the path of a recipe"),
        ("extends: ../nowhere.yaml", FileNotFoundError, "middle.yaml: key 'extends' .* no recipe .*nowhere"),
        ("extends: /dev/zero", FileNotFoundError, "middle.yaml: key 'extends' is '/dev/zero': there is no recipe"),
        ('extends: "a\\0b"', ValueError, "middle.yaml: key 'extends' is .*, which is no path"),
        ("extends: ring.yaml", ValueError, "middle.yaml: key 'extends' is 'ring.yaml', which is no path"),
        ("steps: 1\nsteps: 2", ValueError, "middle.yaml: not valid YAML: the key 'steps' stands there twice"),
        ("extends: ../base.yaml\nraet: 1", ValueError, r"middle.yaml: unknown keys \['raet'\]"),
    ):
        middle.write_text(text)
        with pytest.raises(error, match=message):
            parse_recipe([Extended], ["--config", str(top)])
    middle.write_text("extends: ../base.yaml")
    base.write_text("rate: fast")
    with pytest.raises(ValueError, match=r"base.yaml: key 'rate' is 'fast', expected float"):
        parse_recipe([Extended], ["--config", str(top)])
