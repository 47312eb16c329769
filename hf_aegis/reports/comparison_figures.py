"""The figures of a comparison: which of its logs each is made from, how it is read, and what it needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_aegis.atomic_files import replacing
from hf_aegis.reports.bands import Records
from hf_aegis.reports.drift_plane import drift_plane, plot_drift
from hf_aegis.reports.neuron_cosine_figures import plot_neuron_cosines
from hf_aegis.reports.run_logs import RunLogs
from hf_aegis.reports.spectra_figures import plot_concentration, plot_spectra
from hf_aegis.reports.style import REFERENCES, condition_styles, split_ablations
from hf_aegis.reports.trade_off import plot_trade_off, plottable
from hf_aegis.reports.training_curves import plot_flow_over_seeds, plot_projection_over_seeds, plot_vqa_over_seeds


# Side by side, more panels would be too small to read.
_DRIFT_PANELS = 3
# Their reference directions differ: the anchor's, and a replayed batch's.
_PROJECTED = ("aegis", "a_gem")


class MissingDataError(ValueError):
    """What a figure shows was not logged; the message is a sentence that says so."""


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


@dataclass(frozen=True)
class Material:
    """
    What figures are made from.

    Args:
        results (`Mapping`): As [`results_table.collect_results`] collects them.
        logs (`Mapping[str, list[RunLogs]]`): The finished runs by condition.
    """

    results: Mapping[str, Any]
    logs: Mapping[str, list[RunLogs]]

    @cached_property
    def metrics(self) -> dict[str, list[Records]]:
        """The logs of each condition's runs."""
        found = {name: [records for run in runs if (records := run.metrics())] for name, runs in self.logs.items()}
        return {name: runs for name, runs in found.items() if runs}

    def that_logged(self, *keys: str) -> dict[str, list[Records]]:
        """The logs of the runs with a record of any of `keys`."""
        found = {
            name: [records for records in runs if any(key in record for record in records for key in keys)]
            for name, runs in self.metrics.items()
        }
        return {name: runs for name, runs in found.items() if runs}

    def first_with(self, read: Callable[[RunLogs], Any]) -> tuple[str, list[Any]]:
        """AEGIS or naive, whichever has what `read` reads, or else the first other condition; and what was read."""
        for name in sorted(self.logs, key=lambda name: name not in REFERENCES):
            if found := [content for run in self.logs[name] if (content := read(run)) is not None]:
                return name, found
        raise MissingDataError("")


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
    methods, ablations = split_ablations(plottable(material.results["conditions"]))
    yield "trade_off", "Retention against plasticity", partial(_trade_off, material, methods)
    yield "vqa", "Question answering during training", partial(_vqa, material)
    yield "flow", "Flow loss during training", partial(_flow, material)
    yield "gradient_spectra", "Spectra of the two losses' gradients", partial(_spectra, material)
    yield "gradient_concentration", "Concentration of the gradients", partial(_concentration, material)
    yield "drift", "Drift of the hidden states", partial(_drift, material)
    for name in [name for name in _PROJECTED if name in material.logs] or _PROJECTED[:1]:
        title = f"What the projection did: {condition_styles([name])[name]['label']}"
        yield f"projection_{name}", title, partial(_projection, material, name)
    yield "neuron_cosines", "Agreement of the gradients, neuron by neuron", partial(_neurons, material)
    if ablations:
        title = "Retention against plasticity: variants of AEGIS"
        yield "trade_off_ablations", title, partial(_trade_off, material, ablations)


def _trade_off(material: Material, names: Sequence[str], path: Path) -> str:
    if not names:
        raise MissingDataError("no finished run has both a VQA accuracy and a held-out flow MSE in its result.json.")
    plot_trade_off(material.results["conditions"], names, material.results["before"], path)
    return (
        "Each marker is a condition after training: how often it still answers correctly (upwards), and its error on "
        "held-out demonstrations (leftwards is better). The upper left corner keeps the knowledge and learns the "
        "task. Bars are one standard deviation over seeds in both directions (none for a single run); a difference "
        "that is small beside them may be chance. The dotted line is the model before fine-tuning."
    )


def _vqa(material: Material, path: Path) -> str:
    runs = material.that_logged("vqa_cross_entropy", "vqa_accuracy")
    if not runs:
        raise MissingDataError("no finished run logged vqa_cross_entropy or vqa_accuracy (vqa_steps, vqa_samples).")
    plot_vqa_over_seeds(runs, path)
    return (
        "The same questions, asked again and again while the model learns to act. Left: cross-entropy of the correct "
        "answers, lower is better. Right: accuracy of the generated answers. A rising left and a falling right "
        f"curve is forgetting. The dotted line is the level before training. {_bands(runs)} With many conditions each "
        "row shows a few of them, on the same scales; naive and AEGIS are repeated faintly for comparison. Weights "
        "that are interpolated after training follow naive's curve until then."
    )


def _flow(material: Material, path: Path) -> str:
    runs = material.that_logged("flow_mse", "eval_flow_mse")
    if not runs:
        raise MissingDataError("no finished run logged flow_mse or eval_flow_mse.")
    plot_flow_over_seeds(runs, path)
    return (
        "Mean squared error of the predicted velocity, in normalised action units; lower is better. Left: on the "
        "batches that are trained on; they scatter, so the running mean over neighbouring steps is drawn over the "
        f"faint curve itself. Right: on demonstrations that are never trained on. {_bands(runs)} What a method for "
        "keeping knowledge costs is how far it stays above naive here."
    )


def _spectra(material: Material, path: Path) -> str:
    name, spectra = _read_spectra(material)
    plot_spectra(spectra, path)
    return (
        "Before training: singular values of the gradients of the VQA cross-entropy and of the flow loss, relative "
        "to the largest, one panel per decoder layer. A line that falls steeply is a gradient of few directions, a "
        f"flat one spreads over many. {_aggregation(spectra, name)} Values below 10⁻⁷ of the largest are rounding in "
        "single precision and drawn at that level. ρ₁ is the share of the energy in the first direction."
    )


def _concentration(material: Material, path: Path) -> str:
    name, spectra = _read_spectra(material)
    plot_concentration(spectra, path)
    return (
        "The same gradients in one number per layer: the concentration ratio ρₖ = Σᵢ≤ₖ sᵢ² / Σᵢ sᵢ², the share of a "
        "gradient's energy that its k leading singular directions hold. Left k = 1, right 5 % of all directions; "
        f"means over a layer's matrices. Higher is more concentrated. {_aggregation(spectra, name, mean=False)}"
    )


def _read_spectra(material: Material) -> tuple[str, list[Any]]:
    try:
        return material.first_with(RunLogs.gradient_spectra)
    except MissingDataError:
        raise MissingDataError("no finished run has analysis/gradient_spectra.json (analysis_samples).") from None


def _aggregation(spectra: Sequence[Mapping[str, Any]], name: str, mean: bool = True) -> str:
    runs = f"{len(spectra)} run{'s' if len(spectra) > 1 else ''} of the condition {name}"
    samples = f"on {spectra[0]['samples']} samples each"
    if not mean:
        return f"Measured in {runs}, {samples}."
    return (
        "Lines are geometric means over a layer's weight matrices, at equal relative positions, and over "
        f"{runs}, {samples}."
    )


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
        "naive fine-tuning and after AEGIS. The plane is spanned by the two mean displacements (Gram–Schmidt); where "
        "both point the same way, the second axis is the first principal component of what remains. Large markers "
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
        f"Above, over training steps: the share of parameter groups whose task gradient works against the gradient of "
        f"{reference}; the share of gradient energy that the projection removes; the mean cosine of both gradients; "
        f"and the loss behind the reference gradient, where it was logged. {_bands({name: projections})} Below: the "
        "cosine of each group at each step, mean over seeds; brown is conflict, which is projected away, purple "
        "agreement, which is left alone. A row that stays brown is a layer in lasting conflict."
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
    )


def _bands(runs: Mapping[str, Sequence[Records]]) -> str:
    seeds = sorted({len(of_condition) for of_condition in runs.values()})
    if seeds[-1] == 1:
        return "One seed: how far runs scatter is unknown."
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    spread = "one standard deviation to each side" if seeds[-1] > 2 else "from the lower to the higher run"
    also = " (between both runs where there are two)" if len(seeds) > 1 and 2 in seeds else ""
    return f"Lines are means over {count} seeds, bands {spread}{also}."
