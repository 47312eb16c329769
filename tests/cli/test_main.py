"""The command line as a whole: help, exit codes, errors in one line, and what it does not import."""

import json
import subprocess
import sys
import time

import pytest

from hf_aegis.cli import COMMANDS, TRACEBACK_VARIABLE, eval_vqa, main
from hf_aegis.cli.parent_process import PARENT_VARIABLE
from hf_aegis.training import TrainingEndedError


HEAVY = ("torch", "transformers", "numpy", "h5py", "datasets", "matplotlib")


def run(capsys, *argv):
    """Exit code, standard output and the lines of standard error."""
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_help_is_quick():
    program = f"""
import json, sys
from hf_aegis.cli import main
loaded = {{}}
for argv in (["--help"], ["demo", "--help"], ["eval-vqa", "--help"], ["data", "--help"], ["data", "combine", "--help"],
             ["anchor", "--help"], ["compare", "--help"], ["serve", "--help"], ["eval-libero", "--help"]):
    try:
        main(argv)
    except SystemExit as ended:
        assert ended.code == 0, argv
    loaded[" ".join(argv)] = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps(loaded), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(not names for names in json.loads(result.stderr).values()), result.stderr


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ((), list(COMMANDS)),
        (("demo",), ["--output_dir", "--max_steps", "--seed", "--vqa_final_samples"]),
        (("compare",), ["--config", "--conditions", "--seeds", "--shared", "--anchors", "--only", "--jobs"]),
        (("train",), ["--anchor", "--expert", "--vqa_samples", "--preserve", "--penalty_scale", "--max_steps"]),
        (("anchor",), ["--config", "--model", "--num_samples", "--moments"]),
        (("eval-vqa",), ["--model", "--revision", "--attn_implementation", "--device", "--max_samples", "--output"]),
        (("eval-libero",), ["--config", "--model", "--policy", "--suite", "--protocol", "--replan_steps"]),
        (("serve",), ["--model", "--client", "--host", "--port", "--head", "--max_batch_size", "--max_message_mb"]),
        (("data",), ["record-libero", "combine", "inspect"]),
        (("data", "record-libero"), ["--config", "--tasks", "--num_demonstrations", "--store_states"]),
        (("data", "combine"), ["--output", "--suite", "--overwrite"]),
        (("data", "inspect"), ["FILE"]),
    ],
    ids=" ".join,
)
def test_every_command_has_help(capsys, command, options):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert out.startswith(" ".join(("usage: hf-aegis", *command)))
    words = out.replace(",", " ").split()
    for option in options:
        assert option in words, option


@pytest.mark.parametrize(
    ("argv", "prefix", "message"),
    [
        ((), "hf-aegis", "the following arguments are required: COMMAND"),
        (("dance",), "hf-aegis", "invalid choice: 'dance'"),
        (("--verbose",), "hf-aegis", "required: COMMAND"),
        (("demo", "--steps", "3"), "hf-aegis", "unrecognized arguments: --steps 3"),
        (("demo", "--max_step", "3"), "hf-aegis", "unrecognized arguments: --max_step 3"),
        (("demo", "--max_steps", "x"), "hf-aegis demo", "--max_steps: invalid int value: 'x'"),
        (("demo", "--max_steps", "0"), "hf-aegis demo", "--max_steps must be at least 1, found 0"),
        (("eval-vqa", "--split", "all"), "hf-aegis eval-vqa", "found split='all'"),
        (("eval-vqa", "--device", "tpu"), "hf-aegis eval-vqa", "--device: invalid choice: 'tpu'"),
        (("eval-vqa", "--batch_size", "0"), "hf-aegis eval-vqa", "--batch_size must be at least 1"),
        (("anchor", "--steps", "3"), "hf-aegis anchor", "unrecognized arguments: --steps 3; see hf-aegis anchor"),
        (("anchor", "--config", "no.yaml"), "hf-aegis anchor", "no.yaml"),
        (("anchor", "--num_samples", "0"), "hf-aegis anchor", "num_samples must be at least 1, found 0"),
        (("train", "--stepps", "3"), "hf-aegis train", "unrecognized arguments: --stepps 3; see hf-aegis train"),
        (("train", "--preserve", "all"), "hf-aegis train", "argument --preserve: invalid choice: 'all'"),
        (("train", "--output_dir", "o", "--vqa_steps", "0"), "hf-aegis train", "vqa_steps must be positive, found 0"),
        (("compare",), "hf-aegis compare", "are required: --output_dir"),
        (("compare", "--config", "no.yaml"), "hf-aegis compare", "no.yaml"),
        (("data",), "hf-aegis data", "required: COMMAND"),
        (("data", "convert"), "hf-aegis data", "invalid choice: 'convert'"),
        (("data", "record-libero"), "hf-aegis data", "required: --output_dir"),
        (("data", "combine", "no.hdf5"), "hf-aegis data combine", "required: --output"),
        (("data", "combine", "no.hdf5", "--output", "o.hdf5"), "hf-aegis data", "no.hdf5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_command_lines_end_with_one_line_and_code_2(capsys, tmp_path, monkeypatch, argv, prefix, message):
    monkeypatch.chdir(tmp_path)
    code, out, lines = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert lines[0].startswith(f"{prefix}: error: ")
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_an_error_of_a_command_is_one_line(capsys, monkeypatch, error):
    def fail(arguments):
        raise error("first line\n  second line")

    monkeypatch.setattr(eval_vqa, "run", fail)
    assert run(capsys, "eval-vqa") == (2, "", ["hf-aegis eval-vqa: error: first line second line"])


def test_the_end_of_a_training_is_told_without_a_traceback(capsys, monkeypatch):
    def fail(arguments):
        raise TrainingEndedError("out of memory\n  what helps: a smaller batch")

    monkeypatch.setattr(eval_vqa, "run", fail)
    lines = ["hf-aegis eval-vqa: out of memory", "  what helps: a smaller batch"]
    assert run(capsys, "eval-vqa") == (1, "", lines)


@pytest.mark.parametrize(("asked", "shown"), [("1", True), ("0", False), ("", False)])
def test_the_traceback_of_an_error_comes_before_its_line_where_it_is_asked_for(capsys, monkeypatch, asked, shown):
    def fail(arguments):
        raise ValueError("deep inside")

    monkeypatch.setattr(eval_vqa, "run", fail)
    monkeypatch.setenv(TRACEBACK_VARIABLE, asked)
    _, _, lines = run(capsys, "eval-vqa")
    assert lines[-1] == "hf-aegis eval-vqa: error: deep inside"
    assert any("in fail" in line for line in lines) == shown == (len(lines) > 1)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"{TRACEBACK_VARIABLE}=1" in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's service is Linux's")
def test_a_command_ends_with_the_one_that_started_it():
    command = (
        "import sys, time; from hf_aegis.cli.parent_process import end_with_parent; end_with_parent(); "
        "print('ready', flush=True); time.sleep(60); print('alive')"
    )
    parent = (
        f"import os, subprocess, sys, time; os.environ[{PARENT_VARIABLE!r}] = str(os.getpid()); "
        f"subprocess.Popen([sys.executable, '-c', {command!r}]); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        # The pipe closes when the last process that holds it ends.
        started = time.monotonic()
        assert process.stdout.read() == ""
        assert time.monotonic() - started < 30


def test_a_defect_is_not_taken_for_an_error_of_the_input(monkeypatch):
    def fail(arguments):
        raise RuntimeError("defect")

    monkeypatch.setattr(eval_vqa, "run", fail)
    with pytest.raises(RuntimeError, match="defect"):
        main(["eval-vqa"])


def test_an_interruption_is_told(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_vqa, "run", interrupt)
    code, out, lines = run(capsys, "eval-vqa")
    assert (code, out) == (130, "")
    assert lines == ["hf-aegis eval-vqa: interrupted; start it again to continue"]


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_a_command_returns_is_the_exit_code(monkeypatch, returned, code):
    monkeypatch.setattr(eval_vqa, "run", lambda arguments: returned)
    assert main(["eval-vqa", "--max_samples", "3"]) == code


def test_the_package_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "hf_aegis", "anchor", "--config", "no.yaml"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "hf-aegis anchor: error: [Errno 2] No such file or directory: 'no.yaml'\n"
