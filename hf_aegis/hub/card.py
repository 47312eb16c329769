"""Cards of repositories, rendered from the templates in `model_cards/`."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData, RepoCard


# In a wheel the templates lie inside of the package; in a checkout they lie beside it.
_PACKAGE = Path(__file__).resolve().parents[1]
_TEMPLATE_FOLDERS = (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards")

# What a card that was not filled in shows. BibTeX writes "{{" too, but goes on at once.
_PLACEHOLDER = re.compile(r"\{\{\s|\{%|\[More Information Needed\]|<!--")


def find_template(name: str) -> Path:
    """
    The file of a template that comes with this package.

    Args:
        name (`str`): e.g. `"anchor.md"`.

    Raises:
        FileNotFoundError: if there is none of that name.
    """
    for folder in _TEMPLATE_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no template {name!r} in {' or '.join(map(str, _TEMPLATE_FOLDERS))}")


def render_card(template: str | os.PathLike[str], data: CardData, **values: Any) -> str:
    """
    A card: front matter and text.

    Args:
        template (`str` or `os.PathLike`):
            A Jinja template: the name of one that comes with this package, such as `"anchor.md"`, or the path of
            another, which a bare name never is: what lies in the working directory is not taken for one. It has
            `card_data`, the front matter as YAML, between two lines `---`, and may use the fields of `data`.
        data (`CardData`):
            Metadata, of huggingface_hub: `ModelCardData`, `DatasetCardData`, `SpaceCardData`.
        values:
            What the template names besides.

    Returns:
        `str`: the text of a `README.md`.

    Raises:
        ValueError: if the template names a value that is not given, a placeholder or comment is left, or the front
            matter does not say what `data` says when it is read again.
        FileNotFoundError: if there is no such template.
    """
    import jinja2

    path = Path(template)
    if len(path.parts) == 1:
        path = find_template(os.fspath(template))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        content = environment.from_string(path.read_text(encoding="utf-8")).render(
            **{**data.to_dict(), "card_data": data.to_yaml(), **values}
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"{path}: {error}") from error
    content = content.strip() + "\n"
    if found := _PLACEHOLDER.search(content):
        raise ValueError(f"{path}: the card still holds {found[0]!r}")
    _check_front_matter(path, content, data)
    return content


def _check_front_matter(path: Path, content: str, data: CardData) -> None:
    kinds: dict[type, type[RepoCard]] = {ModelCardData: ModelCard, DatasetCardData: DatasetCard}
    try:
        found = kinds.get(type(data), RepoCard)(content).data.to_dict()
    except ValueError as error:
        raise ValueError(f"{path}: the card's front matter is not valid: {error}") from error
    if found != data.to_dict():
        raise ValueError(f"{path}: the card's front matter says {found}, expected {data.to_dict()}")
