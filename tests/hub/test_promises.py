"""What the whole package does not do, read from its source."""

import ast
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for name in ("hf_aegis", "space", "recipes") for path in (ROOT / name).rglob("*.py"))

# Their files run code when they are read.
PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def parsed(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported(nodes):
    """The modules that a file imports, anywhere in it."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def reads_listed_classes_alone(nodes):
    """Whether a file uses of `pickle` no more than the base class of readers that choose what may be found."""
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"]
    readers = [
        node for node in nodes if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases)
    ]
    choosing = all(any(getattr(item, "name", None) == "find_class" for item in reader.body) for reader in readers)
    return set(names) <= {"Unpickler", "UnpicklingError"} and names.count("Unpickler") == len(readers) and choosing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_that_comes_with_data(path):
    nodes = parsed(path)
    pickling = PICKLING.intersection(module.partition(".")[0] for module in imported(nodes))
    assert pickling <= {"pickle"}
    if pickling:
        assert reads_listed_classes_alone(nodes)
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        assert "trust_remote_code" not in keywords
        assert "allow_pickle" not in keywords
        if ast.unparse(call.func) == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        loader = ast.unparse(call.func)
        if path.parts[len(ROOT.parts)] != "recipes" and re.search(r"\bAutoModel\w*\.from_pretrained$", loader):
            assert ast.unparse(keywords["use_safetensors"]) == "True"


@pytest.mark.parametrize("path", sorted((ROOT / "hf_aegis" / "hub").glob("*.py")), ids=lambda path: path.name)
def test_the_hub_s_room_stands_on_the_ground(path):
    for module in imported(parsed(path)):
        top = module.partition(".")[0]
        assert top in (*sys.stdlib_module_names, "huggingface_hub", "jinja2") or module.startswith("hf_aegis.hub")


def test_no_command_takes_a_token():
    for path in (ROOT / "hf_aegis" / "cli").glob("*.py"):
        assert "--token" not in path.read_text(encoding="utf-8")
        fields = [
            node.target.id for node in parsed(path) if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")
        ]
        assert "token" not in fields and "hub_token" not in fields
