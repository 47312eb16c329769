"""`hf-aegis report`: figures and tables of a comparison, from its logs alone, on one page."""

import argparse
from pathlib import Path

from hf_aegis.reports.comparison_report import write_report


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the report's option."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of `hf-aegis compare`")


def run(arguments: argparse.Namespace) -> int:
    """
    Writes `report.html` and `figures/*.png` into the comparison's folder and says where.

    Raises:
        ValueError: If the folder holds no comparison with a finished run, or a file in it is not what it should be.
        ImportError: If matplotlib is not installed.
    """
    print(write_report(arguments.folder))
    return 0
