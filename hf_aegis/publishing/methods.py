"""How a training kept its model's knowledge, in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_aegis.publishing.papers import arxiv_link


@dataclass(frozen=True)
class Method:
    """
    Args:
        names (`tuple[str, ...]`): What was done, in short, one name for each part.
        sentences (`tuple[str, ...]`): What was done, a sentence for each part.
        papers (`tuple[str, ...]`): Numbers on arXiv.
        tags (`tuple[str, ...]`): For a card's metadata.
    """

    names: tuple[str, ...]
    sentences: tuple[str, ...]
    papers: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def name(self) -> str:
        """All names as one."""
        return " + ".join(self.names)


_Part = tuple[str, str, str | None, str]

_GRANULARITY = {"layer": "layer by layer", "global": "over all weights together", "tensor": "tensor by tensor"}
_PENALTIES: dict[str, _Part] = {
    "transport": (
        "transport penalty",
        "The anchor's transport penalty was added to the loss with weight {weight:g}.",
        "2604.16067",
        "aegis",
    ),
    "distillation": (
        "feature distillation",
        "The mean squared distance of each layer's outputs to the pre-trained model's was added to the loss with "
        "weight {weight:g}.",
        "1606.09282",
        "distillation",
    ),
    "replay": (
        "co-training",
        "The loss on replayed questions was added to that of the actions with weight {weight:g}.",
        None,
        "co-training",
    ),
    "l2sp": (
        "L2-SP",
        "Half the squared distance to the pre-trained weights was added to the loss with weight {weight:g}.",
        "1802.01483",
        "l2-sp",
    ),
    "ewc": (
        "EWC",
        "The squared distance to the pre-trained weights, weighted by the Fisher information of replayed questions, "
        "was added to the loss with weight {weight:g}.",
        "1612.00796",
        "ewc",
    ),
}


def describe_method(arguments: Mapping[str, Any]) -> Method:
    """
    The method of a training.

    Args:
        arguments (`Mapping[str, Any]`): Fields of [`AEGISConfig`], those of a run among them; with their defaults.
    """
    parts = [*_projection(arguments), *_subspaces(arguments), *_penalties(arguments), *_structure(arguments)]
    if not parts:
        parts = [("naive fine-tuning", "Nothing was done to keep what the vision-language model knew.", None, "naive")]
    names, sentences, papers, tags = zip(*parts, strict=True)
    told = [
        f"{text} ({arxiv_link(paper)})" if paper else text
        for text, paper in zip(_bare(sentences), papers, strict=True)
    ]
    return Method(names, tuple(f"{text}." for text in told), tuple(p for p in papers if p), tuple(dict.fromkeys(tags)))


def _bare(sentences: tuple[str, ...]) -> list[str]:
    return [sentence.removesuffix(".") for sentence in sentences]


def _projection(arguments: Mapping[str, Any]) -> list[_Part]:
    if arguments["preserve"] not in ("projection", "both"):
        return []
    how = _GRANULARITY[arguments["granularity"]]
    if arguments["reference"] == "replay":
        replayed: dict[str, list[_Part]] = {
            "one_sided": [
                (
                    "A-GEM",
                    f"What opposes the gradient of a replayed batch of questions was removed from the task's, {how}.",
                    "1812.00420",
                    "a-gem",
                )
            ],
            "pcgrad": [
                (
                    "PCGrad",
                    f"The task's gradient and that of replayed questions were combined, {how}.",
                    "2001.06782",
                    "pcgrad",
                )
            ],
            "graddrop": [
                (
                    "GradDrop",
                    "Of the task's gradient and that of replayed questions, each element kept one sign.",
                    "2010.06808",
                    "graddrop",
                )
            ],
        }
        return replayed[arguments["combiner"]]
    batch = "a replayed" if arguments["reference"] == "replayed_transport" else "the same"
    return [
        (
            "AEGIS",
            f"What opposes the gradient of the transport penalty to the anchor, on {batch} batch, was removed from "
            f"the task's {arguments['projection_target']}, {how}.",
            "2604.16067",
            "aegis",
        )
    ]


def _subspaces(arguments: Mapping[str, Any]) -> list[_Part]:
    if arguments["preserve"] not in ("subspace", "both"):
        return []
    if (share := arguments["subspace_sensitivity"]) is not None:
        return [
            (
                "held pairs",
                "After each optimiser step, the pairs of input and output directions that make up "
                f"{100 * share:g} % of the predictions' sensitivity were put back to what they were.",
                None,
                "held-subspace",
            )
        ]
    energy = arguments["subspace_energy"]
    share = "all that the anchor has" if energy is None else f"{100 * energy:g} % of their energy"
    return [
        (
            "held subspaces",
            "After each optimiser step, the linear layers were made to act on the principal directions of the "
            f"anchored inputs ({share}) as they did before.",
            None,
            "held-subspace",
        )
    ]


def _penalties(arguments: Mapping[str, Any]) -> list[_Part]:
    parts = []
    for name, weight in (arguments["penalties"] or {}).items():
        short, sentence, paper, tag = _PENALTIES[name]
        parts.append((short, sentence.format(weight=weight), paper, tag))
    return parts


def _structure(arguments: Mapping[str, Any]) -> list[_Part]:
    parts: list[_Part] = []
    if (arguments.get("expert") or {}).get("flow_gradient_to_vlm") is False:
        parts.append(
            ("stop-gradient", "The action loss did not train the vision-language model.", None, "stop-gradient")
        )
    if (fast := arguments.get("fast")) is not None:
        parts.append(
            (
                "FAST head",
                f"The language model learnt to predict FAST tokens of the actions{_options(fast)}.",
                "2501.09747",
                "fast",
            )
        )
    if (lora := arguments.get("lora")) is not None:
        parts.append(
            ("LoRA", f"The language model trained through low-rank adapters{_options(lora)}.", "2106.09685", "lora")
        )
    if (gse := arguments.get("gse")) is not None:
        parts.append(
            (
                "VLA-GSE",
                f"The language model trained through generalized and specialized experts{_options(gse)}.",
                "2605.06175",
                "gse",
            )
        )
    if (share := arguments.get("weight_interpolation")) is not None:
        parts.append(
            (
                "weight interpolation",
                f"After training, weights became {100 * share:g} % fine-tuned and the rest pre-trained ones.",
                "2109.01903",
                "weight-interpolation",
            )
        )
    if (tolerance := arguments.get("keep_within")) is not None:
        parts.append(
            (
                "weight interpolation",
                "After training, weights went back towards the pre-trained ones until the cross-entropy on known "
                f"questions was within {100 * tolerance:g} % of what it was.",
                "2109.01903",
                "weight-interpolation",
            )
        )
    if steps := arguments.get("settling_steps"):
        parts.append(("settling", f"{steps} steps of the action expert alone followed.", None, "settling"))
    return parts


def _options(options: Mapping[str, Any]) -> str:
    return f": {', '.join(f'`{name}` {value}' for name, value in options.items())}" if options else ""
