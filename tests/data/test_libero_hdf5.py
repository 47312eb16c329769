"""Every way a demonstration file can be wrong gives its own error, naming the file, the place, found and expected."""

import io
import json
import os
import re

import h5py
import numpy as np
import pytest
from PIL import Image

from hf_aegis.data import LiberoConvention, LiberoDataset, LiberoFormatError, inspect_file


def set_attribute(path, value):
    place, key = path.split("@")

    def change(data):
        if value is None:
            del data[place].attrs[key]
        else:
            data[place].attrs[key] = value

    return change


def replace(path, make):
    def change(data):
        old = data[path][()]
        del data[path]
        data[path] = make(old)

    return change


def poke(path, index, value):
    return lambda data: data[path].__setitem__(index, value)


def remove(path):
    return lambda data: data.__delitem__(path)


def declare(path, shape, dtype="f8", **options):
    """A dataset of which nothing is written."""

    def change(data):
        del data[path]
        data.create_dataset(path, shape, dtype, **{"chunks": tuple(min(side, 64) for side in shape), **options})

    return change


def convention(**changes):
    values = {"format_version": 1, "observation": "before_action", "image_origin": "top_left", "frames": "raw"}
    return json.dumps({**values, "image_size": 8, **changes})


CHANGES = {
    "actions missing": (remove("demo_1/actions"), r"/data/demo_1/actions: missing dataset, found \['dones', "),
    "joints missing": (remove("demo_1/obs/joint_states"), "/data/demo_1/obs/joint_states: missing dataset"),
    "camera missing": (remove("demo_1/obs/agentview_rgb"), "/data/demo_1/obs/agentview_rgb: missing dataset"),
    "obs missing": (remove("demo_1/obs"), "/data/demo_1/obs/joint_states: missing dataset"),
    "actions NaN": (
        poke("demo_1/actions", (3, 2), np.nan),
        "/data/demo_1/actions: 1 values are NaN or infinite in float32, first at step 3, column 2",
    ),
    "actions infinite": (poke("demo_2/actions", (0, 0), np.inf), "/data/demo_2/actions: 1 values are NaN or infinite"),
    "state NaN": (
        poke("demo_0/obs/gripper_states", (2, 1), np.nan),
        "/data/demo_0/obs/gripper_states: 1 values are NaN or infinite in float32, first at step 2, column 1",
    ),
    "actions beyond float32": (poke("demo_1/actions", (0, 0), 1e200), "/data/demo_1/actions: 1 values are NaN or inf"),
    "actions of an unknown type": (
        replace("demo_1/actions", lambda old: np.array([b"x"] * 7)),
        r"/data/demo_1/actions: expected floating point of shape \(T, 7\), found \|S1 of shape \(7,\)",
    ),
    "actions too wide": (
        replace("demo_1/actions", lambda old: np.zeros((7, 8))),
        r"/data/demo_1/actions: expected floating point of shape \(T, 7\), found float64 of shape \(7, 8\)",
    ),
    "actions integer": (
        replace("demo_1/actions", lambda old: old.astype(int)),
        r"/data/demo_1/actions: expected floating point of shape \(T, 7\), found int64 of shape \(7, 7\)",
    ),
    "actions scalar": (
        replace("demo_1/actions", lambda old: 1.0),
        r"demo_1/actions: expected floating point .* of shape \(\)",
    ),
    "frames float": (
        replace("demo_1/obs/agentview_rgb", lambda old: old / 255.0),
        r"/data/demo_1/obs/agentview_rgb: expected uint8 of shape \(T, s, s, 3\), found float64 of shape",
    ),
    "frames channels first": (
        replace("demo_1/obs/agentview_rgb", lambda old: old.transpose(0, 3, 1, 2)),
        r"agentview_rgb: expected uint8 of shape \(T, s, s, 3\), found uint8 of shape \(7, 3, 8, 8\)",
    ),
    "frames too few": (
        replace("demo_1/obs/eye_in_hand_rgb", lambda old: old[:-1]),
        r"/data/demo_1/obs/eye_in_hand_rgb: shape \(6, 8, 8, 3\), expected 7 rows as in /data/demo_1/actions",
    ),
    "rewards too many": (
        replace("demo_1/rewards", lambda old: np.zeros(8)),
        r"/data/demo_1/rewards: shape \(8,\), expected 7 rows",
    ),
    "num_samples wrong": (set_attribute("demo_1@num_samples", 8), "/data@total: says 22, the demonstrations make 23"),
    "num_samples missing": (set_attribute("demo_1@num_samples", None), "/data/demo_1@num_samples: missing attribute"),
    "num_samples text": (
        set_attribute("demo_1@num_samples", "7"),
        "/data/demo_1@num_samples: expected an integer, found '7'",
    ),
    "num_demos wrong": (set_attribute(".@num_demos", 4), "/data@num_demos: says 4, the demonstrations make 3"),
    "num_demos missing": (set_attribute(".@num_demos", None), "/data@num_demos: missing attribute, found "),
    "total missing": (set_attribute(".@total", None), "/data@total: missing attribute"),
    "instruction missing": (set_attribute(".@problem_info", None), "/data@problem_info: missing attribute"),
    "instruction not JSON": (
        set_attribute(".@problem_info", "{'language': 1}"),
        "/data@problem_info: its text: not JSON: .* found \"{'language': 1}\"",
    ),
    "instruction a list": (
        set_attribute(".@problem_info", "[1]"),
        r"/data@problem_info: its text: expected a JSON object, found list of 1",
    ),
    "instruction empty": (
        set_attribute(".@problem_info", '{"language_instruction": " "}'),
        "/data@problem_info: expected a non-empty 'language_instruction'",
    ),
    "problem_info a number": (
        set_attribute(".@problem_info", 3),
        "/data@problem_info: expected a string, found int64",
    ),
    "macro missing": (
        set_attribute(".@macros_image_convention", None),
        "/data: @macros_image_convention: missing attribute, .* pass image_origin=",
    ),
    "macro unknown": (
        set_attribute(".@macros_image_convention", "vulkan"),
        r"/data: @macros_image_convention: expected one of \['opengl', 'opencv'\], found 'vulkan'",
    ),
    "convention newer": (
        set_attribute(".@hf_aegis_convention", convention(format_version=2)),
        "/data: @hf_aegis_convention: its text: key 'format_version' is 2 .* reads 1 to 1; a newer file needs",
    ),
    "convention unversioned": (
        set_attribute(".@hf_aegis_convention", "{}"),
        r"/data: @hf_aegis_convention: missing keys \['observation', 'image_origin', 'frames', 'image_size'\]",
    ),
    "convention not JSON": (
        set_attribute(".@hf_aegis_convention", "before"),
        "/data: @hf_aegis_convention: its text: not JSON",
    ),
    "convention incomplete": (
        set_attribute(".@hf_aegis_convention", '{"format_version": 1, "frames": "raw"}'),
        r"@hf_aegis_convention: missing keys \['observation', 'image_origin', 'image_size'\]",
    ),
    "convention unknown origin": (
        set_attribute(".@hf_aegis_convention", convention(image_origin="left")),
        r"@hf_aegis_convention: 'image_origin' must be one of .*, found 'left'",
    ),
    "convention other size": (
        set_attribute(".@hf_aegis_convention", convention(image_size=16)),
        r"agentview_rgb: expected uint8 of shape \(T, 16, 16, 3\), found uint8 of shape \(6, 8, 8, 3\)",
    ),
    "convention jpeg on raw": (
        set_attribute(".@hf_aegis_convention", convention(frames="jpeg")),
        r"/data/demo_0/obs/agentview_rgb_jpeg: missing dataset, found .*'obs/agentview_rgb'",
    ),
    "stray entry": (lambda data: data.create_group("demo1"), "/data/demo1: unexpected entry, expected groups called"),
    "demonstration a dataset": (
        lambda data: data.__setitem__("demo_3", [1.0]),
        "/data/demo_3: expected a group",
    ),
    "soft link": (
        lambda data: data["demo_0"].__setitem__("copy", h5py.SoftLink("/data/demo_1/actions")),
        r"/data/demo_0/copy: a soft link \(to /data/demo_1/actions\), links are refused",
    ),
    "external link": (
        lambda data: data["demo_0/obs"].__setitem__("secret", h5py.ExternalLink("other.hdf5", "/x")),
        r"/data/demo_0/obs/secret: an external link \(to other.hdf5:/x\), links are refused",
    ),
    "group within itself": (
        lambda data: data["demo_0/obs"].__setitem__("again", data["demo_0/obs"]),
        "/data/demo_0/obs: a group with 2 names, of which one may lead into another, which is refused",
    ),
    "actions of a size that is not there": (
        declare("demo_1/actions", (2**40, 7)),
        rf"/data/demo_1/actions: says it has {2**40 * 7 * 8} bytes, of which the file holds 0",
    ),
    "frames of a size that is not there": (
        declare("demo_1/obs/agentview_rgb", (7, 2**13, 2**13, 3), "u1"),
        "/data/demo_1/obs/agentview_rgb: frames of 8192 pixels, expected at most 4096",
    ),
    "frames in one huge chunk": (
        declare("demo_1/obs/agentview_rgb", (7, 8, 8, 3), "u1", chunks=(2**22, 8, 8, 3), maxshape=(None, 8, 8, 3)),
        f"/data/demo_1/obs/agentview_rgb: is stored in chunks of {2**22 * 8 * 8 * 3} bytes, expected at most",
    ),
    "states of nothing": (
        lambda data: (data.__delitem__("demo_1/states"), data.create_dataset("demo_1/states", data=h5py.Empty("f8"))),
        "/data/demo_1/states: shape None, expected 7 rows",
    ),
    "num_demos an array": (
        set_attribute(".@num_demos", np.zeros(3, int)),
        r"/data@num_demos: expected a single value, found shape \(3,\)",
    ),
    "instruction no UTF-8": (
        set_attribute(".@problem_info", np.bytes_(b"\xff\xfe")),
        "/data@problem_info: expected a string in UTF-8",
    ),
    "linked demonstration": (
        lambda data: data.__setitem__("demo_3", h5py.ExternalLink("other.hdf5", "/data/demo_0")),
        "/data/demo_3: an external link",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_reader_refuses_and_an_inspection_finds(libero_files, change, message):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        change(file["data"])
    with pytest.raises(LiberoFormatError, match=message) as refused:
        LiberoDataset(path, chunk_size=3)
    assert str(refused.value).startswith(f"{path}: /data")
    problems = "\n".join(inspect_file(path).problems)
    assert re.search(message, problems), problems


def test_total_need_not_be_right_for_num_samples_to_be_checked(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        file["data/demo_1"].attrs["num_samples"] = 8
        file["data"].attrs["total"] = 23
    with pytest.raises(LiberoFormatError, match="/data/demo_1@num_samples: says 8, 7 actions found"):
        LiberoDataset(path, chunk_size=3)


@pytest.mark.parametrize("flavour", ["external", "virtual"])
def test_datasets_whose_data_lies_elsewhere_are_refused(libero_files, tmp_path, flavour):
    path = libero_files.write()
    (tmp_path / "secret.bin").write_bytes(np.zeros((6, 7)).tobytes())
    with h5py.File(path, "a") as file:
        del file["data/demo_0/actions"]
        if flavour == "external":
            external = [(str(tmp_path / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("data/demo_0/actions", (6, 7), "f8", external=external)
        else:
            layout = h5py.VirtualLayout((6, 7), "f8")
            layout[:] = h5py.VirtualSource("other.hdf5", "x", (6, 7))
            file.create_virtual_dataset("data/demo_0/actions", layout)
    with pytest.raises(LiberoFormatError, match="/data/demo_0/actions: its data lies in other files"):
        LiberoDataset(path, chunk_size=3)


def test_many_names_of_one_group_are_not_followed(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        for name in range(300):
            file[f"again_{name}"] = file["/"]
    # Followed three levels deep, they are 27 million groups.
    report = inspect_file(path)
    assert len(report.problems) == 300
    assert report.problems[0].startswith("/again_0: a group with 301 names")
    assert [summary.task.instruction for summary in report.tasks] == ["pick up the milk"]


def test_pictures_are_not_looked_for_behind_links(libero_files):
    from hf_aegis.data.libero_pictures import pictures_of

    path = libero_files.write()
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs/agentview_rgb"] = h5py.ExternalLink("other.hdf5", "/x")
    with pytest.raises(LiberoFormatError, match=r"/data/demo_0/obs/agentview_rgb: an external link"):
        pictures_of(path)


def test_links_at_the_root_are_refused(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        file["more"] = h5py.ExternalLink("other.hdf5", "/data")
    with pytest.raises(LiberoFormatError, match="/more: an external link"):
        LiberoDataset(path, chunk_size=3)


def test_missing_empty_foreign_and_truncated_files(libero_files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.hdf5: no such file"):
        LiberoDataset(tmp_path / "nowhere.hdf5")
    (tmp_path / "empty.hdf5").touch()
    with pytest.raises(LiberoFormatError, match=r"empty\.hdf5: empty file \(0 bytes\), expected HDF5"):
        LiberoDataset(tmp_path / "empty.hdf5")
    (tmp_path / "text.hdf5").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(LiberoFormatError, match=r"text\.hdf5: not an HDF5 file \(42 bytes without"):
        LiberoDataset(tmp_path / "text.hdf5")
    path = libero_files.write()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(LiberoFormatError, match=r"demo\.hdf5: HDF5 cannot open it, it may be truncated: .*truncated"):
        LiberoDataset(path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing: no \*\.hdf5 file in this folder"):
        LiberoDataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no demonstration files given"):
        LiberoDataset([])


def test_a_file_given_twice_is_refused(libero_files):
    path = libero_files.write()
    with pytest.raises(ValueError, match=r"demo\.hdf5: given twice"):
        LiberoDataset([path, path], chunk_size=3)


def test_a_file_without_demonstrations(libero_files):
    path = libero_files.write(lengths=())
    with pytest.raises(LiberoFormatError, match="/data: no demonstrations, expected groups called demo_<number>"):
        LiberoDataset(path)
    with h5py.File(path, "w") as file:
        file.create_group("mask")
    with pytest.raises(LiberoFormatError, match=r"/: no 'data' group here or at .*/data, found \['mask'\]"):
        LiberoDataset(path)


def test_demonstrations_without_a_pair_of_observation_and_action(libero_files):
    with pytest.raises(LiberoFormatError, match="/data/demo_1: too short: 0 steps, expected at least 2"):
        LiberoDataset(libero_files.write(lengths=(5, 0)), chunk_size=3)
    with pytest.raises(LiberoFormatError, match=r"/data/demo_1: too short: 1 steps, .* \(its observations follow"):
        LiberoDataset(libero_files.write(lengths=(5, 1)), chunk_size=3)
    recorded = libero_files.write(lengths=(5, 1), kind="recorded")
    assert len(LiberoDataset(recorded, chunk_size=3, short_demonstrations="pad")) == 6


def test_demonstrations_shorter_than_a_chunk_are_an_error_with_a_remedy(libero_files):
    path = libero_files.write(lengths=(9, 4, 3), kind="recorded")
    message = (
        r"/data/demo_1: 4 actions are fewer than chunk_size=5 \(so for 2 of 3 demonstrations, the shortest has 3\): "
        r"pass short_demonstrations='pad' or a smaller chunk_size"
    )
    with pytest.raises(LiberoFormatError, match=message):
        LiberoDataset(path, chunk_size=5)
    assert len(LiberoDataset(path, chunk_size=5, short_demonstrations="pad")) == 16
    assert len(LiberoDataset(path, chunk_size=3)) == 16


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"", "undecodable JPEG of 0 bytes"),
        (b"not a JPEG", "undecodable JPEG of 10 bytes"),
        ("half", "undecodable JPEG of .* bytes: .*truncated"),
        ((16, "RGB"), "expected an RGB JPEG of 8x8 pixels, found RGB of 16x16"),
        ((8, "L"), "expected an RGB JPEG of 8x8 pixels, found L of 8x8"),
    ],
)
def test_bad_jpeg_streams_are_named(libero_files, stream, message):
    path = libero_files.write(kind="recorded_jpeg")
    with h5py.File(path, "a") as file:
        streams = file["data/demo_1/obs/eye_in_hand_rgb_jpeg"]
        if stream == "half":
            stream = streams[2].tobytes()[:-30]
        elif isinstance(stream, tuple):
            buffer = io.BytesIO()
            Image.new(stream[1], (stream[0], stream[0])).save(buffer, format="JPEG")
            stream = buffer.getvalue()
        streams[2] = np.frombuffer(stream, np.uint8)
    dataset = LiberoDataset(path, chunk_size=3)
    place = r"/data/demo_1/obs/eye_in_hand_rgb_jpeg\[2\]: "
    with pytest.raises(LiberoFormatError, match=place + message):
        dataset[6 + 2]
    (problem,) = inspect_file(path).problems
    assert re.match(place + message, problem)


def test_a_damaged_chunk_is_named_when_it_is_read(libero_files):
    path = libero_files.write(kind="recorded")
    with h5py.File(path, "a") as file:
        frames = file["data/demo_0/obs/agentview_rgb"][()]
        del file["data/demo_0/obs/agentview_rgb"]
        stored = file.create_dataset(
            "data/demo_0/obs/agentview_rgb", data=frames, chunks=(1, 8, 8, 3), compression="gzip"
        )
        stored.id.write_direct_chunk((4, 0, 0, 0), b"not a gzip stream")
    dataset = LiberoDataset(path, chunk_size=3)
    dataset[3]
    with pytest.raises(LiberoFormatError, match="/data/demo_0/obs/agentview_rgb: cannot be read, the file may be dam"):
        dataset[4]
    assert len(inspect_file(path).problems) == 1


@pytest.mark.parametrize("signature", [b"TREE", b"HEAP", b"SNOD", b"GCOL", b"\x89HDF"])
def test_damaged_structures_are_refused_by_name(libero_files, signature):
    """Wherever one of HDF5's own blocks is damaged, no exception of h5py escapes."""
    path = libero_files.write(lengths=(4,))
    sound = path.read_bytes()
    places = [match.start() for match in re.finditer(re.escape(signature), sound)]
    refused = 0
    for place in places:
        path.write_bytes(sound[:place] + b"\0\0\0\0" + sound[place + 4 :])
        found = inspect_file(path).problems
        try:
            LiberoDataset(path, chunk_size=3)[0]
        except LiberoFormatError:
            assert found
            refused += 1
    assert places
    assert refused >= len(places) // 2  # the rest damage what nobody reads, e.g. the block of `model_file`


def test_the_convention_attribute_round_trips():
    for stated in (
        LiberoConvention("before_action", "top_left", "jpeg", 64),
        LiberoConvention("after_action", "bottom_left", "raw", None),
    ):
        assert LiberoConvention.from_json(stated.to_json()) == stated
    with pytest.raises(ValueError, match="'image_size' is required where frames are stored as JPEG"):
        LiberoConvention("before_action", "top_left", "jpeg")
    with pytest.raises(ValueError, match="'image_size' must be an integer from 1 to 4096, found 0"):
        LiberoConvention("before_action", "top_left", "raw", 0)


@pytest.mark.parametrize("value", ['"put it there"', "put it there", ["put it", " there"], " put it there \n"])
def test_instructions_are_cleaned_as_libero_does(libero_files, value):
    path = libero_files.write(instruction=value)
    assert LiberoDataset(path, chunk_size=3).instructions == ["put it there"]


def test_attributes_stored_as_bytes_are_read(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        for key in ("problem_info", "macros_image_convention"):
            file["data"].attrs[key] = np.bytes_(file["data"].attrs[key])
    assert LiberoDataset(path, chunk_size=3).instructions == ["pick up the milk"]
