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


# What runs text, or what a shell makes of it.
RUNNING = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "pty.spawn"}
# What makes any object of a text.
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}


def literal(node):
    return node.value if isinstance(node, ast.Constant) else None


def dotted(node):
    """`"a.b.c"` of a name; `""` of other expressions, which is faster than to write them out."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ".".join(["", *reversed(names)])


def safe_loaders(nodes):
    """YAML's own, and classes that a file derives from them."""
    known = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    return known | {node.name for node in classes if known.intersection(map(dotted, node.bases))}


def broken_promises(nodes):
    """What a file does that none is to do, each with its line."""
    safe = safe_loaders(nodes)
    for node in nodes:
        if isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield node.lineno, "names all interfaces: 0.0.0.0"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in RUNNING:
            yield node.lineno, f"runs text: {name}"
        module, _, function = name.rpartition(".")
        if module == "yaml" and function in UNSAFE_YAML:
            loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
            if function not in ("load", "load_all") or loader is None or dotted(loader) not in safe:
                yield node.lineno, f"reads any object from YAML: {name}"
        if name == "torch.load" and literal(keywords.get("weights_only")) is not True:
            yield node.lineno, "unpickles: torch.load without weights_only=True"
        if (
            name in ("np.load", "numpy.load")
            and literal(keywords.get("allow_pickle", ast.Constant(False))) is not False
        ):
            yield node.lineno, "unpickles: numpy.load"
        if "shell" in keywords and literal(keywords["shell"]) is not False:
            yield node.lineno, f"asks a shell: {name}"
        if "trust_remote_code" in keywords and literal(keywords["trust_remote_code"]) is not False:
            yield node.lineno, f"runs code of a repository: {name}"
        if "verify" in keywords and literal(keywords["verify"]) is False:
            yield node.lineno, f"trusts any certificate: {name}"
        if name.endswith("_create_unverified_context"):
            yield node.lineno, f"trusts any certificate: {name}"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("eval('1')", "runs text: eval"),
        ("exec(text)", "runs text: exec"),
        ("import os\nos.system('ls')", "runs text: os.system"),
        ("yaml.load(text)", "reads any object from YAML"),
        ("yaml.load(text, Loader=yaml.UnsafeLoader)", "reads any object from YAML"),
        ("yaml.full_load(text)", "reads any object from YAML"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "unpickles: numpy.load"),
        ("subprocess.run(text, shell=True)", "asks a shell"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "runs code of a repository"),
        ("server.launch(host='0.0.0.0')", "names all interfaces: 0.0.0.0"),
        ("httpx.get(url, verify=False)", "trusts any certificate"),
        ("ssl._create_unverified_context()", "trusts any certificate"),
    ],
)
def test_a_broken_promise_is_noticed(code, said):
    ((line, found),) = broken_promises(list(ast.walk(ast.parse(code))))
    assert said in found and line == code.count("\n") + 1


def test_what_is_safe_is_none():
    for code in (
        "model.eval()",
        "re.compile('a')",
        "yaml.safe_load(text)",
        "class Strict(yaml.SafeLoader): pass\nyaml.load(text, Loader=Strict)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "subprocess.run(['ls'], check=False)",
        "host = '127.0.0.1'",
    ):
        assert list(broken_promises(list(ast.walk(ast.parse(code))))) == []


def test_no_file_breaks_a_promise():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {said}" for path in SOURCES for line, said in broken_promises(parsed(path))
    ]
    assert found == []


def test_every_promise_of_the_security_page_names_tests_that_exist():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = page.partition("## What is promised")[2].partition("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            functions = [node.name for node in parsed(ROOT / "tests" / file) if isinstance(node, ast.FunctionDef)]
            assert name in functions, f"{file} has no {name}"
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_limits_of_the_security_page_are_those_of_the_code():
    import settings

    from hf_aegis.data.pictures import MAX_BYTES, MAX_PIXELS
    from hf_aegis.functional.prompt_text import MAX_PROMPT_LENGTH
    from hf_aegis.serving import clients, messages, places, server

    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    limits = page.partition("## Limits by name")[2].partition("\n## ")[0]
    for said in (
        f"{places.MAX_OPENING} connections more that did not say yet what they want, {server.OPEN_TIMEOUT:.0f} s each",
        f"{server.PING_INTERVAL:.0f} s + {server.PING_TIMEOUT:.0f} s",
        f"{server.MAX_MESSAGE_BYTES // 2**20} MiB; {server.MAX_UNREAD}",
        f"{messages.MAX_VALUES:,}, of a list or map {messages.MAX_LENGTH}",
        f"{clients.MAX_IMAGE_SIDE} pixels a side",
        f"{MAX_PROMPT_LENGTH} characters; on the page {settings.MAX_TEXT_LENGTH}",
        f"{MAX_PIXELS / 1e6:.0f} million pixels and {MAX_BYTES / 1e6:.0f} MB; on the page ",
        f"on the page {settings.MAX_IMAGE_PIXELS / 1e6:.0f} million",
        f"{settings.MAX_IMAGE_BYTES // 2**20} MiB (gradio",
        f"| {settings.MAX_WAITING}; 1 |",
    ):
        assert said in limits


@pytest.mark.parametrize("path", sorted((ROOT / "hf_aegis" / "hub").glob("*.py")), ids=lambda path: path.name)
def test_the_hub_s_room_stands_on_the_ground(path):
    for module in imported(parsed(path)):
        top = module.partition(".")[0]
        # huggingface_hub raises an error of its HTTP client that is none of its own.
        allowed = (*sys.stdlib_module_names, "huggingface_hub", "httpx2", "jinja2")
        assert top in allowed or module.startswith("hf_aegis.hub")


def test_no_command_takes_a_token():
    for path in (ROOT / "hf_aegis" / "cli").glob("*.py"):
        assert "--token" not in path.read_text(encoding="utf-8")
        fields = [
            node.target.id for node in parsed(path) if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")
        ]
        assert "token" not in fields and "hub_token" not in fields
