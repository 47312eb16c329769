"""Commands side by side: threads, GPUs, failures, logs and the bar, with a stand-in for Python."""

import os
import signal
import sys
import threading
import time

import pytest

from hf_aegis.cli import processes
from hf_aegis.cli.processes import Call, Placement, run_calls


@pytest.fixture(autouse=True)
def fake_python(tmp_path, monkeypatch):
    """Stands in for `python -m hf_aegis`: sleeps, fails, tells its environment, or waits for two logs."""
    script = tmp_path / "python"
    script.write_text(
        f"""#!/bin/sh
case "$4" in
  sleep) exec sleep 600 ;;
  fail) echo "no such model" >&2; exit 3 ;;
  silent) exit 4 ;;
  save) trap 'sleep 0.2; echo saved; exit 143' TERM
    touch {tmp_path}/$5; while :; do sleep 0.05; done ;;
  environment) echo $HF_AEGIS_PARENT $OMP_NUM_THREADS $HF_AEGIS_TRACEBACK ;;
  gpu) echo $CUDA_VISIBLE_DEVICES >> {tmp_path}/gpus
    while [ $(wc -l < {tmp_path}/gpus) -lt 2 ]; do sleep 0.05; done ;;
  meet) while [ $(ls {tmp_path}/logs | wc -l) -lt 2 ]; do sleep 0.05; done; echo met ;;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0.05)


TWO = Placement(jobs=2, threads=1)


def test_a_command_that_fails_is_named_and_ends_the_others(tmp_path):
    calls = [Call("questions", ("eval-vqa", "sleep")), Call("anchor", ("anchor", "fail"))]
    with pytest.raises(
        OSError, match=r"hf-aegis anchor ended with code 3: no such model \(all of it in .*anchor.log\)"
    ):
        run_calls(calls, tmp_path / "logs", TWO)
    assert (tmp_path / "logs" / "questions.log").exists()


def test_the_others_go_on_where_a_failure_is_only_noted(tmp_path):
    names = ("silent", "fail", "environment", "silent2")
    calls = [Call(name, ("train", name.rstrip("2"))) for name in names]
    ends = {}
    run_calls(calls, tmp_path / "logs", TWO, ended=lambda call, failure: ends.update({call.name: failure}))
    assert ends.keys() == set(names)
    assert ends["environment"] is None
    assert "code 3: no such model" in ends["fail"]
    assert "code 4: it said nothing" in ends["silent2"]


def test_sigterm_reaches_the_commands_which_are_waited_for(tmp_path, capsys):
    def terminate():
        while not all((tmp_path / name).exists() for name in "ab"):
            time.sleep(0.02)
        # Schedulers send it again.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    signals = threading.Thread(target=terminate)
    signals.start()
    noted = {}
    calls = [Call(name, ("train", "save", name)) for name in "abc"]
    with pytest.raises(SystemExit) as ended:
        run_calls(calls, tmp_path / "logs", TWO, ended=lambda call, failure: noted.update({call.name: failure}))
    signals.join()
    assert ended.value.code == 143
    # They ended whole, the third was not begun, and none counts as failed.
    assert {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()} == dict.fromkeys(
        ("a.log", "b.log"), "saved\n"
    )
    assert noted == {}
    assert "SIGTERM: the commands under way are ended; start it again to continue" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_log_keeps_what_an_earlier_attempt_said(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "anchor.log").write_text("out of memory\n")
    with pytest.raises(OSError, match="ended with code 3: no such model"):
        run_calls([Call("anchor", ("anchor", "fail"))], logs, TWO)
    with pytest.raises(OSError, match="ended with code 4: it said nothing"):
        run_calls([Call("anchor", ("anchor", "silent"))], logs, TWO)
    assert (logs / "anchor.log").read_text() == "out of memory\nno such model\n"


def test_commands_know_their_parent_and_threads(tmp_path):
    run_calls([Call("a", ("anchor", "environment"))], tmp_path / "logs", Placement(jobs=2, threads=5))
    assert (tmp_path / "logs" / "a.log").read_text() == f"{os.getpid()} 5 1\n"


def test_commands_run_side_by_side(tmp_path):
    # Each waits for the other's log, so that one after the other would never end.
    run_calls([Call(name, ("train", "meet")) for name in "ab"], tmp_path / "logs", TWO, total=2, progress=lambda: 1)
    assert (tmp_path / "logs" / "a.log").read_text() == (tmp_path / "logs" / "b.log").read_text() == "met\n"


def test_each_process_has_a_gpu_of_its_own(tmp_path):
    calls = [Call(name, ("train", "gpu")) for name in "ab"]
    run_calls(calls, tmp_path / "logs", Placement(jobs=2, threads=1, gpus=("3", "MIG-7")))
    assert sorted((tmp_path / "gpus").read_text().split()) == ["3", "MIG-7"]


def test_the_bar_does_not_count_what_was_done_before_for_its_speed(tmp_path, monkeypatch):
    import tqdm

    made = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **settings):
            made.append(settings)
            super().__init__(*args, **settings)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    done = iter((40, 50, 60))
    run_calls([Call("a", ("train", "environment"))], tmp_path / "logs", TWO, total=60, progress=lambda: next(done, 60))
    assert (made[0]["initial"], made[0]["total"], made[0]["unit"]) == (40, 60, "step")


def test_cores_are_shared_among_the_processes(monkeypatch):
    monkeypatch.setattr(processes, "visible_gpus", lambda: ())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "available_cores", lambda: 8)
    assert [Placement.on_this_machine(jobs).threads for jobs in (1, 2, 8, 20)] == [8, 4, 1, 1]
    assert Placement.on_this_machine() == Placement(jobs=8, threads=1)
    assert Placement.on_this_machine(at_most=2) == Placement(jobs=2, threads=4)
    monkeypatch.setattr(processes, "visible_gpus", lambda: ("0", "1"))
    assert Placement.on_this_machine(at_most=6) == Placement(jobs=2, threads=4, gpus=("0", "1"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Placement.on_this_machine(1).threads == 3


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 3), (None, 3)],
)
def test_cores_are_those_that_the_process_may_use(tmp_path, monkeypatch, limit, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 4, 5}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(processes, "_CGROUP_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert processes.available_cores() == cores


def test_elsewhere_all_cores_are_available(monkeypatch, tmp_path):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(processes, "_CGROUP_LIMIT", tmp_path / "cpu.max")
    assert processes.available_cores() == 64


@pytest.mark.parametrize(
    ("variable", "count", "gpus"),
    [(None, 0, ()), (None, 2, ("0", "1")), ("", 0, ()), ("5,2", 2, ("5", "2")), ("MIG-a", 1, ("MIG-a",))],
)
def test_gpus_keep_the_names_they_were_made_visible_by(monkeypatch, variable, count, gpus):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert processes.visible_gpus() == gpus
