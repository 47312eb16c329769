"""Collections that are killed and started again."""

import json

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from hf_aegis.anchors import ActivationAnchor, SampleBatches, Share, SubspaceOptions
from hf_aegis.anchors.sensitivity_collection import PairProducts


EVERYTHING = SubspaceOptions(energy=1.0, sensitivity=True, exact_width=16, max_rank=4, oversampling=4)


class KilledError(Exception):
    """What ends a collection in these tests."""


class UntilKilled(list):
    """Batches, of which so many are given out in all passes together."""

    left: int | None = None

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise KilledError
            if self.left is not None:
                self.left -= 1
            yield batch


@pytest.fixture
def model(build_model):
    return build_model("gemma2")


@pytest.fixture
def batches(make_batches):
    return UntilKilled(make_batches("gemma2", sizes=(3, 2, 4, 2, 3)))


def collect(model, batches, folder=None, **options):
    where = {} if folder is None else {"partial_folder": folder, "save_batches": 2, "settings": {"seed": 0}}
    return ActivationAnchor.collect(model, batches, progress=False, **{**where, **options})


# In each of the three passes over five batches, and between two of them.
@pytest.mark.parametrize(
    ("killed_after", "moments"), [(1, "batch"), (3, "pooled"), (5, "batch"), (8, "pooled"), (12, "batch")]
)
def test_a_killed_collection_comes_to_the_same_anchor(model, batches, tmp_path, killed_after, moments):
    options = {"moments": moments, "subspaces": EVERYTHING}
    expected = collect(model, batches, **options)
    batches.left = killed_after
    with pytest.raises(KilledError):
        collect(model, batches, tmp_path / "partial", **options)
    batches.left = None
    assert collect(model, batches, tmp_path / "partial", **options) == expected
    assert sorted(path.name for path in (tmp_path / "partial").iterdir()) == [
        "moments-0-of-1.safetensors",
        "output_gradients-0-of-1.safetensors",
        "sensitivities-0-of-1.safetensors",
    ]


def test_batches_that_are_done_are_not_run_again_nor_made(model, make_batches, tmp_path):
    (whole,) = make_batches("gemma2", sizes=(10,))
    made, ran = [], []

    class Samples:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            made.append(index)
            return {name: value[index] for name, value in whole.items()}

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    model.register_forward_hook(lambda *_: ran.append(1))
    batches = SampleBatches(Samples(), 2, collate)
    assert len(batches) == 5
    expected = collect(model, batches)
    assert made == list(range(10))

    def fail(_module, _inputs, _output):
        if len(ran) == 4:
            raise KilledError

    hook = model.register_forward_hook(fail)
    ran.clear()
    with pytest.raises(KilledError):
        collect(model, batches, tmp_path)
    hook.remove()
    made.clear(), ran.clear()
    assert collect(model, batches, tmp_path) == expected
    assert (made, len(ran)) == ([4, 5, 6, 7, 8, 9], 3), "two batches of five were saved"
    made.clear()
    assert collect(model, batches, tmp_path) == expected
    assert made == [], "all were"


def test_shares_are_whole_batches_of_all():
    batches = [SampleBatches(list(range(11)), 2, list, share=Share(rank, 3)) for rank in range(3)]
    assert [list(share) for share in batches] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10]]]
    assert list(batches[0].starting_at(1)) == [[6, 7]]
    assert [Share(rank, 3).number(1) for rank in range(3)] == [3, 4, 5]
    with pytest.raises(ValueError, match="3 samples in batches of 2 are 2 batches, fewer than 3 processes"):
        SampleBatches(list(range(3)), 2, list, share=Share(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"seed": 1}}, r"seed: found 0, expected 1\)"),
        ({"settings": {}}, r"seed: found 0, expected None\)"),
        ({"moments": "pooled"}, "moments: found 'batch', expected 'pooled'"),
        ({"tokens": "text"}, "mask_policy: found 'attention_mask', expected 'text_tokens'"),
        ({"num_batches": 4}, "num_batches: found None, expected 4"),
        ({"subspaces": SubspaceOptions()}, r"subspaces: found None, expected \{'energy'"),
        ({"dataset_id": "other"}, "dataset_id: found None, expected 'other'"),
    ],
)
def test_other_settings_are_refused(build_model, make_batches, tmp_path, change, message):
    model, batches = build_model("paligemma2"), make_batches("paligemma2")
    collect(model, batches, tmp_path)
    with pytest.raises(ValueError, match=r"moments-0-of-1\.safetensors was begun with other settings.*" + message):
        collect(model, batches, tmp_path, **change)


def test_other_weights_other_processes_and_other_files_are_refused(model, batches, build_model, tmp_path):
    collect(model, batches, tmp_path)
    with pytest.raises(ValueError, match=r"other settings .*weights_sha256: found '[0-9a-f]{64}', expected"):
        collect(build_model("gemma2", seed=1), batches, tmp_path)
    file = tmp_path / "moments-0-of-1.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["partial_collection"])["batches"] == 5
    file.rename(tmp_path / "moments-0-of-2.safetensors")
    with pytest.raises(ValueError, match="holds what 2 processes have collected, found 1: continue with as many"):
        collect(model, batches, tmp_path)
    (tmp_path / "moments-0-of-2.safetensors").unlink()
    save_file({"mean": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"holds no part of a collection.* delete .* to begin anew"):
        collect(model, batches, tmp_path)
    file.write_bytes(b"not one")
    with pytest.raises(ValueError, match="holds no part of a collection"):
        collect(model, batches, tmp_path)


def test_arguments_that_mean_nothing_are_refused(model, batches, tmp_path):
    with pytest.raises(ValueError, match="settings are kept in a partial_folder, and none is given"):
        collect(model, batches, settings={"seed": 0})
    with pytest.raises(ValueError, match="save_batches must be at least 1, found 0"):
        collect(model, batches, tmp_path, save_batches=0)


def test_squares_along_other_directions_are_collected_again(model, batches, tmp_path, caplog, monkeypatch):
    expected = collect(model, batches, tmp_path / "first", subspaces=EVERYTHING)
    collect(model, batches, tmp_path / "second", subspaces=EVERYTHING)
    hashed = PairProducts.snapshot
    monkeypatch.setattr(
        PairProducts, "snapshot", lambda self: hashed(self)._replace(fields={"directions_sha256": "another"})
    )
    collect(model, batches, tmp_path / "third", subspaces=EVERYTHING)
    assert collect(model, batches, tmp_path / "third", subspaces=EVERYTHING) == expected
    assert "this pass begins anew" in caplog.text
    caplog.clear()
    assert collect(model, batches, tmp_path / "second", subspaces=EVERYTHING) == expected
    assert not caplog.text
