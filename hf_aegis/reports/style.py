"""How the project's figures look: legible at README width, and distinguishable without colour vision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


# Okabe & Ito's palette; each condition also has its own line style, so that colour never carries a meaning alone.
CONDITION_STYLES: dict[str, dict[str, Any]] = {
    "pretrained": {"color": "#000000", "linestyle": ":", "label": "before fine-tuning"},
    "naive": {"color": "#D55E00", "linestyle": "--", "label": "naive"},
    "aegis": {"color": "#0072B2", "linestyle": "-", "label": "AEGIS"},
}


@contextmanager
def figure_style() -> Iterator[Any]:
    """
    Matplotlib's `pyplot` with the project's style, without a display.

    Raises:
        ImportError: If matplotlib is not installed; it comes with the extra `demo`.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "hf-aegis[demo]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {
        "font.size": 11,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.0,
        "legend.frameon": False,
        "savefig.dpi": 130,
        "figure.constrained_layout.use": True,
    }
    with pyplot.rc_context(settings):
        yield pyplot
