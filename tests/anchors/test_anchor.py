import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_aegis.anchors import ActivationAnchor, AnchorFingerprint, AnchorMismatchError


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama")


@pytest.fixture(scope="module")
def anchor(model, make_batches):
    return ActivationAnchor.collect(model, make_batches("llama"), dataset_id="questions", progress=False)


@pytest.fixture
def saved(anchor, tmp_path):
    return anchor.save_pretrained(tmp_path / "anchor")


def edit_config(folder, **changes):
    path = folder / "anchor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("moments", ["batch", "pooled"])
def test_merging_equals_a_single_collection(model, make_batches, moments):
    batches = make_batches("llama", sizes=(3, 1, 2, 4, 2))
    whole, *parts = (
        ActivationAnchor.collect(model, part, moments=moments, progress=False)
        for part in (batches, batches[:1], batches[1:4], batches[4:])
    )
    merged = ActivationAnchor.merge(parts)
    assert merged.fingerprint == whole.fingerprint
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(merged.variance, whole.variance, rtol=1e-6, atol=1e-8)
    # Weights matter here: a plain average of the parts is something else.
    assert not torch.allclose(torch.stack([part.variance for part in parts]).mean(dim=0), whole.variance, rtol=1e-3)


def test_merging_one_changes_nothing_and_merging_none_is_refused(anchor):
    assert ActivationAnchor.merge([anchor]) == anchor
    with pytest.raises(ValueError, match="no anchors to merge"):
        ActivationAnchor.merge([])


def test_merging_different_origins_names_every_field(anchor):
    other = ActivationAnchor(
        anchor.mean,
        anchor.variance,
        dataclasses.replace(anchor.fingerprint, moments="pooled", dataset_id="other", weights_sha256="0" * 64),
    )
    with pytest.raises(AnchorMismatchError) as caught:
        ActivationAnchor.merge([anchor, other])
    message = str(caught.value)
    assert "moments: first 'batch', second 'pooled'" in message
    assert "dataset_id: first 'questions', second 'other'" in message
    assert "weights_sha256" in message
    assert "num_samples" not in message


def test_round_trip_is_exact(anchor, saved):
    loaded = ActivationAnchor.from_pretrained(saved)
    assert loaded == anchor
    assert torch.equal(loaded.mean, anchor.mean)
    assert torch.equal(loaded.variance, anchor.variance)
    assert loaded.fingerprint == anchor.fingerprint
    assert sorted(path.name for path in saved.iterdir()) == ["anchor.safetensors", "anchor_config.json"]


def test_saving_twice_replaces(anchor, saved):
    shifted = ActivationAnchor(anchor.mean + 1, anchor.variance, anchor.fingerprint)
    shifted.save_pretrained(saved)
    assert ActivationAnchor.from_pretrained(saved) == shifted


def test_missing_files_are_named(saved):
    (saved / "anchor.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"anchor\.safetensors is missing"):
        ActivationAnchor.from_pretrained(saved)


def test_a_name_that_is_neither_folder_nor_repository_is_refused(tmp_path):
    with pytest.raises(OSError, match="not a local folder"):
        ActivationAnchor.from_pretrained("org/no-such-anchor", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(OSError, match="not a local folder"):
        ActivationAnchor.from_pretrained(tmp_path / "nowhere", local_files_only=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor_type": "subspace"}, r"anchor_config\.json: key 'anchor_type' is 'subspace', expected 'activation'"),
        ({"format_version": 4}, r"anchor_config\.json: key 'format_version' is 4 .* reads 1 to 3"),
        ({"format_version": 2}, r"anchor_config\.json: an anchor without subspaces has format_version 1, found 2"),
        ({"format_version": None}, r"key 'format_version' is None"),
        ({"surprise": 1}, r"anchor_config\.json: .*unknown keys \['surprise'\]"),
        ({"moments": "exact"}, r"anchor_config\.json: moments must be one of"),
        ({"num_tokens": 0}, r"anchor_config\.json: num_tokens must be a positive integer, found 0"),
        ({"tensors_sha256": "0"}, r"anchor\.safetensors is corrupt or belongs to another anchor"),
        ({"num_layers": 4}, r"anchor\.safetensors: anchor mean has shape \(3, 16\), expected .* \(4, 16\)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        ActivationAnchor.from_pretrained(saved)


def test_missing_keys_are_named(saved):
    path = saved / "anchor_config.json"
    config = json.loads(path.read_text())
    del config["width"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing keys \['width'\]"):
        ActivationAnchor.from_pretrained(saved)


@pytest.mark.parametrize("content", ["{", "[]", '"anchor"'])
def test_a_foreign_configuration_is_refused(saved, content):
    (saved / "anchor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"anchor_config\.json"):
        ActivationAnchor.from_pretrained(saved)


def test_a_damaged_tensor_file_is_refused(saved):
    path = saved / "anchor.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"anchor\.safetensors is corrupt"):
        ActivationAnchor.from_pretrained(saved)


def test_tensors_of_another_kind_are_refused(saved):
    path = saved / "anchor.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(1)}, path)
    edit_config(saved, tensors_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"holds the keys \['extra', 'mean', 'variance'\]"):
        ActivationAnchor.from_pretrained(saved)
    path.write_bytes(b"not tensors")
    edit_config(saved, tensors_sha256=hashlib.sha256(b"not tensors").hexdigest())
    with pytest.raises(ValueError, match="is not a safetensors file"):
        ActivationAnchor.from_pretrained(saved)


def test_the_model_it_came_from_is_compatible(anchor, build_model):
    anchor.check_compatible(build_model("llama"))


def test_a_different_model_is_refused_with_both_sides(anchor, build_model):
    with pytest.raises(AnchorMismatchError) as caught:
        anchor.check_compatible(build_model("gemma2"))
    message = str(caught.value)
    assert "attention_implementation: anchor 'sdpa', model 'eager'" in message
    assert f"weights_sha256: anchor {anchor.fingerprint.weights_sha256!r}, model " in message
    assert "num_layers" not in message


def test_a_hash_that_differs_by_rounding_is_explained(anchor, build_model):
    with pytest.raises(AnchorMismatchError, match="collected in float32 and the model is in bfloat16: rounding"):
        anchor.check_compatible(build_model("llama").bfloat16())
    with pytest.raises(AnchorMismatchError) as caught:
        anchor.check_compatible(build_model("llama", seed=1))
    assert "rounding" not in str(caught.value)


def test_a_trained_model_is_compatible_in_shape_only(anchor, build_model):
    other = build_model("llama", seed=1)
    anchor.check_compatible(other, check="shape")
    with pytest.raises(AnchorMismatchError, match="weights_sha256"):
        anchor.check_compatible(other)


def test_another_shape_is_refused_even_by_the_shape_check(anchor, build_model):
    wider = ActivationAnchor(
        torch.zeros(5, 20), torch.ones(5, 20), dataclasses.replace(anchor.fingerprint, num_layers=5, width=20)
    )
    with pytest.raises(AnchorMismatchError, match=r"num_layers: anchor 5, model 3; width: anchor 20, model 16"):
        wider.check_compatible(build_model("llama"), check="shape")
    with pytest.raises(ValueError, match="check must be"):
        wider.check_compatible(build_model("llama"), check="loose")


def test_equality_looks_at_moments_and_origin(anchor):
    assert anchor == ActivationAnchor(anchor.mean.clone(), anchor.variance.clone(), anchor.fingerprint)
    assert anchor != ActivationAnchor(anchor.mean + 1e-6, anchor.variance, anchor.fingerprint)
    assert anchor != ActivationAnchor(
        anchor.mean, anchor.variance, dataclasses.replace(anchor.fingerprint, dataset_id=None)
    )
    assert anchor != "anchor"


def test_moving_keeps_the_original(anchor):
    moved = anchor.to("meta")
    assert moved.device.type == moved.variance.device.type == "meta"
    assert anchor.device.type == "cpu"
    assert moved.fingerprint == anchor.fingerprint


def test_repr_says_what_matters(anchor):
    assert repr(anchor) == (
        "ActivationAnchor(base_model=None, dataset_id='questions', moments='batch', num_layers=3, width=16, "
        f"num_samples=5, num_tokens={anchor.fingerprint.num_tokens})"
    )


@pytest.mark.parametrize(
    ("mean", "variance", "message"),
    [
        (torch.zeros(2, 4), torch.ones(2, 3), r"variance has shape \(2, 3\), expected .* \(2, 4\)"),
        (torch.full((2, 4), float("nan")), torch.ones(2, 4), "mean holds values that are not finite"),
        (torch.zeros(2, 4), -torch.ones(2, 4), "variance holds negative values"),
    ],
)
def test_moments_that_cannot_be_are_refused(mean, variance, message):
    fingerprint = AnchorFingerprint(
        num_layers=2, width=4, weights_sha256="0" * 64, moments="batch", num_samples=1, num_tokens=1, num_batches=1
    )
    with pytest.raises(ValueError, match=message):
        ActivationAnchor(mean, variance, fingerprint)
