"""Combining files: verbatim groups, one place per task, all or nothing."""

import h5py
import numpy as np
import pytest

from hf_aegis.data import LiberoDataset, LiberoFormatError, combine


def assert_same_tree(left, right):
    assert dict(left.attrs).keys() == dict(right.attrs).keys()
    for key in left.attrs:
        np.testing.assert_array_equal(left.attrs[key], right.attrs[key])
    if isinstance(left, h5py.Dataset):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        for one, other in zip(left[()], right[()], strict=True):
            np.testing.assert_array_equal(one, other)
        return
    assert list(left) == list(right)
    for name in left:
        assert_same_tree(left[name], right[name])


def test_groups_are_copied_verbatim_by_suite_and_task(libero_files, tmp_path):
    sources = {
        "libero_object/pick_up_the_milk": libero_files.write(),
        "libero_spatial/pick_up_the_bowl": libero_files.write(
            "libero_spatial/pick_up_the_bowl_demo.hdf5", kind="recorded_jpeg", instruction="pick up the bowl"
        ),
    }
    combined = combine(list(sources.values()), tmp_path / "all.hdf5")
    with h5py.File(combined) as file:
        assert {f"{suite}/{task}" for suite in file for task in file[suite]} == set(sources)
        for place, source in sources.items():
            with h5py.File(source) as original:
                assert_same_tree(original["data"], file[f"{place}/data"])


def test_a_combined_file_reads_as_its_parts(libero_files, tmp_path):
    parts = [
        libero_files.write("libero_object/a.hdf5", kind="recorded", instruction="a", seed=1),
        libero_files.write("libero_object/b.hdf5", kind="recorded_jpeg", instruction="b", seed=9),
    ]
    combined = LiberoDataset(combine(parts, tmp_path / "all.hdf5"), chunk_size=3)
    separate = LiberoDataset(parts, chunk_size=3)
    assert combined.instructions == ["a", "b"]
    assert (len(combined), combined.fingerprint, combined.statistics) == (
        len(separate),
        separate.fingerprint,
        separate.statistics,
    )
    for index in range(0, len(combined), 5):
        np.testing.assert_array_equal(combined[index]["images"], separate[index]["images"])
        np.testing.assert_array_equal(combined[index]["actions"], separate[index]["actions"])


def test_combined_files_combine_again(libero_files, tmp_path):
    first = combine(libero_files.write("libero_object/a.hdf5"), tmp_path / "first.hdf5")
    both = combine([first, libero_files.write("libero_goal/b.hdf5")], tmp_path / "both.hdf5")
    with h5py.File(both) as file:
        assert (list(file), list(file["libero_object"])) == (["libero_goal", "libero_object"], ["a"])


def test_the_suite_comes_from_the_problem_file_then_the_folder_then_the_user(libero_files, tmp_path):
    path = libero_files.write("somewhere/task_demo.hdf5")
    with h5py.File(path, "a") as file:
        file["data"].attrs["bddl_file_name"] = "chiliocosm/bddl_files/libero_90/task.bddl"
    with h5py.File(combine(path, tmp_path / "1.hdf5")) as file:
        assert list(file) == ["libero_90"]
    with h5py.File(path, "a") as file:
        del file["data"].attrs["bddl_file_name"]
    with pytest.raises(ValueError, match=r"task_demo\.hdf5: /data: its suite cannot be told, pass suite="):
        combine(path, tmp_path / "2.hdf5")
    with h5py.File(combine(path, tmp_path / "2.hdf5", suite="mine")) as file:
        assert list(file["mine"]) == ["task"]


def test_the_same_task_twice_is_refused_naming_both(libero_files, tmp_path):
    one = libero_files.write("libero_object/a.hdf5")
    two = libero_files.write("more/libero_object/a_demo.hdf5")
    message = r"a_demo\.hdf5: /data: the task libero_object/a is there already, from .*libero_object/a\.hdf5: /data"
    with pytest.raises(ValueError, match=message):
        combine([one, two], tmp_path / "all.hdf5")


def test_an_existing_output_is_kept_unless_asked_otherwise(libero_files, tmp_path):
    output = tmp_path / "all.hdf5"
    output.write_text("precious")
    with pytest.raises(FileExistsError, match=r"all\.hdf5: exists already, pass overwrite=True"):
        combine(libero_files.write(), output)
    assert output.read_text() == "precious"
    combine(libero_files.write(), output, overwrite=True)
    assert len(LiberoDataset(output, chunk_size=3)) == 19


def test_the_output_is_complete_or_absent(libero_files, tmp_path):
    good, bad = libero_files.write("libero_object/a.hdf5"), libero_files.write("libero_object/b.hdf5")
    with h5py.File(bad, "a") as file:
        file["data/demo_2/actions"][0, 0] = np.nan
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(LiberoFormatError, match=r"b\.hdf5: /data/demo_2/actions: 1 values are NaN"):
        combine([good, bad], tmp_path / "all.hdf5")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_output_must_not_be_an_input(libero_files):
    path = libero_files.write()
    with pytest.raises(ValueError, match="the output is one of the inputs"):
        combine([path], path, overwrite=True)


@pytest.mark.parametrize("suite", ["", "a/b"])
def test_a_suite_is_a_plain_name(libero_files, tmp_path, suite):
    with pytest.raises(ValueError, match="'suite' must be a plain name"):
        combine(libero_files.write(), tmp_path / "all.hdf5", suite=suite)
