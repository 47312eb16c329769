"""LiberoDataset: what an item holds, how observations meet actions, splits, statistics, workers."""

import json
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_aegis.data import LiberoDataset, LiberoFormatError, combine, libero_dataset, load_statistics, save_statistics
from hf_aegis.functional.normalization import unnormalize


def assert_same_item(left, right):
    assert left["instruction"] == right["instruction"]
    for key in ("state", "actions", "action_is_pad"):
        np.testing.assert_array_equal(left[key], right[key])
    for one, other in zip(left["images"], right["images"], strict=True):
        np.testing.assert_array_equal(one, other)


def test_items_have_the_documented_schema(libero_files):
    dataset = LiberoDataset(libero_files.write(), chunk_size=4)
    item = dataset[0]
    assert set(item) == {"images", "state", "actions", "action_is_pad", "instruction"}
    assert [(image.shape, image.dtype) for image in item["images"]] == [((8, 8, 3), np.uint8)] * 2
    assert (item["state"].shape, item["state"].dtype) == ((9,), torch.float32)
    assert (item["actions"].shape, item["actions"].dtype) == ((4, 7), torch.float32)
    assert (item["action_is_pad"].shape, item["action_is_pad"].dtype) == ((4,), torch.bool)
    assert item["instruction"] == "pick up the milk"
    assert dataset.instructions == ["pick up the milk"]


@pytest.mark.parametrize("kind", ["recorded", "recorded_jpeg"])
def test_recorded_observations_meet_the_action_of_the_same_step(libero_files, kind):
    dataset = LiberoDataset(libero_files.write(kind=kind), chunk_size=3, normalize=False)
    assert len(dataset) == 6 + 7 + 9
    expected = libero_files.arrays(seed=1, length=7)
    item = dataset[6 + 2]  # demonstration 1, step 2
    np.testing.assert_allclose(item["actions"], expected["actions"][2:5], rtol=1e-6)
    state = np.concatenate([expected["joint_states"][2], expected["gripper_states"][2]])
    np.testing.assert_allclose(item["state"], state, rtol=1e-6)
    for camera, image in enumerate(item["images"]):
        np.testing.assert_allclose(image[0, 0], [42, 100 + 50 * camera, 70], atol=2)  # JPEG rounds
        np.testing.assert_allclose(image[-1, 0], [0, 0, 0], atol=2)


def test_released_observations_meet_the_next_action_and_frames_are_turned_upright(libero_files):
    dataset = LiberoDataset(libero_files.write(), chunk_size=3, normalize=False)
    assert len(dataset) == 5 + 6 + 8
    expected = libero_files.arrays(seed=1, length=7)
    item = dataset[5 + 2]
    np.testing.assert_allclose(item["actions"], expected["actions"][3:6], rtol=1e-6)
    np.testing.assert_allclose(item["state"][:7], expected["joint_states"][2], rtol=1e-6)
    np.testing.assert_array_equal(item["images"][1][0, 0], [42, 150, 70])
    np.testing.assert_array_equal(item["images"][1][-1, 0], [0, 0, 0])
    assert item["images"][0].flags["C_CONTIGUOUS"]


def test_what_the_user_says_overrides_the_file(libero_files):
    dataset = LiberoDataset(
        libero_files.write(), chunk_size=3, normalize=False, image_origin="top_left", observation="before_action"
    )
    assert len(dataset) == 6 + 7 + 9
    np.testing.assert_array_equal(dataset[0]["images"][0][0, 0], [0, 0, 0])
    np.testing.assert_allclose(dataset[0]["actions"][0], libero_files.arrays(0, 6)["actions"][0], rtol=1e-6)


def test_robosuite_macro_names_the_origin_of_released_frames(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    np.testing.assert_array_equal(LiberoDataset(path, chunk_size=3)[0]["images"][0][0, 0], [0, 0, 0])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4), chunk=st.integers(1, 12), data=st.data())
def test_any_chunk_is_the_tail_of_its_demonstration_then_its_last_action(libero_files, lengths, chunk, data):
    kind = data.draw(st.sampled_from(["released", "recorded"]))
    path = libero_files.write(lengths=tuple(lengths), kind=kind)
    dataset = LiberoDataset(path, chunk_size=chunk, normalize=False, short_demonstrations="pad")
    offset = 1 if kind == "released" else 0
    pairs = [(demo, step) for demo, length in enumerate(lengths) for step in range(length - offset)]
    assert len(dataset) == len(pairs)
    index = data.draw(st.integers(-len(pairs), len(pairs) - 1))
    demo, step = pairs[index]
    actions = libero_files.arrays(demo, lengths[demo])["actions"].astype(np.float32)
    rows = np.minimum(np.arange(step + offset, step + offset + chunk), lengths[demo] - 1)
    np.testing.assert_array_equal(dataset[index]["actions"], actions[rows])
    padded = np.arange(step + offset, step + offset + chunk) >= lengths[demo]
    np.testing.assert_array_equal(dataset[index]["action_is_pad"], padded)


def test_index_out_of_range(libero_files):
    dataset = LiberoDataset(libero_files.write(), chunk_size=3)
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 19 items"):
            dataset[index]


@pytest.mark.parametrize("kind", ["released", "recorded"])
def test_statistics_are_those_of_every_step_used(libero_files, kind):
    dataset = LiberoDataset(libero_files.write(kind=kind), chunk_size=3)
    demos = [libero_files.arrays(index, length) for index, length in enumerate((6, 7, 9))]
    first = 1 if kind == "released" else 0
    actions = np.concatenate([demo["actions"][first:] for demo in demos])
    joints = np.concatenate([demo["joint_states"][: len(demo["actions"]) - first] for demo in demos])
    np.testing.assert_allclose(dataset.statistics.actions.q01, np.percentile(actions, 1, axis=0))
    np.testing.assert_allclose(dataset.statistics.actions.q99, np.percentile(actions, 99, axis=0))
    np.testing.assert_allclose(dataset.statistics.state.mean[:7], joints.mean(axis=0))
    np.testing.assert_allclose(dataset.statistics.state.std[:7], joints.std(axis=0))
    assert dataset.statistics.actions.count == len(actions)


def test_normalised_items_are_clipped_and_invert_to_the_stored_values(libero_files):
    path = libero_files.write(lengths=(40, 50))
    normalised, raw = LiberoDataset(path, chunk_size=5), LiberoDataset(path, chunk_size=5, normalize=False)
    for index in range(0, len(raw), 7):
        item = normalised[index]
        assert item["actions"].abs().max() <= 1
        assert item["state"].abs().max() <= 1
        inside = item["actions"].abs() < 1
        back = unnormalize(item["actions"], normalised.statistics.actions)
        np.testing.assert_allclose(back[inside], raw[index]["actions"][inside], rtol=1e-5, atol=1e-6)


def test_statistics_can_be_passed_or_loaded(libero_files, tmp_path):
    first = LiberoDataset(libero_files.write(), chunk_size=3)
    save_statistics(first.statistics, tmp_path / "statistics.json")
    other = libero_files.write("libero_object/other.hdf5", seed=100)
    assert LiberoDataset(other, chunk_size=3).statistics != first.statistics
    for given_statistics in (first.statistics, tmp_path / "statistics.json"):
        assert LiberoDataset(other, chunk_size=3, statistics=given_statistics).statistics == first.statistics


@pytest.mark.parametrize("text", ["{", "[]", '{"state": 3, "actions": 4}', '{"state": {}}'])
def test_a_bad_statistics_file_is_named(libero_files, tmp_path, text):
    (tmp_path / "statistics.json").write_text(text)
    with pytest.raises(ValueError, match=r"statistics\.json: (not dataset statistics|not JSON|expected a JSON)"):
        LiberoDataset(libero_files.write(), chunk_size=3, statistics=tmp_path / "statistics.json")


def test_statistics_of_another_robot_are_refused(libero_files):
    path = libero_files.write()
    values = LiberoDataset(path, chunk_size=3).statistics.to_dict()
    values["state"] = values["actions"] | {"name": "state"}
    statistics = load_and_save(values, path.parent / "statistics.json")
    with pytest.raises(ValueError, match="statistics of 'state' have 7 dimensions, expected 9"):
        LiberoDataset(path, chunk_size=3, statistics=statistics)


def load_and_save(values, path):
    path.write_text(json.dumps(values))
    return load_statistics(path)


def test_splits_are_disjoint_complete_and_share_the_training_statistics(libero_files):
    paths = [
        libero_files.write(lengths=(3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)),
        libero_files.write("libero_object/b.hdf5", lengths=(20, 21), instruction="other", seed=50),
    ]
    options = {"chunk_size": 2, "held_out_per_task": 1}
    train = LiberoDataset(paths, split="train", **options)
    held_out = LiberoDataset(paths, split="held_out", **options)
    everything = LiberoDataset(paths, split="all", chunk_size=2)
    assert len(held_out) == 12 + 20  # the last by number: demo_10, not demo_9, which sorts after it as text
    assert len(train) + len(held_out) == len(everything)
    assert train.statistics == held_out.statistics != everything.statistics
    assert len({train.fingerprint, held_out.fingerprint, everything.fingerprint}) == 3


def test_a_split_that_leaves_nothing_to_train_on_is_refused(libero_files):
    path = libero_files.write(lengths=(5, 5))
    for split in ("train", "held_out"):
        with pytest.raises(
            ValueError, match="/data: 2 demonstrations leave none to train on with held_out_per_task=2"
        ):
            LiberoDataset(path, chunk_size=3, split=split, held_out_per_task=2)


def test_instructions_select_tasks(libero_files):
    libero_files.write()
    libero_files.write("libero_object/b.hdf5", lengths=(5,), instruction="open the drawer")
    dataset = LiberoDataset(libero_files.folder, chunk_size=3, instructions=["open the drawer"])
    assert (len(dataset), dataset.instructions) == (4, ["open the drawer"])
    with pytest.raises(ValueError, match="no task has the instruction 'fly', found "):
        LiberoDataset(libero_files.folder, chunk_size=3, instructions=["fly"])


def test_camera_selection_and_resizing(libero_files):
    dataset = LiberoDataset(libero_files.write(), chunk_size=3, cameras=("eye_in_hand_rgb",), image_size=4)
    (image,) = dataset[0]["images"]
    assert image.shape == (4, 4, 3)
    np.testing.assert_array_equal(image[0, 0], [40, 150, 60])
    np.testing.assert_array_equal(image[-1, -1], [0, 0, 0])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_same_items(libero_files, context):
    dataset = LiberoDataset(libero_files.write(kind="recorded_jpeg"), chunk_size=3)
    dataset[0]  # a handle is open when the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
    items = list(loader)
    assert len(items) == len(dataset)
    for index, item in enumerate(items):
        assert_same_item(item, dataset[index])


@pytest.mark.parametrize("kind", ["released", "recorded_jpeg"])
def test_few_datasets_stay_open_and_each_is_opened_once(libero_files, monkeypatch, kind):
    dataset = LiberoDataset(libero_files.write(kind=kind), chunk_size=3)
    expected = list(dataset)
    opened = []
    original = h5py.Group.__getitem__
    monkeypatch.setattr(h5py.Group, "__getitem__", lambda self, key: (opened.append(key), original(self, key))[1])
    again = pickle.loads(pickle.dumps(dataset))
    for _ in range(2):
        for index in np.random.default_rng(0).permutation(len(again)):
            assert_same_item(again[int(index)], expected[index])
    assert len(opened) == len(set(opened)) == 3 * 2, "cameras of demonstrations"
    monkeypatch.setattr(libero_dataset, "_OPEN_FRAMES", 2)
    again = pickle.loads(pickle.dumps(dataset))
    for index in (0, len(again) - 1, 0, 1):
        assert_same_item(again[index], expected[index])
        assert len(again._frames) == 2


def test_what_is_done_to_an_item_does_not_reach_the_next(libero_files):
    dataset = LiberoDataset(libero_files.write(), chunk_size=3)
    before = dataset[1]
    for value in (dataset[1]["state"], dataset[1]["actions"], *dataset[1]["images"]):
        value[:] = 9
    assert_same_item(dataset[1], before)


def test_pickles_carry_no_handles(libero_files):
    dataset = LiberoDataset(libero_files.write(), chunk_size=3)
    before = dataset[3]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._handles == copy._frames == {}
    assert_same_item(copy[3], before)


def test_construction_reads_no_frames(libero_files, monkeypatch):
    path = libero_files.write()
    read = []
    original = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda self, key: (read.append((self.name, key)), original(self, key))[1]
    )
    dataset = LiberoDataset(path, chunk_size=3)
    assert read
    assert not [name for name, _ in read if name.endswith("_rgb")]
    read.clear()
    dataset[1]
    assert [(name.rpartition("/")[2], key) for name, key in read] == [("agentview_rgb", 1), ("eye_in_hand_rgb", 1)]
    read.clear()
    assert len(list(dataset.action_chunks())) == len(dataset)
    assert not read


def test_a_file_that_changed_since_construction_is_refused(libero_files):
    dataset = LiberoDataset(libero_files.write(), chunk_size=3)
    libero_files.write(lengths=(9, 9, 9))
    with pytest.raises(LiberoFormatError, match=r"demo\.hdf5: changed since the dataset was constructed"):
        dataset[0]


def test_a_file_that_is_gone_since_construction_is_missing_and_not_damaged(libero_files):
    path = libero_files.write()
    dataset = LiberoDataset(path, chunk_size=3)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"milk_demo\.hdf5: no such file"):
        dataset[0]


def test_a_defect_of_ours_is_not_blamed_on_the_file(libero_files, monkeypatch):
    dataset = LiberoDataset(libero_files.write(), chunk_size=3)
    monkeypatch.setattr(dataset, "_stamps", {})
    with pytest.raises(KeyError, match="milk_demo"):
        dataset[0]


def test_fingerprint_covers_contents_and_not_names(libero_files, tmp_path):
    path = libero_files.write(kind="recorded")
    fingerprint = LiberoDataset(path, chunk_size=3).fingerprint
    assert len(fingerprint) == 64
    shutil.copy(path, tmp_path / "renamed.hdf5")
    combined = combine(path, tmp_path / "combined.hdf5")
    assert LiberoDataset(tmp_path / "renamed.hdf5", chunk_size=5).fingerprint == fingerprint
    assert LiberoDataset(combined, chunk_size=3).fingerprint == fingerprint
    changes = [
        lambda data: data["demo_1/actions"].__setitem__((0, 0), 0.123),
        lambda data: data["demo_2/obs/gripper_states"].__setitem__((3, 1), 0.01),
        lambda data: data.attrs.__setitem__("problem_info", json.dumps({"language_instruction": "other"})),
    ]
    for change in changes:
        with h5py.File(shutil.copy(path, tmp_path / "changed.hdf5"), "a") as file:
            change(file["data"])
        assert LiberoDataset(tmp_path / "changed.hdf5", chunk_size=3).fingerprint != fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "'chunk_size' must be a positive integer, found 0"),
        ({"chunk_size": 2.0}, "'chunk_size' must be a positive integer, found 2.0"),
        ({"image_size": -1}, "'image_size' must be a positive integer, found -1"),
        ({"image_origin": "up"}, "'image_origin' must be one of .*, found 'up'"),
        ({"observation": "now"}, "'observation' must be one of .*, found 'now'"),
        ({"split": "test"}, "'split' must be one of .*, found 'test'"),
        ({"split": "train", "held_out_per_task": 0}, "'held_out_per_task' must be a positive integer, found 0"),
        ({"short_demonstrations": "drop"}, "'short_demonstrations' must be one of .*, found 'drop'"),
        ({"cameras": "agentview_rgb"}, "'cameras' must be a non-empty sequence of names"),
        ({"cameras": ()}, "'cameras' must be a non-empty sequence of names"),
        ({"instructions": "pick up the milk"}, "'instructions' must be a sequence of strings"),
        ({"instructions": []}, "'instructions' is empty"),
    ],
)
def test_arguments_are_checked(libero_files, options, message):
    with pytest.raises(ValueError, match=message):
        LiberoDataset(libero_files.write(), **{"chunk_size": 3, **options})
