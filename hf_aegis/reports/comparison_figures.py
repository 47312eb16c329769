"""The figures of a comparison: which of its logs each is made from, how it is read, and what it needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_aegis.atomic_files import replacing
from hf_aegis.reports.drift_plane import drift_plane, plot_drift
from hf_aegis.reports.expert_figures import plot_expert_spectra, plot_routing
from hf_aegis.reports.figure_material import Material, MissingDataError
from hf_aegis.reports.film_strips import filmed_episodes, plot_film_strips
from hf_aegis.reports.neuron_cosine_figures import plot_neuron_cosines
from hf_aegis.reports.run_files import Records
from hf_aegis.reports.run_logs import RunLogs
from hf_aegis.reports.spectra_figures import plot_concentration, plot_spectra
from hf_aegis.reports.style import REFERENCES, condition_panels, condition_styles, split_ablations
from hf_aegis.reports.trade_off import (
    FLOW_MSE,
    STEP_TIME,
    VQA_ACCURACY,
    VQA_CROSS_ENTROPY,
    Measure,
    plot_trade_off,
    plottable,
)
from hf_aegis.reports.training_curves import (
    SeedRuns,
    logged_curves,
    plot_flow_over_seeds,
    plot_projection_over_seeds,
    plot_vqa_over_seeds,
)


# Side by side, more panels would be too small to read.
_DRIFT_PANELS = 3
# Their reference directions differ: the anchor's, and a replayed batch's.
_PROJECTED = ("aegis", "a_gem")


@dataclass(frozen=True)
class Figure:
    """
    A figure of the report.

    Args:
        name (`str`): Of its file, without suffix.
        title (`str`): What it is.
        explanation (`str`): What is shown and how to read it.
        path (`Path`, *optional*): The PNG; `None` where the data for it are missing.
        missing (`str`, *optional*): A sentence that says which.
    """

    name: str
    title: str
    explanation: str
    path: Path | None = None
    missing: str = ""


def draw_figures(material: Material, folder: Path) -> list[Figure]:
    """
    Draws all figures that the logs have data for as PNG files in `folder`, and removes earlier ones that they do not.

    Returns:
        `list[Figure]`: in the order of the report, those that could not be drawn among them.
    """
    folder.mkdir(exist_ok=True)
    figures = []
    for name, title, draw in tqdm(list(_figures(material)), desc="figures", unit="figure", leave=False, disable=None):
        path = folder / f"{name}.png"
        try:
            with replacing(path) as staged:
                explanation = draw(staged)
        except MissingDataError as error:
            path.unlink(missing_ok=True)
            figures.append(Figure(name, title, "", missing=str(error)))
        else:
            figures.append(Figure(name, title, explanation, path))
    return figures


def _figures(material: Material) -> Iterator[tuple[str, str, Callable[[Path], str]]]:
    methods, ablations = split_ablations(material.logs)
    for names, suffix, of_what in ((methods, "", ""), (ablations, "_ablations", ": variants of AEGIS")):
        if names:
            yield f"trade_off{suffix}", f"Retention against plasticity{of_what}", partial(_trade_off, material, names)
            title = f"Cross-entropy of the answers against plasticity{of_what}"
            yield f"cross_entropy{suffix}", title, partial(_cross_entropy, material, names)
            yield f"cost{suffix}", f"Retention against the time of a step{of_what}", partial(_cost, material, names)
            yield f"vqa{suffix}", f"Question answering during training{of_what}", partial(_vqa, material, names)
            yield f"flow{suffix}", f"Flow loss during training{of_what}", partial(_flow, material, names)
    # Most comparisons let nothing act, and miss no film.
    if _that_left(material, RunLogs.rollouts):
        yield "film_strips", "Episodes in the LIBERO simulator", partial(_film_strips, material)
    yield "gradient_spectra", "Spectra of the two losses' gradients", partial(_spectra, material)
    yield "gradient_concentration", "Concentration of the gradients", partial(_concentration, material)
    yield "drift", "Drift of the hidden states", partial(_drift, material)
    for name in [name for name in _PROJECTED if name in material.logs] or _PROJECTED[:1]:
        title = f"What the projection did: {condition_styles([name])[name]['label']}"
        yield f"projection_{name}", title, partial(_projection, material, name)
    yield "neuron_cosines", "Agreement of the gradients, neuron by neuron", partial(_neurons, material)
    # Most comparisons have no condition with experts, and miss nothing.
    for name in _that_left(material, RunLogs.experts):
        label = condition_styles([name])[name]["label"]
        yield f"experts_{name}", f"Routing of the tokens to experts: {label}", partial(_experts, material, name)
    for name in _that_left(material, RunLogs.expert_spectra):
        label = condition_styles([name])[name]["label"]
        yield f"expert_spectra_{name}", f"Spectra of the experts: {label}", partial(_expert_spectra, material, name)


def _trade_off(material: Material, conditions: Sequence[str], path: Path) -> str:
    several = _plot(material, conditions, path, "a VQA accuracy and a held-out flow MSE")
    return " ".join(
        [
            "Each marker is a condition after training: how often it still answers correctly (upwards), and its error "
            "on held-out demonstrations (leftwards is better). The upper left corner keeps the knowledge and learns "
            "the task.",
            "Bars are one standard deviation over seeds in both directions (none for a single run); a difference that "
            "is small beside them may be chance."
            if several
            else "There is one run of each, so a difference may be chance.",
            *(["The dotted line is the model before fine-tuning."] if material.results["before"] else []),
        ]
    )


def _cross_entropy(material: Material, conditions: Sequence[str], path: Path) -> str:
    several = _plot(
        material, conditions, path, "a VQA cross-entropy and a held-out flow MSE", retention=VQA_CROSS_ENTROPY
    )
    return (
        "The same with the cross-entropy of the correct answers upwards, on a logarithmic scale: it tells apart what "
        "answers about as many questions correctly, but less surely. The lower left corner keeps the knowledge and "
        "learns the task." + (" Bars are one standard deviation upwards, and as long downwards." if several else "")
    )


def _plot(
    material: Material,
    conditions: Sequence[str],
    path: Path,
    measures: str,
    task: Measure = FLOW_MSE,
    retention: Measure = VQA_ACCURACY,
) -> bool:
    """
    Draws those of the conditions that have both measures; returns whether one of them has several runs.

    Raises:
        MissingDataError: If none has the measures, which `measures` names.
    """
    results = material.results["conditions"]
    found = plottable(results, task, retention)
    names = [name for name in conditions if name in found]
    if not names:
        raise MissingDataError(f"no finished run has both {measures} in its result.json.")
    plot_trade_off(results, names, material.results["before"], path, task, retention)
    return any(results[name]["runs"] > 1 for name in names)


def _film_strips(material: Material, path: Path) -> str:
    labels = {name: style["label"] for name, style in condition_styles(list(material.logs)).items()}
    episodes = filmed_episodes(material.logs, labels)
    if not episodes:
        raise MissingDataError("no finished run filmed an episode (libero: films).")
    plot_film_strips(episodes, path)
    shown = episodes[0].episode
    return (
        f"Each row is one episode of a trained policy, in pictures evenly spaced over its own time: “"
        f"{shown['task'].replace('_', ' ')}”, fixed start {shown['start']}, the same for all conditions. One episode "
        "is an example and no measurement; how often each condition succeeds is in the table."
    )


def _cost(material: Material, conditions: Sequence[str], path: Path) -> str:
    _plot(material, conditions, path, "a VQA accuracy and the time of a step", task=STEP_TIME)
    return (
        "The same as the first, but to the right is the median time of an optimiser step. Times are comparable as far "
        "as the machine had as much else to do in all runs."
    )


def _vqa(material: Material, conditions: Sequence[str], path: Path) -> str:
    runs = material.that_logged(conditions, "vqa_cross_entropy", "vqa_accuracy")
    if not runs:
        raise MissingDataError("no finished run logged vqa_cross_entropy or vqa_accuracy (vqa_steps, vqa_samples).")
    plot_vqa_over_seeds(runs, path)
    meaning = {
        "vqa_cross_entropy": "cross-entropy of the correct answers, lower is better, on a logarithmic scale where "
        "conditions differ widely; a rising curve is forgetting.",
        "vqa_accuracy": "accuracy of the generated answers; a falling curve is forgetting.",
    }
    return (
        "The same questions, asked again and again while the model learns to act. "
        f"{_sides(runs, meaning)} The dotted line is the level before training. {_bands(runs)}{_rows(runs)}"
        + (
            " Weights that go back after training follow the curve of that training until then."
            if any(name == "weight_interpolation" or "_within_" in name for name in runs)
            else ""
        )
    )


def _flow(material: Material, conditions: Sequence[str], path: Path) -> str:
    runs = material.that_logged(conditions, "flow_mse", "eval_flow_mse")
    if not runs:
        raise MissingDataError("no finished run logged flow_mse or eval_flow_mse.")
    plot_flow_over_seeds(runs, path)
    meaning = {
        "flow_mse": "on the batches that are trained on; they scatter, so the running mean over neighbouring steps is "
        "drawn over the faint curve itself.",
        "eval_flow_mse": "on demonstrations that are never trained on.",
    }
    return (
        "Mean squared error of the predicted velocity, in normalised action units; lower is better. "
        f"{_sides(runs, meaning)} {_bands(runs)}{_rows(runs)} What a method for keeping knowledge costs is how far it "
        "stays above naive here."
    )


def _sides(runs: SeedRuns, meaning: Mapping[str, str]) -> str:
    """What the drawn columns show: those of `meaning` that any run has logged."""
    drawn = [meaning[key] for key in logged_curves(runs, meaning)]
    if len(drawn) == 1:
        return f"Shown: {drawn[0]}"
    return " ".join(f"{side}: {text}" for side, text in zip(("Left", "Right"), drawn, strict=True))


def _rows(runs: SeedRuns) -> str:
    if len(condition_panels(runs)) == 1:
        return ""
    return (
        " Each row shows a few of the conditions, on the same scales; naive and AEGIS are repeated faintly for "
        "comparison."
    )


def _spectra(material: Material, path: Path) -> str:
    name, spectra = _read_spectra(material)
    plot_spectra(spectra, path)
    return (
        "Before training: singular values of the gradients of the VQA cross-entropy and of the flow loss, relative "
        "to the largest, one panel per decoder layer. A line that falls steeply is a gradient of few directions, a "
        f"flat one spreads over many. {_aggregation(spectra, name)} Values below 10⁻⁷ of the largest are rounding in "
        "single precision and drawn at that level. ρ₁ is the share of the energy in the first direction"
        f"{', with its standard deviation over runs' if len(spectra) > 1 else ''}."
    )


def _concentration(material: Material, path: Path) -> str:
    name, spectra = _read_spectra(material)
    plot_concentration(spectra, path)
    return (
        "The same gradients in one number per layer: the concentration ratio ρₖ = Σᵢ≤ₖ sᵢ² / Σᵢ sᵢ², the share of a "
        "gradient's energy that its k leading singular directions hold. Left k = 1, right 5 % of all directions; "
        f"means over a layer's matrices. Higher is more concentrated. Measured in {_measured(spectra, name)}"
        f"{'; bars are one standard deviation over them to each side' if len(spectra) > 1 else ''}."
    )


def _read_spectra(material: Material) -> tuple[str, list[Any]]:
    try:
        return material.first_with(RunLogs.gradient_spectra)
    except MissingDataError:
        raise MissingDataError("no finished run has analysis/gradient_spectra.json (analysis_samples).") from None


def _aggregation(spectra: Sequence[Mapping[str, Any]], name: str) -> str:
    bands = "; bands reach from the lowest to the highest run" if len(spectra) > 1 else ""
    return (
        "Lines are geometric means over a layer's weight matrices, at equal relative positions, and over "
        f"{_measured(spectra, name)}{bands}."
    )


def _measured(spectra: Sequence[Mapping[str, Any]], name: str) -> str:
    runs = f"{len(spectra)} run{'s' if len(spectra) > 1 else ''} of the condition {name}"
    return f"{runs}, on {spectra[0]['samples']} samples each"


def _drift(material: Material, path: Path) -> str:
    naive, aegis = (
        {run.seed: states for run in material.logs.get(name, ()) if (states := run.hidden_states()) is not None}
        for name in REFERENCES
    )
    seeds = sorted(naive.keys() & aegis.keys())
    if not seeds:
        raise MissingDataError(
            "no seed has analysis/hidden_states.safetensors of both naive and AEGIS (analysis_samples)."
        )
    planes = {}
    for seed in seeds[:_DRIFT_PANELS]:
        try:
            planes[seed] = drift_plane(naive[seed]["before"], naive[seed]["after"], aegis[seed]["after"])
        except ValueError as error:
            raise MissingDataError(f"with seed {seed}, {error}.") from error
    plot_drift(planes, path)
    lengths = "; ".join(
        f"seed {seed}: naive {plane.drifts['naive']:.3g}, AEGIS {plane.drifts['aegis']:.3g}"
        for seed, plane in planes.items()
    )
    others = f" Of {len(seeds)} seeds the first {len(planes)} are shown." if len(seeds) > len(planes) else ""
    return (
        "Last hidden states on the same questions, each averaged over its prompt's tokens, before fine-tuning, after "
        "naive fine-tuning and after AEGIS. The plane is spanned by the two mean displacements: naive's, and what of "
        "AEGIS's is orthogonal to it; where nothing is, the second axis is the first principal component of what "
        "remains of all displacements (principal residual). Large markers "
        "are means, arrows the mean displacements; one unit is the same in both directions. Percentages are the share "
        "of all squared displacements along that axis, so what is missing to 100 % happens outside the plane. "
        f"Length of the mean displacement: {lengths}.{others}"
    )


def _projection(material: Material, name: str, path: Path) -> str:
    logs = material.logs.get(name, ())
    projections = [records for run in logs if (records := run.projection())]
    if not projections:
        raise MissingDataError(f"no finished run of {name} has a projection.jsonl.")
    plot_projection_over_seeds(material.metrics.get(name, []), projections, path, name)
    reference = "a replayed batch of questions" if name == "a_gem" else "the transport penalty"
    return (
        f"Above, over training steps, as far as they were logged: the share of parameter groups whose task gradient "
        f"works against the gradient of {reference}; the share of gradient energy that the projection removes; the "
        "mean cosine of both gradients; and the loss behind the reference gradient. "
        f"{_bands({name: projections})} Below: the cosine of each group at each step, mean over seeds; brown is "
        "conflict, which is projected away, purple agreement, which is left alone, white neither, and grey a step "
        "without a finite gradient. The colours end at the value that one cell in fifty exceeds. A row that stays "
        "brown is a layer in lasting conflict."
    )


def _neurons(material: Material, path: Path) -> str:
    try:
        name, histograms = material.first_with(RunLogs.neuron_cosines)
    except MissingDataError:
        raise MissingDataError("no finished run has a neuron_cosines.json (neuron_cosine_steps).") from None
    plot_neuron_cosines(histograms, path)
    steps = len(histograms[0]["steps"])
    return (
        "For each neuron (a row of a weight matrix), the cosine between its task gradient and its reference gradient: "
        "above over all neurons, below for each group as a map, with its share in conflict on the right. Mass left of "
        "zero is conflict. A distribution that is symmetric around zero means that the reference knows nothing of the "
        f"task, neuron by neuron. Counts of {len(histograms)} run{'s' if len(histograms) > 1 else ''} of {name}, each "
        f"at {steps} step{'s' if steps != 1 else ''}; up to one neuron in two thousand lies outside the axis."
        f"{' Thin outlines are the single runs.' if len(histograms) > 1 else ''}"
    )


def _that_left(material: Material, read: Callable[[RunLogs], Any]) -> list[str]:
    """The conditions of which a run left what `read` reads."""
    return [name for name, runs in material.logs.items() if any(read(run) is not None for run in runs)]


def _experts(material: Material, name: str, path: Path) -> str:
    runs = [records for run in material.logs[name] if (records := run.experts()) is not None]
    try:
        plot_routing(runs, path, name)
    except ValueError as error:
        raise MissingDataError(f"{error}.") from error
    return (
        "Left: the entropy of the tokens' routing, as a share of that of an even routing; low values are routers that "
        "are sure. Right: how much more the busiest expert of a layer gets than with an even load, which is 1; high "
        "values are experts that the others are idle beside. Above, the mean over layers, and from the lowest to the "
        f"highest layer a band; below, layer by layer. Means over a layer's linear layers and {_runs(runs)}, of the "
        "batch before each log."
    )


def _expert_spectra(material: Material, name: str, path: Path) -> str:
    runs = [found for run in material.logs[name] if (found := run.expert_spectra()) is not None]
    plot_expert_spectra(runs, path)
    bars = "; bars are one standard deviation over seeds to each side" if len(runs) > 1 else ""
    return (
        "Left: singular values of what all experts of a linear layer add together, Σᵢ sᵢ Bᵢ Aᵢ, before and after "
        "training, and of the difference; geometric means over linear layers. Before training it is the leading part "
        "of the weight's own spectrum, divided by ρ. Right: the length of the difference, relative to that of the "
        f"experts before, layer by layer{bars}. From {_runs(runs)}."
    )


def _runs(runs: Sequence[Any]) -> str:
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}"


def _bands(runs: Mapping[str, Sequence[Records]]) -> str:
    seeds = sorted({len(of_condition) for of_condition in runs.values()})
    if seeds[-1] == 1:
        return "One seed: how far runs scatter is unknown."
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"Lines are means over {count} seeds, bands reach from the lowest to the highest of them."
