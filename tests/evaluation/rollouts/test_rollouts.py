"""Many episodes in processes: mishaps, batches, and that neither order nor number of environments matters."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_aegis.evaluation.rollouts.episode_file import EpisodeFile
from hf_aegis.evaluation.rollouts.episodes import EpisodeResult
from hf_aegis.evaluation.rollouts.libero import evaluate
from hf_aegis.evaluation.rollouts.rollouts import RolloutError, _take, run_rollouts
from hf_aegis.evaluation.rollouts.worker import WorkerSetup


@pytest.fixture
def fake():
    import fake_world

    return fake_world


def outcomes(results):
    return {result.key: (result.success, result.steps, result.error) for result in results}


def test_the_number_of_environments_changes_nothing(fake):
    episodes = fake.specs(3, "ahead") + fake.specs(2, "still", "stay") + fake.specs(1, "confused", "confuse")
    setup = WorkerSetup(fake.FakeWorld(step_seconds=0.002), cameras=("agentview_rgb",))
    alone, together = fake.Forwards(), fake.Forwards()
    expected = outcomes(run_rollouts(episodes, setup, alone, num_envs=1))
    assert outcomes(run_rollouts(episodes, setup, together, num_envs=3)) == expected
    assert set(alone.batches) == {1}
    assert sum(together.batches) == sum(alone.batches)
    assert all(success for (_, task, _), (success, _, _) in expected.items() if task == "ahead")
    assert expected["line", "still", 0] == (False, 40, None)
    assert expected["line", "confused", 0] == (False, 0, "policy: no number")


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        ("raise", r"ValueError: the simulation is unstable \(fake_world.py, line \d+\)"),
        ("kill", "the simulator's process ended with code -9"),
        ("hang", "the simulator gave no sign of life for 4 s"),
    ],
)
def test_a_mishap_is_one_crashed_episode(fake, mishap, message):
    setup = WorkerSetup(fake.FakeWorld({1: mishap}), local_policy=fake.go)
    episodes = [replace(spec, replan_steps=50) for spec in fake.specs(3)]
    results = {r.start: r for r in run_rollouts(episodes, setup, hang_seconds=4)}
    assert [results[start].outcome for start in range(3)] == ["success", "crash", "success"]
    assert results[1].steps == 0
    assert re.fullmatch(message, results[1].error)


def test_crashes_without_end_are_an_error(fake):
    setup = WorkerSetup(fake.FakeWorld({"open": "raise"}), local_policy=fake.go)
    results = []
    with pytest.raises(RolloutError, match=r"5 episodes crashed one after the other.*cannot be opened"):
        results.extend(run_rollouts(fake.specs(9), setup))


def test_what_is_not_installed_is_said_at_once(fake):
    setup = WorkerSetup(fake.FakeWorld({"open": "import"}), local_policy=fake.go)
    with pytest.raises(ImportError, match="the simulator is not installed"):
        list(run_rollouts(fake.specs(9), setup))


def test_wrong_arguments(fake):
    with pytest.raises(ValueError, match="num_envs and hang_seconds must be positive, found 0"):
        list(run_rollouts(fake.specs(1), WorkerSetup(fake.FakeWorld(), fake.go), num_envs=0))
    with pytest.raises(ValueError, match="there is no policy to answer"):
        list(run_rollouts(fake.specs(1), WorkerSetup(fake.FakeWorld())))


def test_a_worker_stays_with_its_task_and_leaves_others_theirs(fake):
    waiting = fake.specs(2, "a") + fake.specs(2, "b")
    assert _take(waiting, None, []).task == "a"
    assert _take(waiting, None, [("line", "a")]).task == "b"
    assert _take(waiting, ("line", "b"), [("line", "a")]).task == "b"
    # What is left is shared.
    assert _take(waiting, ("line", "b"), [("line", "a")]).task == "a"
    assert waiting == []


def test_an_interrupted_evaluation_is_finished_without_repeating(fake, tmp_path):
    episodes, path = fake.specs(6), tmp_path / "episodes.jsonl"
    log = tmp_path / "log"
    setup = WorkerSetup(fake.FakeWorld(log=str(log)), cameras=("agentview_rgb",))
    expected = outcomes(evaluate(episodes, replace(setup, world=fake.FakeWorld()), fake.Forwards()))
    with pytest.raises(KeyboardInterrupt), EpisodeFile(path, {"a": 1}) as file:
        evaluate(episodes, setup, fake.Forwards(fail_at=14), file)
    with EpisodeFile(path, {"a": 1}) as file:
        finished = {key[2] for key in file.results}
        assert 0 < len(finished) < 6
        results = evaluate(episodes, setup, fake.Forwards(), file, num_envs=2, line={"protocol": "own"})
    assert outcomes(results) == expected
    begun = [int(line.split()[1]) for line in log.read_text().splitlines()]
    # Only the one that was under way has been begun twice.
    assert sorted(begun) == sorted([*range(6), len(finished)])
    with EpisodeFile(path, {"a": 1}) as file:
        assert evaluate(episodes, setup, None, file) == results


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import fake_world as fake
from hf_aegis.evaluation.rollouts.episode_file import EpisodeFile
from hf_aegis.evaluation.rollouts.libero import evaluate
from hf_aegis.evaluation.rollouts.worker import WorkerSetup
if __name__ == "__main__":
    world = fake.FakeWorld({mishaps}, step_seconds=0.02, log={log!r})
    with EpisodeFile(Path({path!r}), {{}}) as file:
        evaluate(fake.specs(40), WorkerSetup(world, fake.go), file=file, num_envs=2)
"""


def test_a_killed_evaluation_leaves_no_process_and_is_finished_later(fake, tmp_path):
    path, log, script = tmp_path / "episodes.jsonl", tmp_path / "log", tmp_path / "killed.py"
    script.write_text(KILLED.format(here=str(Path(__file__).parent), log=str(log), path=str(path), mishaps={}))
    process = subprocess.Popen([sys.executable, str(script)])
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") > 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = {int(line.split()[2]) for line in log.read_text().splitlines()}
    assert len(workers) == 2
    wait_for(lambda: not any(running(pid) for pid in workers))
    before = path.read_bytes()
    with EpisodeFile(path, {}) as file:
        kept = dict(file.results)
        assert 3 <= len(kept) < 40
        results = evaluate(fake.specs(40), WorkerSetup(fake.FakeWorld(), fake.go), file=file)
    assert all(result.success for result in results)
    assert [result for result in results if result.key in kept] == [kept[r.key] for r in results if r.key in kept]
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert path.read_bytes().count(b"\n") == 41


def test_a_simulator_that_hangs_does_not_outlive_a_killed_evaluation(tmp_path):
    path, log, script = tmp_path / "episodes.jsonl", tmp_path / "log", tmp_path / "killed.py"
    mishaps = {0: "hang", 1: "hang"}
    script.write_text(KILLED.format(here=str(Path(__file__).parent), log=str(log), path=str(path), mishaps=mishaps))
    process = subprocess.Popen([sys.executable, str(script)])
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 2)
    # They hang after the third step, a fiftieth of a second each.
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = {int(line.split()[2]) for line in log.read_text().splitlines()}
    wait_for(lambda: not any(running(pid) for pid in workers))


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_crashed_episodes_are_repeated_if_asked(fake, tmp_path):
    with EpisodeFile(tmp_path / "episodes.jsonl", {}) as file:
        results = evaluate(fake.specs(2), WorkerSetup(fake.FakeWorld({0: "raise"}), fake.go), file=file)
        assert [result.outcome for result in results] == ["crash", "success"]
        good = WorkerSetup(fake.FakeWorld(), fake.go)
        assert evaluate(fake.specs(2), good, file=file) == results
        repeated = evaluate(fake.specs(2), good, file=file, retry_crashed=True)
    assert [result.outcome for result in repeated] == ["success", "success"]
    with EpisodeFile(tmp_path / "episodes.jsonl", {}) as file:
        assert [file.results[result.key] for result in repeated] == repeated


def test_the_file_of_episodes(tmp_path):
    path = tmp_path / "episodes.jsonl"
    result = EpisodeResult("s", "t", 3, 5, None, 0, 1.5, "died", {"physics": 1.0})
    with EpisodeFile(path, {"seed": 7, "limits": {"a": 1}}) as file:
        file.append(result, protocol="openpi")
        with pytest.raises(ValueError, match="another process is evaluating"):
            EpisodeFile(path, {}).__enter__()
    with path.open("ab") as file:
        file.write(b'{"suite": "s", "ta')
    with EpisodeFile(path, {"limits": {"a": 1}, "seed": 7}) as file:
        assert file.results == {("s", "t", 3): result}
        file.append(replace(result, start=4, success=True))
    assert path.read_text().count("\n") == 3
    with pytest.raises(ValueError, match=r"begun with other settings: seed is 7 there and 8 here"):
        EpisodeFile(path, {"seed": 8, "limits": {"a": 1}}).__enter__()
    path.write_text(path.read_text() + '{"suite": 1}\n')
    with pytest.raises(ValueError, match=r"line 4: not an episode: keys \['task'"):
        EpisodeFile(path, {"seed": 7, "limits": {"a": 1}}).__enter__()
    path.write_text("no\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        EpisodeFile(path, {}).__enter__()


def test_batches_are_of_those_that_wait(fake):
    policy = fake.Forwards()
    setup = WorkerSetup(fake.FakeWorld(), cameras=policy.cameras)
    list(run_rollouts(fake.specs(4), setup, policy, num_envs=2))
    assert max(policy.batches) <= 2
    assert np.sum(policy.batches) >= 8
