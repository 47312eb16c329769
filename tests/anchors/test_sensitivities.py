import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_aegis.anchors import ActivationAnchor, PairSensitivity, SubspaceOptions, storage


OPTIONS = SubspaceOptions(energy=0.95, sensitivity=True, max_output_rank=6)
GATE = "layers.0.mlp.gate_proj"


def collect(model, batches, options=OPTIONS):
    return ActivationAnchor.collect(model, batches, subspaces=options, progress=False)


@pytest.fixture(scope="module")
def anchor(build_model, make_batches):
    return collect(build_model("llama"), make_batches("llama"))


def edit(folder, change):
    path = folder / "anchor_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(build_model, make_batches, tmp_path, dtype):
    options = dataclasses.replace(OPTIONS, dtype=dtype)
    anchor = collect(build_model("llama"), make_batches("llama"), options)
    loaded = ActivationAnchor.from_pretrained(anchor.save_pretrained(tmp_path))
    assert loaded == anchor
    assert len(loaded.sensitivities) == 3 * 7
    assert {str(pairs.output_basis.dtype) for pairs in loaded.sensitivities.values()} == {f"torch.{dtype}"}
    assert {pairs.sensitivities.dtype for pairs in loaded.sensitivities.values()} == {torch.float32}
    assert loaded.fingerprint.subspace_options == options
    assert json.loads((tmp_path / "anchor_config.json").read_text())["format_version"] == 3


def test_anchors_without_them_are_written_as_before(build_model, make_batches, tmp_path):
    collect(build_model("llama"), make_batches("llama"), SubspaceOptions()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "anchor_config.json").read_text())
    assert config["format_version"] == 2
    assert not {"sensitivity", "temperature", "max_output_rank"} & set(config["subspace_options"])
    assert ActivationAnchor.from_pretrained(tmp_path).sensitivities == {}


def test_subspaces_do_not_depend_on_whether_sensitivities_are_collected(anchor, build_model, make_batches):
    plain = collect(build_model("llama"), make_batches("llama"), dataclasses.replace(OPTIONS, sensitivity=False))
    assert plain.subspaces == anchor.subspaces
    assert torch.equal(plain.mean, anchor.mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(format_version=2), "an anchor with sensitivities has format_version 3, found 2"),
        (
            lambda config: config["subspace_options"].pop("temperature"),
            r"subspace options: missing keys \['temperature'\]",
        ),
        (lambda config: config["subspace_options"].update(temperature=0), "temperature must be above 0 and finite"),
        (
            lambda config: (config["subspace_options"].update(sensitivity=False), config.update(format_version=2)),
            r"anchor\.safetensors holds the keys",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_refused(anchor, tmp_path, change, message):
    edit(anchor.save_pretrained(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        ActivationAnchor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("sensitivities", torch.ones(2, 3), rf"sensitivity of {GATE}: .* the shapes \(out, m\) and \(m, k\)"),
        ("sensitivities", torch.ones(6, 3), rf"sensitivity of {GATE}: 3 columns, expected one for each of the"),
        ("sensitivities", None, "holds the keys"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(anchor, tmp_path, monkeypatch, part, tensor, message):
    anchor.save_pretrained(tmp_path)
    path = tmp_path / "anchor.safetensors"
    tensors = {**load_file(path), f"sensitivities.{GATE}.{part}": tensor}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    digest = storage.hashlib.sha256(path.read_bytes()).hexdigest()
    edit(tmp_path, lambda config: config.update(tensors_sha256=digest))
    with pytest.raises(ValueError, match=message):
        ActivationAnchor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("basis", "values", "message"),
    [
        (torch.eye(4)[:, :2], torch.ones(3, 5), r"found \(4, 2\) and \(3, 5\)"),
        (torch.ones(2, 4), torch.ones(4, 5), "that of outputs at most their width"),
        (torch.eye(4)[:, :0], torch.ones(0, 5), "ranks must be at least 1"),
        (torch.eye(4), torch.full((4, 5), -1.0), "sensitivities must not be negative"),
        (torch.eye(4), torch.full((4, 5), float("nan")), "not finite"),
    ],
)
def test_what_is_no_sensitivity_is_refused(basis, values, message):
    with pytest.raises(ValueError, match=f"sensitivity of linear: .*{message}"):
        PairSensitivity("linear", basis, values)


def test_an_anchor_has_one_for_each_linear_or_none(anchor):
    def rebuilt(sensitivities):
        return ActivationAnchor(anchor.mean, anchor.variance, anchor.fingerprint, anchor.subspaces, sensitivities)

    fewer = {name: pairs for name, pairs in anchor.sensitivities.items() if name != GATE}
    with pytest.raises(ValueError, match=rf"found sensitivity=True, missing \['{GATE}'\], unknown \[\]"):
        rebuilt(fewer)
    with pytest.raises(ValueError, match=f"the sensitivity of .* has the key '{GATE}'"):
        rebuilt({**fewer, GATE: anchor.sensitivities["layers.1.mlp.gate_proj"]})
    options = dataclasses.replace(OPTIONS, sensitivity=False)
    fingerprint = dataclasses.replace(anchor.fingerprint, subspace_options=options, format_version=2)
    with pytest.raises(ValueError, match=r"found sensitivity=False, missing \[\], unknown \['layers\.0"):
        ActivationAnchor(anchor.mean, anchor.variance, fingerprint, anchor.subspaces, anchor.sensitivities)


def test_moving_equality_and_repr_see_the_sensitivities(anchor):
    moved = anchor.to("meta").sensitivities[GATE]
    assert (moved.output_basis.device.type, moved.sensitivities.device.type) == ("meta", "meta")
    assert anchor.sensitivities[GATE].sensitivities.device.type == "cpu"
    pairs = anchor.sensitivities[GATE]
    other = {**anchor.sensitivities, GATE: dataclasses.replace(pairs, sensitivities=2 * pairs.sensitivities)}
    assert anchor != ActivationAnchor(anchor.mean, anchor.variance, anchor.fingerprint, anchor.subspaces, other)
    assert repr(anchor).endswith("subspaces=12, sensitivities=21)")
    assert repr(pairs).startswith(f"PairSensitivity(linear='{GATE}', out=24, output_rank=6, input_rank=")


def test_parts_with_sensitivities_do_not_merge(anchor):
    assert ActivationAnchor.merge([anchor]) == anchor
    with pytest.raises(ValueError, match="do not merge: each part has them for directions of its own"):
        ActivationAnchor.merge([anchor, anchor])
