"""Anchors, what has been collected of one so far, and the moving average of an expert's weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from fuzz_engine import JSON, reading
from torch import nn

from file_readers.file_reader import FileReader
from file_readers.safetensors_mutations import SAFETENSORS
from hf_aegis.anchors import ActivationAnchor, AnchorFingerprint, InputSubspace, PairSensitivity, SubspaceOptions
from hf_aegis.anchors.linear_layers.sensitivities import check_sensitivities
from hf_aegis.anchors.moments_over_batches import MomentsOverBatches
from hf_aegis.anchors.partial_collection import PartialCollection
from hf_aegis.anchors.prediction_gradients import _CountedSamples
from hf_aegis.anchors.sensitivity_collection import OutputMoments, PairProducts
from hf_aegis.cli.anchor_inspect import format_fingerprint, format_subspaces
from hf_aegis.training.expert_ema import ExpertEMA


_LINEARS = ("layers.0.q", "layers.0.k")


def _fingerprint(options: SubspaceOptions | None) -> AnchorFingerprint:
    counts = {"num_samples": 3, "num_tokens": 9, "num_batches": 2}
    shape = {"num_layers": 2, "width": 3}
    version = 1 if options is None else options.format_version
    texts = {"weights_sha256": "0" * 64, "moments": "batch", "base_model": "org/model", "dataset_id": "d"}
    return AnchorFingerprint(**counts, **shape, **texts, format_version=version, subspace_options=options)


def _subspaces() -> dict[str, InputSubspace]:
    space = InputSubspace(_LINEARS, torch.eye(4)[:, :2].clone(), torch.tensor([2.0, 1.0]), 3.5, 9)
    return {_LINEARS[0]: space}


def _anchors(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    pairs = {name: PairSensitivity(name, torch.eye(3)[:, :2].clone(), torch.rand(2, 2)) for name in _LINEARS}
    wholes: list[tuple[Any, ...]] = [
        (None, {}, {}),
        (SubspaceOptions(dtype="bfloat16"), _subspaces(), {}),
        (SubspaceOptions(sensitivity=True, modules=("projector",)), _subspaces(), pairs),
    ]
    check_sensitivities(pairs, _subspaces(), True)
    return [
        ActivationAnchor(torch.rand(2, 3), torch.rand(2, 3), _fingerprint(options), *parts).save_pretrained(
            folder / f"version_{number}"
        )
        for number, (options, *parts) in enumerate(wholes, start=1)
    ]


def _use(anchor: ActivationAnchor) -> None:
    format_fingerprint(anchor.fingerprint)
    if anchor.subspaces:
        format_subspaces(anchor.subspaces)


def anchor_configuration(folder: Path) -> FileReader:
    """Of all three versions; the tensors beside it are those of the third."""
    anchors = _anchors(folder)

    def read(path: Path) -> None:
        _use(ActivationAnchor.from_pretrained(anchors[2]))

    path = anchors[2] / "anchor_config.json"
    seed = path.read_bytes()
    # The keys of an anchor that hold nothing.
    other = json.dumps({**json.loads(seed), "dataset_id": None, "revision": None}).encode()
    return FileReader([seed, other], reading(path, read), str(anchors[2]), JSON)


def anchor_tensors(folder: Path) -> FileReader:
    """With the hash that the configuration has to say."""
    anchors = _anchors(folder)
    config = json.loads((anchors[2] / "anchor_config.json").read_bytes())

    def read(data: bytes) -> None:
        (anchors[2] / "anchor.safetensors").write_bytes(data)
        config["tensors_sha256"] = hashlib.sha256(data).hexdigest()
        (anchors[2] / "anchor_config.json").write_text(json.dumps(config))
        _use(ActivationAnchor.from_pretrained(anchors[2]))

    return FileReader([(anchors[2] / "anchor.safetensors").read_bytes()], read, str(anchors[2]), SAFETENSORS)


def partial_collection(folder: Path) -> FileReader:
    options = SubspaceOptions(exact_width=4, max_rank=2, oversampling=1, max_output_rank=2, sensitivity=True)
    linears = {name: nn.Linear(4, 6) for name in _LINEARS}
    bases = {name: torch.eye(6)[:, :2].clone() for name in _LINEARS}

    def passes() -> dict[str, Any]:
        return {
            "moments": MomentsOverBatches("pooled", None),
            "output_gradients": _CountedSamples(OutputMoments(linears, options)),
            "sensitivities": _CountedSamples(PairProducts(_subspaces(), bases)),
        }

    sums = passes()
    sums["moments"].add(torch.rand(2, 3), torch.rand(2, 3), 5, 1)
    for name in _LINEARS:
        for key in ("output_gradients", "sensitivities"):
            sums[key].observer.see_input(name, torch.rand(1, 5, 4), None)
            sums[key].observer.see_gradient(name, torch.rand(1, 5, 6), None, 1)
    collection = PartialCollection(folder, {"seed": 0}, every=1)
    seeds = []
    for name, of_pass in sums.items():
        collection.batch_done(name, 1, of_pass)
        seeds.append((folder / f"{name}-0-of-1.safetensors").read_bytes())

    def read(data: bytes) -> None:
        # The kind of pass is read off the data, so that each file meets its own reader.
        marks = {"moments": b'"m2"', "sensitivities": b"directions_sha256", "output_gradients": b""}
        kind = next(kind for kind, mark in marks.items() if mark in data)
        (folder / f"{kind}-0-of-1.safetensors").write_bytes(data)
        collection.begin(kind, passes()[kind])

    return FileReader(seeds, read, "-0-of-1.safetensors", SAFETENSORS)


def expert_average(folder: Path) -> FileReader:
    average = ExpertEMA({"a": nn.Parameter(torch.rand(3, 2)), "b": nn.Parameter(torch.rand(4))}, 0.9)
    average.update()
    average.save(folder)
    path = folder / "expert_ema.safetensors"

    def read(path: Path) -> None:
        average.load(folder)

    return FileReader([path.read_bytes()], reading(path, read), "expert_ema.safetensors", SAFETENSORS)


ANCHOR_READERS = {
    "anchor_configuration": anchor_configuration,
    "anchor_tensors": anchor_tensors,
    "partial_collection": partial_collection,
    "expert_average": expert_average,
}
