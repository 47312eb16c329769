"""A page in one file: headings, text, tables and figures, all escaped, with nothing to load from elsewhere."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


_STYLE = """
:root {
  color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --faint: #5a6472; --line: #d5dae0; --code: #f4f6f8;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --back: #14171b; --faint: #9aa4b1; --line: #353c45; --code: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 932px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.9em; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.35em; margin: 48px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1.08em; margin: 36px 0 6px; }
p { margin: 8px 0; }
.faint { color: var(--faint); }
figure { margin: 12px 0 0; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
.table { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; min-width: 84px; }
th:first-child, td:first-child {
  text-align: left; white-space: normal; min-width: 150px; position: sticky; left: 0; background: var(--back);
}
nav ul { columns: 2; padding-left: 20px; }
a { color: inherit; }
pre { background: var(--code); padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; }
summary { cursor: pointer; margin: 8px 0; }
"""


def page(title: str, blocks: Iterable[str]) -> str:
    """The whole document; `blocks` are what the other functions here return."""
    body = "\n".join(blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2, anchor: str | None = None) -> str:
    """A heading, which `anchor` makes a target of links on the page."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{escape(text)}</h{level}>"


def paragraph(text: str, faint: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=faint' if faint else ''}>{escape(text)}</p>"


def bullets(items: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def contents(entries: Iterable[tuple[str, str]]) -> str:
    """Links to headings of the page: their anchors and texts."""
    links = "".join(f'<li><a href="#{escape(anchor)}">{escape(text)}</a></li>' for anchor, text in entries)
    return f"<nav><ul>{links}</ul></nav>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'


def image(path: Path, alternative: str) -> str:
    """A PNG, embedded; `alternative` says what it shows to who cannot see it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(alternative)}" src="data:image/png;base64,{data}"></figure>'


def preformatted(summary: str, text: str) -> str:
    """Text in its own lines, folded away under a summary."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
