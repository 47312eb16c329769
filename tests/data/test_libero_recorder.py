"""The recorder: with a stand-in for the simulator (resuming, format), and once with the real one (replay)."""

import io
import json

import h5py
import numpy as np
import pytest
from PIL import Image

from hf_aegis.data import libero_recorder
from hf_aegis.data.libero_format import LiberoConvention, LiberoFormatError
from hf_aegis.data.libero_recorder import RecordingConfig, RecordingError, record
from hf_aegis.data.libero_writer import Episode, replacing_hdf5, write_episode


SIZE = 16
WIDTHS = {"joint_states": 7, "gripper_states": 2, "ee_pos": 3, "ee_ori": 3, "ee_states": 6, "robot_states": 9}


def synthetic_episode(number, length=5):
    generator = np.random.default_rng(number)
    ramp = np.linspace(0, 255, SIZE)
    frame = np.stack([np.broadcast_to(ramp[:, None], (SIZE, SIZE))] * 3, axis=-1).astype(np.uint8)
    return Episode(
        actions=generator.uniform(-1, 1, (length, 7)),
        states=generator.normal(size=(length, 11)),
        success=np.arange(length) == length - 1,
        proprioception={name: generator.normal(size=(length, width)) for name, width in WIDTHS.items()},
        images=dict.fromkeys(("agentview_rgb", "eye_in_hand_rgb"), np.stack([frame] * length)),
        reset_seed=number,
    )


class FakeSimulator:
    """Every third attempt fails; attempts listed in `interrupt` end the process."""

    tried: list[int]
    interrupt: set[int]

    def __init__(self, task, config):
        self.task = task

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def attempt(self, number):
        if number in self.interrupt:
            raise KeyboardInterrupt
        self.tried.append(number)
        return None if number % 3 == 2 else synthetic_episode(number)

    def attributes(self):
        return {
            "env_name": "Libero_Floor_Manipulation",
            "problem_info": {"language_instruction": self.task.language},
            "macros_image_convention": "opencv",
            "bddl_file_name": f"{self.task.suite}/{self.task.name}.bddl",
            "env_args": {},
        }


@pytest.fixture
def simulator(monkeypatch):
    pytest.importorskip("libero")
    FakeSimulator.tried, FakeSimulator.interrupt = [], set()
    monkeypatch.setattr(libero_recorder, "_Simulator", FakeSimulator)
    return FakeSimulator


def config(folder, **options):
    return RecordingConfig(
        **{"output_dir": str(folder), "tasks": ["libero_object/7"], "num_demonstrations": 4, "image_size": SIZE}
        | options
    )


def contents(path):
    with h5py.File(path) as file:
        found = {"@": dict(file["data"].attrs)}
        file["data"].visititems(
            lambda name, item: found.update({name: item[:].tolist() if isinstance(item, h5py.Dataset) else None})
        )
    return found


def test_failed_attempts_are_counted_and_thrown_away(simulator, tmp_path):
    (summary,) = record(config(tmp_path))
    assert (summary.demonstrations, summary.attempts) == (4, 5)
    assert summary.steps == 20
    with h5py.File(summary.file) as file:
        seeds = [int(file["data"][f"demo_{index}"].attrs["reset_seed"]) for index in range(4)]
    assert seeds == [0, 1, 3, 4]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interrupted_recording_goes_on_and_ends_the_same(simulator, tmp_path, at):
    (whole,) = record(config(tmp_path / "whole"))
    simulator.tried.clear()
    simulator.interrupt = {at}
    with pytest.raises(KeyboardInterrupt):
        record(config(tmp_path / "parts"))
    assert not list((tmp_path / "parts").rglob("*.hdf5")), "a half-recorded task must not be visible"
    simulator.interrupt = set()
    (resumed,) = record(config(tmp_path / "parts"))
    assert simulator.tried == [0, 1, 2, 3, 4], "no episode is recorded twice"
    assert json.dumps(contents(whole.file), default=repr) == json.dumps(contents(resumed.file), default=repr)
    assert [path.name for path in (tmp_path / "parts" / "libero_object").iterdir()] == [f"{whole.task}_demo.hdf5"]


def test_a_finished_recording_is_left_alone_and_a_larger_one_extends_it(simulator, tmp_path):
    record(config(tmp_path, num_demonstrations=2))
    simulator.tried.clear()
    record(config(tmp_path, num_demonstrations=2))
    assert simulator.tried == []
    (summary,) = record(config(tmp_path))
    assert simulator.tried == [2, 3, 4]
    (whole,) = record(config(tmp_path / "whole"))
    assert json.dumps(contents(whole.file), default=repr) == json.dumps(contents(summary.file), default=repr)


def test_a_recording_with_other_settings_is_refused(simulator, tmp_path):
    record(config(tmp_path, num_demonstrations=1))
    with pytest.raises(LiberoFormatError, match="choose another output_dir"):
        record(config(tmp_path, num_demonstrations=2, seed=1))


def test_an_expert_that_fails_too_often_is_an_error(simulator, tmp_path):
    with pytest.raises(RecordingError, match="3 of 4 episodes succeeded, 4 were asked for"):
        record(config(tmp_path, max_attempts=4))


def test_a_file_that_took_more_attempts_than_are_allowed_is_an_error(simulator, tmp_path, monkeypatch):
    monkeypatch.setattr(simulator, "attempt", lambda self, number: synthetic_episode(number) if number > 5 else None)
    record(config(tmp_path, num_demonstrations=1, max_attempts=9))
    with pytest.raises(RecordingError, match="1 of 7 episodes succeeded, 2 were asked for"):
        record(config(tmp_path, num_demonstrations=2, max_attempts=3))


def test_more_demonstrations_than_asked_for_are_refused_before_anything_is_recorded(simulator, tmp_path):
    record(config(tmp_path, num_demonstrations=2))
    simulator.tried.clear()
    with pytest.raises(LiberoFormatError, match="2 demonstrations are there and 1 were asked for"):
        record(config(tmp_path, tasks=["libero_object/1", "libero_object/7"], num_demonstrations=1))
    assert simulator.tried == []


@pytest.mark.parametrize("num_demonstrations", [2, 3])
def test_one_file_holds_demonstrations_of_one_simulator(simulator, tmp_path, monkeypatch, num_demonstrations):
    record(config(tmp_path, num_demonstrations=2))
    installed = libero_recorder._versions()
    monkeypatch.setattr(libero_recorder, "_versions", lambda: installed | {"mujoco": "9.9"})
    with pytest.raises(LiberoFormatError, match=rf"mujoco {installed['mujoco']}, installed is 9\.9"):
        record(config(tmp_path, num_demonstrations=num_demonstrations))


def test_episodes_of_another_simulator_are_recorded_anew(simulator, tmp_path, monkeypatch):
    simulator.interrupt = {2}
    with pytest.raises(KeyboardInterrupt):
        record(config(tmp_path))
    installed = libero_recorder._versions()
    monkeypatch.setattr(libero_recorder, "_versions", lambda: installed | {"mujoco": "9.9"})
    simulator.interrupt = set()
    simulator.tried.clear()
    record(config(tmp_path))
    assert simulator.tried == [0, 1, 2, 3, 4]


def test_a_combined_file_is_checked_before_anything_is_recorded(simulator, tmp_path):
    (tmp_path / "text").write_text("no folder")
    task = tmp_path / "libero_object" / "pick_up_the_milk_and_place_it_in_the_basket_demo.hdf5"
    for place, error in (("text/all.hdf5", OSError), (".", IsADirectoryError), (task, ValueError)):
        with pytest.raises(error):
            record(config(tmp_path, combined_file=str(tmp_path / place)))
    assert simulator.tried == []
    record(config(tmp_path, combined_file=str(tmp_path / "new" / "folder" / "all.hdf5")))
    assert (tmp_path / "new" / "folder" / "all.hdf5").exists()


def test_one_combined_file_holds_all_tasks(simulator, tmp_path):
    combined = tmp_path / "all.hdf5"
    summaries = record(
        config(
            tmp_path / "tasks",
            tasks=[
                "libero_object/0",
                "libero_spatial/pick_up_the_black_bowl_next_to_the_plate_and_place_it_on_the_plate",
            ],
            num_demonstrations=1,
            combined_file=str(combined),
        )
    )
    with h5py.File(combined) as file:
        assert {f"{suite}/{task}" for suite in file for task in file[suite]} == {
            f"{summary.suite}/{summary.task}" for summary in summaries
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["libero_object/99"]}, "no task 99"),
        ({"tasks": ["libero_nothing"]}, "Unknown LIBERO suite"),
        ({"tasks": ["libero_object", "libero_object/3"]}, "named twice"),
        ({"tasks": []}, "tasks is empty"),
        ({"num_demonstrations": 0}, "num_demonstrations must be at least 1"),
        ({"frames": "png"}, "frames must be one of raw, jpeg"),
        ({"jpeg_quality": 100}, "jpeg_quality must be from 1 to 95"),
        ({"max_attempts": 1}, "smaller than num_demonstrations"),
    ],
)
def test_wrong_recipes_are_refused(simulator, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        record(config(tmp_path, **options))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.hdf5"
    with replacing_hdf5(path) as file:
        file["kept"] = 1

    def write_half():
        with replacing_hdf5(path) as file:
            file["lost"] = 2
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_half()
    with h5py.File(path) as file:
        assert list(file) == ["kept"]
    assert list(tmp_path.iterdir()) == [path]


def test_jpeg_streams_decode_to_the_frames(tmp_path):
    episode = synthetic_episode(0)
    convention = LiberoConvention("before_action", "top_left", "jpeg", SIZE)
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        write_episode(file.create_group("demo"), episode, convention, jpeg_quality=95, store_states=False)
        assert "states" not in file["demo"]
        assert np.array_equal(file["demo"].attrs["init_state"], episode.states[0])
        stream = file["demo/obs/agentview_rgb_jpeg"][2]
    decoded = np.asarray(Image.open(io.BytesIO(stream.tobytes())))
    assert np.abs(decoded.astype(int) - episode.images["agentview_rgb"][2]).max() <= 6


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """One real demonstration, and the simulator of its task."""
    pytest.importorskip("libero")
    from hf_aegis.simulation import LiberoEnvironment, find_task

    folder = tmp_path_factory.mktemp("recording")
    (summary,) = record(config(folder, tasks=["libero_object/6"], num_demonstrations=1))
    with LiberoEnvironment(find_task("libero_object", 6), image_size=SIZE) as environment:
        yield summary, environment


@pytest.mark.simulator
def test_a_real_demonstration_has_liberos_layout(recording):
    summary, environment = recording
    assert summary.file.endswith("libero_object/pick_up_the_butter_and_place_it_in_the_basket_demo.hdf5")
    with h5py.File(summary.file) as file:
        data, demo = file["data"], file["data/demo_0"]
        assert {
            "env_name", "problem_info", "macros_image_convention", "bddl_file_name", "env_args", "num_demos", "total",
            "hf_aegis_convention",
        } <= set(data.attrs)  # fmt: skip
        instruction = json.loads(data.attrs["problem_info"])["language_instruction"]
        assert instruction == "pick up the butter and place it in the basket"
        convention = json.loads(data.attrs["hf_aegis_convention"])
        assert convention["observation"] == "before_action"
        assert convention["image_origin"] == "top_left"
        assert "/site-packages/" not in json.dumps(dict(data.attrs), default=str)
        length = demo.attrs["num_samples"]
        assert data.attrs["total"] == length
        shapes = {name: item.shape for name, item in demo.items() if isinstance(item, h5py.Dataset)}
        shapes |= {name: item.shape for name, item in demo["obs"].items()}
        assert shapes == {
            "actions": (length, 7), "states": (length, len(environment.state)), "robot_states": (length, 9),
            "rewards": (length,), "dones": (length,),
            "agentview_rgb": (length, SIZE, SIZE, 3), "eye_in_hand_rgb": (length, SIZE, SIZE, 3),
            "joint_states": (length, 7), "gripper_states": (length, 2), "ee_states": (length, 6),
            "ee_pos": (length, 3), "ee_ori": (length, 3),
        }  # fmt: skip
        actions = demo["actions"][:]
        assert actions.dtype == np.float64
        assert np.abs(actions).max() <= 1
        assert set(actions[:, 6]) == {-1.0, 1.0}
        assert demo["rewards"][-1] == demo["dones"][-1] == 1
        assert demo["dones"][:].sum() == 1
        assert 60 < length < 150


@pytest.mark.simulator
def test_replaying_a_demonstration_reproduces_it(recording):
    summary, environment = recording
    with h5py.File(summary.file) as file:
        demo = file["data/demo_0"]
        environment.restore(demo.attrs["init_state"], seed=int(demo.attrs["reset_seed"]))
        assert not environment.check_success()
        for step, action in enumerate(demo["actions"][:]):
            # Everything in row `step` is what was seen before the action of that row.
            assert np.allclose(environment.state, demo["states"][step], atol=1e-9), step
            if step % 20 == 0:
                for name, value in environment.proprioception().items():
                    stored = demo["robot_states" if name == "robot_states" else f"obs/{name}"][step]
                    assert np.allclose(value, stored, atol=1e-9), (step, name)
            if step in (0, 40):
                for name, image in environment.images().items():
                    assert np.abs(image.astype(int) - demo[f"obs/{name}"][step]).max() <= 1, (step, name)
            success = environment.step(action)
            assert success == bool(demo["rewards"][step])
        assert success


@pytest.mark.simulator
def test_the_same_start_and_actions_give_the_same_episode_and_another_seed_another_start(recording):
    _, environment = recording
    starts = []
    for seed in (3, 3, 4):
        environment.reset(seed=seed)
        starts.append(environment.state)
    assert np.array_equal(starts[0], starts[1])
    assert np.abs(starts[0] - starts[2]).max() > 1e-3


@pytest.mark.simulator
def test_images_are_upright(recording):
    _, environment = recording
    environment.reset(0)
    # The hand hangs at the lower edge of its own camera's picture, and it is dark; above it is the sunlit floor.
    hand = environment.images()["eye_in_hand_rgb"].mean(axis=(1, 2))
    assert hand[-2:].mean() < 0.6 * hand[: SIZE // 2].mean()


@pytest.mark.simulator
def test_bad_actions_states_and_names_are_refused(recording):
    _, environment = recording
    with pytest.raises(ValueError, match="7 finite numbers"):
        environment.step(np.full(7, np.nan))
    with pytest.raises(ValueError, match="initial states 0 to 49, not 50"):
        environment.reset(50)
    with pytest.raises(ValueError, match="has shape"):
        environment.restore(np.zeros(3))
    with pytest.raises(ValueError, match="has no object 'cup'"):
        environment.bounds("cup")
