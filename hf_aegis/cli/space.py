"""`hf-aegis space`: the page that compares answers and actions, here or as a Space on the Hub."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

from huggingface_hub import SpaceCard

from hf_aegis.atomic_files import write_text
from hf_aegis.functional.loopback import is_loopback
from hf_aegis.hub import push_folder


MODEL_VARIABLES = tuple(f"AEGIS_SPACE_{name}" for name in ("BASE", "NAIVE", "AEGIS", "HELD"))
"""Environment variables that choose the page's models."""

_PACKAGE = Path(__file__).resolve().parents[1]
_APP, _CARD, _MODELS, _REQUIREMENTS = "app.py", "README.md", "models.json", "requirements.txt"
# Lies in folders that this command has put together, and so may replace. It is not pushed.
_MARK = ".hf-aegis-space"
_NOT_DEPLOYED = shutil.ignore_patterns("__pycache__", ".*")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the page here and of its deployment."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="where the page listens; there is no authentication (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    parser.add_argument(
        "--push_to_hub", metavar="REPO_ID", help="deploy the page as a Space, in the place of starting it"
    )
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--revision", help="branch of the Space to push to (default: its main branch)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request in the place of a commit")
    parser.add_argument("--commit_message", help="of the push (default: Deploy hf-aegis and its version)")
    parser.add_argument(
        "--package",
        metavar="REQUIREMENT",
        help="what the Space installs, e.g. 'hf-aegis==0.1.0' (default: this package's own files go along)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/space"),
        help="folder in which the Space is put together to be pushed (default: outputs/space)",
    )


def run(arguments: argparse.Namespace) -> None:
    """
    Starts the page, which shows the embedded models unless environment variables name others; or deploys it.

    Raises:
        ValueError: If an option does not fit, or a model that is to be deployed is a folder of this machine.
        ImportError: If gradio is not installed.
        OSError: If the port is taken, or the push fails.
    """
    folder = space_folder()
    if arguments.push_to_hub:
        assemble(folder, arguments.output_dir, arguments.package)
        commit = push_folder(
            arguments.output_dir,
            arguments.push_to_hub,
            repo_type="space",
            space_sdk="gradio",
            private=arguments.private or None,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            ignore_patterns=_MARK,
            # Of an earlier deployment, which chose models.
            delete_patterns=_MODELS,
            commit_message=arguments.commit_message or f"Deploy hf-aegis {importlib.metadata.version('hf-aegis')}",
        )
        print(commit.pr_url or commit.repo_url)
        return
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the page needs gradio: pip install "hf-aegis[space]"')
    if not is_loopback(arguments.host):
        print(
            f"warning: listening on {arguments.host} without authentication: whoever can reach this machine can use "
            "the page",
            file=sys.stderr,
        )
    os.environ |= {"GRADIO_SERVER_NAME": arguments.host, "GRADIO_SERVER_PORT": str(arguments.port)}
    # As `python app.py` has it.
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / _APP), run_name="__main__")


def space_folder() -> Path:
    """
    The folder of the page: inside of an installed package, and beside it in a checkout.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (_PACKAGE / "space", _PACKAGE.parent / "space"):
        if (folder / _APP).is_file():
            return folder
    raise FileNotFoundError(f"no page of hf-aegis, neither in {_PACKAGE} nor beside it; install the package again")


def assemble(source: Path, target: Path, package: str | None = None) -> None:
    """
    Puts together what a Space needs: the page, its card, its requirements, and the models to show.

    Args:
        source (`Path`): Folder of the page.
        target (`Path`): Folder to write; an earlier one of this command is replaced.
        package (`str`, *optional*):
            Requirement by which the Space installs hf-aegis. Without one, this package's files are part of it, the
            embedded models among them, and its dependencies are the requirements.

    Raises:
        ValueError: `target` holds something else, or a model is a folder of this machine.
    """
    chosen = _chosen_models()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (target / _MARK).is_file():
        raise ValueError(
            f"--output_dir {target} holds something else than what this command has put there; choose another folder"
        )
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=_NOT_DEPLOYED)
    write_text(target / _MARK, "")
    if package is None:
        shutil.copytree(_PACKAGE, target / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "space"))
        requirements = _dependencies()
    else:
        requirements = [package]
    write_text(target / _REQUIREMENTS, "".join(f"{requirement}\n" for requirement in requirements))
    if chosen:
        write_text(target / _MODELS, json.dumps(chosen, indent=2) + "\n")
        card = SpaceCard.load(target / _CARD)
        card.data.models = sorted({source for source in chosen.values() if source})
        card.save(target / _CARD)


def _chosen_models() -> dict[str, str]:
    """The variables that are set here, to be set there."""
    chosen = {name: os.environ[name] for name in MODEL_VARIABLES if name in os.environ}
    for name, value in chosen.items():
        if value and Path(value).exists():
            raise ValueError(f"{name} is {value}, which a Space cannot see: push it to the Hub and name it by its id")
    return chosen


def _dependencies() -> list[str]:
    """What this package needs without its extras."""
    return [each for each in importlib.metadata.requires("hf-aegis") or () if "extra ==" not in each]
