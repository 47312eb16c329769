"""How pictures were rendered: what files say of it, and what a data set of several makes of that."""

import json

import h5py
import pytest

from hf_aegis.assets import DEMONSTRATIONS
from hf_aegis.data import LiberoDataset, LiberoFormatError, PictureSettings


RECORDED = {"image_size": 8, "supersampling": 3, "rendering": "fast"}


def say(path, settings):
    with h5py.File(path, "r+") as file:
        file["data"].attrs["hf_aegis_recording"] = json.dumps({"settings": settings, "attempts": 3})
    return path


def pictures(*paths, **options):
    return LiberoDataset(paths, chunk_size=4, **options).pictures


def test_the_shipped_demonstrations_say_it():
    dataset = LiberoDataset(DEMONSTRATIONS, short_demonstrations="pad")
    assert dataset.pictures == PictureSettings(64, supersampling=3, rendering="fast")
    assert dataset.state_features == ("joint_states", "gripper_states")


def test_released_files_hold_liberos_own_pictures_and_others_say_nothing(libero_files):
    assert pictures(libero_files.write(kind="released")) == PictureSettings(8, 1, "standard")
    silent = libero_files.write(kind="recorded")
    assert pictures(silent) is None
    assert pictures(say(silent, {"image_size": 8})) is None
    assert pictures(say(silent, RECORDED | {"seed": 3})) == PictureSettings(**RECORDED)


def test_files_that_differ_and_resized_images_are_like_none(libero_files):
    one = say(libero_files.write("libero_object/a_demo.hdf5", kind="recorded_jpeg"), RECORDED)
    other = say(libero_files.write("libero_object/b_demo.hdf5", kind="recorded"), RECORDED)
    assert pictures(one, other) == PictureSettings(**RECORDED)
    say(other, RECORDED | {"rendering": "standard"})
    assert pictures(one, other) is None
    assert pictures(one, image_size=8) == PictureSettings(**RECORDED)
    assert pictures(one, image_size=4) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RECORDED | {"rendering": "slow"}, "'rendering' must be one of"),
        (RECORDED | {"supersampling": 0}, "'supersampling' must be a positive integer, found 0"),
        ([], "expected the key 'settings' with an object, found"),
    ],
)
def test_what_cannot_be_read_is_named(libero_files, settings, message):
    path = say(libero_files.write(kind="recorded"), settings)
    with pytest.raises(LiberoFormatError, match=rf"milk_demo.hdf5: /data@hf_aegis_recording: .*{message}"):
        pictures(path)


def test_settings_as_json():
    settings = PictureSettings(64, 3, "fast")
    assert PictureSettings.from_dict(settings.to_dict()) == settings
    assert str(settings) == "image_size 64, supersampling 3, rendering fast"
    with pytest.raises(ValueError, match=r"expected the keys .*, found \['image_size'\]"):
        PictureSettings.from_dict({"image_size": 64})
