"""What the projection did over whole trainings, in figures (arXiv 2604.16067, appendix B)."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hf_aegis.reports.run_files import Records


class _Measure(NamedTuple):
    key: str
    header: str
    format: str
    scale: float = 1.0


_MEASURES = (
    _Measure("throttle_rate", "groups in conflict (%)", ".1f", 100),
    _Measure("energy_shed", "gradient energy shed (%)", ".2f", 100),
    _Measure("cosine", "cosine", ".3f"),
    _Measure("alpha", "coefficient α", ".2g"),
    _Measure("penalty", "transport penalty", ".4g"),
    _Measure("vlm_grad_norm", "VLM gradient norm", ".3g"),
)
# arXiv 2604.16067, appendix B: 1,500 steps of PaliGemma2-3B on LIBERO. What its text leaves out is left out here.
_PAPER_LENGTH = ("–", "1,500 steps")
_PAPER = ("51.2 (3.6 to 100)", "0.62 (max. 3.35)", "0 (−0.21 to 0.21)", "−0.003", "728 (712 to 758)", "33.8")
PAPER_ROW = "AEGIS on PaliGemma2-3B, as reported (arXiv 2604.16067)"


def diagnostics_rows(projections: Mapping[str, Sequence[Records]]) -> tuple[list[str], list[list[str]]]:
    """
    Header and rows of the table: each figure's mean, minimum and maximum over steps and seeds. Steps whose figures are
    not finite are passed over.

    Args:
        projections (`Mapping[str, Sequence[Records]]`):
            By label of the condition, for each of its runs the figures of each projected backward pass.
    """
    header = ["", "seeds", "backward passes", *(measure.header for measure in _MEASURES)]
    rows = []
    for label, runs in projections.items():
        summaries = [summary for summaries in runs for summary in summaries]
        cells = [_cell([summary.get(measure.key) for summary in summaries], measure) for measure in _MEASURES]
        rows.append([label, str(len(runs)), f"{len(summaries):,}", *cells])
    rows.append([PAPER_ROW, *_PAPER_LENGTH, *_PAPER])
    return header, rows


def _cell(values: Sequence[float | None], measure: _Measure) -> str:
    finite = [measure.scale * value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return "–"
    texts = (math.fsum(finite) / len(finite), min(finite), max(finite))
    mean, low, high = (format(value, measure.format).replace("-", "−") for value in texts)
    return f"{mean} ({low} to {high})"
