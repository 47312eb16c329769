"""
Writes the tables of STUDY.md anew from the results that are kept beside it.

    python recipes/study_page.py

A comment above each table says which results it is of, which conditions, and which columns:

    <!-- table: results/study_embedded, conditions with at least 5 seeds: VQA accuracy (%); held-out flow MSE -->

Conditions that have not run are left out.
"""

import re
from pathlib import Path

from hf_aegis.atomic_files import write_text


RECIPES = Path(__file__).parent
PAGE = RECIPES / "STUDY.md"
_DIRECTIVE = re.compile(
    r"^(<!-- table: ([\w/]+), conditions(?: with (at least|fewer than) (\d+) seeds)?: (.+) -->)\n\n(?:\|.*\n)*",
    re.MULTILINE,
)


def main() -> None:
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8")))


def with_tables(page: str) -> str:
    """
    The page with each of its tables as the results are now.

    Raises:
        ValueError: If a comment asks for a column that the results do not have.
        OSError: If results cannot be read.
    """
    return _DIRECTIVE.sub(lambda found: "\n".join([found[1], "", *table(*found.groups()[1:]), ""]), page)


def table(results: str, bound: str | None, seeds: str | None, columns: str) -> list[str]:
    """The lines of one table."""
    path = RECIPES / results / "results.md"
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    names = ["condition", "seeds", *columns.split("; ")]
    if missing := [name for name in names if name not in header]:
        raise ValueError(f"{path} has no columns {missing}; it has {header}")
    chosen = [header.index(name) for name in names]
    shown = [row for row in rows if row[0] == "before fine-tuning" or _is_among(int(row[1].split()[0]), bound, seeds)]
    cells = [names, ["---", *["---:"] * (len(names) - 1)], *([row[i] for i in chosen] for row in shown)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _is_among(runs: int, bound: str | None, seeds: str | None) -> bool:
    if bound is None or seeds is None:
        return runs > 0
    return runs >= int(seeds) if bound == "at least" else 0 < runs < int(seeds)


if __name__ == "__main__":
    main()
