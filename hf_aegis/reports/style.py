"""How the project's figures look: legible at README width, and distinguishable without colour vision."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


WIDTH = 9.0
"""Inches of a figure; shown 900 pixels wide, 9-point text stays legible."""

REFERENCES = ("naive", "aegis")
"""Conditions that every panel repeats faintly."""

# Okabe & Ito's palette. Naive and AEGIS keep a colour each; in every panel the others take the next four.
_BLACK, _BLUE, _VERMILION = "#000000", "#0072B2", "#D55E00"
_OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_LINES: tuple[Any, ...] = ("-.", (0, (6, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))

# Title -> condition -> label. What is compared in one set of axes.
_PANELS: dict[str, dict[str, str]] = {
    "the paper's conditions": {
        "stop_gradient": "stop-gradient",
        "stop_gradient_fast": "stop-gradient + FAST",
        "lora": "LoRA",
    },
    "penalties": {
        "ewc": "EWC",
        "l2sp": "L2-SP",
        "feature_distillation": "feature distillation",
    },
    "penalties, weaker": {
        "l2sp_1e-2": "L2-SP, 0.01",
        "l2sp_1e-3": "L2-SP, 0.001",
    },
    "replayed VQA data": {
        "a_gem": "A-GEM",
        "pcgrad": "PCGrad",
        "graddrop": "GradDrop",
        "cotrain": "co-training",
    },
    "experts and combinations": {
        "aegis_lora": "AEGIS + LoRA",
        "weight_interpolation": "weight interpolation",
        "vla_gse": "VLA-GSE",
        "aegis_vla_gse": "AEGIS + VLA-GSE",
    },
    "held input subspaces": {
        "subspace_99": "held subspace, 99 %",
        "subspace_95": "held subspace, 95 %",
        "subspace_90": "held subspace, 90 %",
        "subspace_50": "held subspace, 50 %",
    },
    "held pairs of directions": {
        "pairs_99": "held pairs, 99 %",
        "pairs_95": "held pairs, 95 %",
        "pairs_90": "held pairs, 90 %",
        "pairs_80": "held pairs, 80 %",
    },
    "held otherwise": {
        "subspace_soft": "held subspace, soft",
        "subspace_unfrozen": "held subspace, norms free",
        "subspace_first_layer": "held subspace, more of layer 0",
        "pairs_99_unfrozen": "held pairs, 99 %, norms free",
    },
    "held, and a penalty": {
        "pairs_both": "held pairs, 90 %, + AEGIS",
        "pairs_90_transport": "held pairs, 90 %, + transport loss",
        "pairs_95_transport": "held pairs, 95 %, + transport loss",
        "pairs_99_transport": "held pairs, 99 %, + transport loss",
    },
    "taken back to within 5 %": {
        "naive_within_5": "naive, within 5 %",
        "aegis_within_5": "AEGIS, within 5 %",
        "lora_within_5": "LoRA, within 5 %",
        "pairs_90_within_5": "held pairs, within 5 %",
    },
    "other rates": {
        "naive_lr_3e-4": "naive, rate 3e-4",
        "naive_lr_2e-3": "naive, rate 2e-3",
        "pairs_90_lr_3e-4": "held pairs, 90 %, rate 3e-4",
    },
    "held pairs, twice the rate": {
        "pairs_90_lr_2e-3": "held pairs, 90 %, rate 2e-3",
        "pairs_99_lr_2e-3": "held pairs, 99 %, rate 2e-3",
        "pairs_995_lr_2e-3": "held pairs, 99.5 %, rate 2e-3",
        "pairs_99_transport_lr_2e-3": "held pairs, 99 %, + transport loss, rate 2e-3",
    },
    "AEGIS: what is projected": {
        "aegis_global": "AEGIS, global",
        "aegis_tensor": "AEGIS, per tensor",
        "aegis_image_tokens": "AEGIS, image tokens",
        "aegis_text_tokens": "AEGIS, text tokens",
    },
    "AEGIS: its anchor": {
        "aegis_pooled": "AEGIS, pooled anchor",
        "aegis_50_samples": "AEGIS, 50-sample anchor",
        "aegis_300_samples": "AEGIS, 300-sample anchor",
    },
    "AEGIS: damped, or its penalty as a loss": {
        "aegis_eps_10": "AEGIS, ε 10",
        "aegis_eps": "AEGIS, large ε",
        "transport_loss": "transport loss, × 1",
        "transport_loss_10": "transport loss, × 10",
    },
    "AEGIS: what the optimiser makes of it": {
        "aegis_update": "AEGIS, on the update",
        "aegis_adam_metric": "AEGIS, in Adam's metric",
        "naive_sgd": "naive, SGD",
        "aegis_sgd": "AEGIS, SGD",
    },
    "AEGIS: what its penalty is measured on": {
        "aegis_on_questions": "AEGIS, penalty on questions",
        "aegis_robot_anchor": "AEGIS, anchor of robot inputs",
        "aegis_accumulated": "AEGIS, micro-batches of 2",
    },
    "AEGIS: with a restoring part": {
        "aegis_restoring_10": "AEGIS, restoring 0.1",
        "aegis_restoring_100": "AEGIS, restoring 1",
        "aegis_robot_restoring_100": "AEGIS, robot anchor, restoring 1",
    },
    "AEGIS: what trains": {
        "naive_layers_alone": "naive, layers alone",
        "aegis_layers_alone": "AEGIS, layers alone",
        "naive_without_layer_0": "naive, layer 0 frozen",
    },
    "AEGIS: how far a step goes": {
        "naive_3e-4": "naive, rate 3e-4",
        "aegis_3e-4": "AEGIS, rate 3e-4",
        "naive_unclipped": "naive, unclipped",
        "aegis_unclipped": "AEGIS, unclipped",
    },
}
_METHODS = {name for title, members in _PANELS.items() if not title.startswith("AEGIS:") for name in members}
# A variant of AEGIS beside others, a method where it is alone.
_METHODS_TOO = ("transport_loss",)
# Stars by their number of points, one of them upside down; matplotlib has letters for the others.
_STAR_3, _STAR_3_DOWN, _STAR_4, _STAR_6, _STAR_8 = (3, 1, 0), (3, 1, 180), (4, 1, 0), (6, 1, 0), (8, 1, 0)
_MARKERS: tuple[Any, ...] = (
    *("s^D", "v<>"),
    (_STAR_8, _STAR_3),
    "hP*d",
    ("8", "H", _STAR_6, "P"),
    *("<s^*", ">v<^", "pDdh"),
    ((10, 1, 0), (7, 0, 0), (9, 1, 0), _STAR_8),
    ((7, 0, 0), (9, 1, 0), (10, 1, 0), (7, 1, 0)),
    (_STAR_3, _STAR_3_DOWN, (4, 1, 45)),
    (_STAR_3_DOWN, _STAR_8, _STAR_3, _STAR_4),
    *("D*sv", "^dP", "P>vp"),
    ("*", "h", _STAR_4, "s"),
    *("d8h", "Hp8"),
    (_STAR_6, _STAR_4, "H"),
    (_STAR_4, _STAR_6, "p", "D"),
)

# Each condition also has its own line style and marker, so that colour never carries a meaning alone.
CONDITION_STYLES: dict[str, dict[str, Any]] = {
    "pretrained": {"color": _BLACK, "linestyle": ":", "marker": "", "label": "before fine-tuning"},
    "naive": {"color": _VERMILION, "linestyle": "--", "marker": "X", "label": "naive"},
    "aegis": {"color": _BLUE, "linestyle": "-", "marker": "o", "label": "AEGIS"},
} | {
    name: {"color": _OTHERS[i], "linestyle": _LINES[i], "marker": markers[i], "label": label}
    for members, markers in zip(_PANELS.values(), _MARKERS, strict=True)
    for i, (name, label) in enumerate(members.items())
}


class Panel(NamedTuple):
    """Conditions that share a set of axes, and those that are repeated there faintly, to compare with."""

    title: str
    conditions: list[str]
    references: list[str]


def condition_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """
    Colour, line style, marker and label of each condition; conditions unknown here take turns. Where there are
    few, all colours and markers differ: a condition whose own is taken gets one that is free.
    """
    styles: dict[str, dict[str, Any]] = {}
    unknown = 0
    for name in names:
        if name in CONDITION_STYLES:
            styles[name] = CONDITION_STYLES[name]
            continue
        turn = unknown % len(_OTHERS)
        look = {"color": _OTHERS[turn], "linestyle": _LINES[turn], "marker": "s^Dv<>ph"[unknown % 8]}
        label = name.removeprefix("aegis_") if is_variant(name) else name
        styles[name] = {**look, "label": ("AEGIS, " if label != name else "") + label.replace("_", " ")}
        unknown += 1
    others = [name for name in styles if styles[name]["color"] in _OTHERS]
    if len(others) <= len(_OTHERS):
        looks = [{"color": color, "linestyle": line} for color, line in zip(_OTHERS, _LINES, strict=True)]
        _tell_apart(styles, others, "color", looks)
        _tell_apart(styles, others, "marker", [{"marker": marker} for marker in "s^Dv"])
    return styles


def _tell_apart(
    styles: dict[str, dict[str, Any]], names: Sequence[str], trait: str, looks: Sequence[dict[str, Any]]
) -> None:
    """Gives a free one of `looks` to each of `names` whose `trait` an earlier one of them has."""
    taken = [styles[name][trait] for name in names]
    free = [look for look in looks if look[trait] not in taken]
    for position, name in enumerate(names):
        if taken[position] in taken[:position]:
            styles[name] = {**styles[name], **free.pop(0)}


def condition_order(names: Iterable[str]) -> list[str]:
    """The conditions in the order in which they are told: naive, AEGIS, then panel by panel, then unknown ones."""
    known = list(CONDITION_STYLES)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def is_variant(name: str) -> bool:
    """Whether a condition is AEGIS or naive with one part changed, known here or not, rather than another method."""
    return name.startswith(("aegis_", "naive_", "transport_loss")) and name not in _METHODS


def condition_panels(names: Iterable[str]) -> list[Panel]:
    """Distributes conditions over panels, as few of them in one as can be told apart."""
    ordered = condition_order(names)
    references = [name for name in REFERENCES if name in ordered]
    if len(ordered) <= len(references) + len(_OTHERS):
        return [Panel("", ordered, [])]
    groups = {title: [name for name in ordered if name in members] for title, members in _PANELS.items()}
    unknown = [name for name in ordered if name not in CONDITION_STYLES]
    variants = [name for name in unknown if is_variant(name)]
    for title, members in (
        ("AEGIS: other variants", variants),
        ("others", [name for name in unknown if name not in variants]),
    ):
        for start in range(0, len(members), len(_OTHERS)):
            number = f", {start // len(_OTHERS) + 1}" if start else ""
            groups[title + number] = members[start : start + len(_OTHERS)]
    panels = [Panel(title, members, references) for title, members in groups.items() if members]
    first = panels[0]
    if first.title == next(iter(_PANELS)):
        panels[0] = Panel(first.title, condition_order([*references, *first.conditions]), [])
    elif references:
        panels.insert(0, Panel("naive and AEGIS", references, []))
    return panels


def split_ablations(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """
    The conditions that are methods, and the variants of AEGIS; naive and AEGIS itself are among both, but for methods
    of which there would be no other.
    """
    ordered = condition_order(names)
    variants = [name for name in ordered if is_variant(name)]
    if all(name in _METHODS_TOO for name in variants):
        variants = []
    methods = [name for name in ordered if name not in variants]
    if not variants:
        return methods, []
    references = [name for name in methods if name in REFERENCES]
    return [] if methods == references else methods, [*references, *variants]


def group_order(groups: Iterable[str]) -> list[str]:
    """Projection groups from the lowest layer up, then the others by name."""

    def key(group: str) -> tuple[bool, int, str]:
        number = group.rpartition(".")[2]
        return (not number.isdigit(), int(number) if number.isdigit() else 0, group)

    return sorted(groups, key=key)


def group_labels(groups: Sequence[str]) -> list[str]:
    """Names of projection groups as axes show them."""
    return [group.replace("layers.", "layer ").replace("multi_modal_", "").replace("_", " ") for group in groups]


def require_matplotlib() -> None:
    """
    Raises:
        ImportError: If figures cannot be drawn; to be known before the training that they are to show.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "hf-aegis[demo]"') from error


@contextmanager
def figure_style() -> Iterator[Any]:
    """
    Matplotlib's `pyplot` with the project's style, without a display.

    Raises:
        ImportError: If matplotlib is not installed; it comes with the extra `demo`.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {
        "font.size": 11,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.0,
        "lines.markersize": 5.0,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "savefig.dpi": 130,
        "figure.constrained_layout.use": True,
    }
    with pyplot.rc_context(settings):
        yield pyplot
