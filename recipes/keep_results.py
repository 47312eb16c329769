"""
Copies of a comparison what its table, its figures and its continuation need: everything but weights and films.

    python recipes/keep_results.py --comparison outputs/study_embedded --output_dir recipes/results/study_embedded

What is kept is small enough to be committed, and names no path of the machine it was made on. The command that made
the comparison continues it, and repeats none of its runs, once the copy is laid where its recipe expects it:

    cp -r recipes/results/study_embedded outputs/study_embedded
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.reports.results_table import (
    FAILURES_FILE,
    PRETRAINED_FILE,
    RESULT_FILES,
    ROLLOUTS_FILE,
    SETTINGS_FILE,
    write_results,
)
from hf_aegis.training.certificate_callback import CERTIFICATE_FILE
from hf_aegis.training.json_lines import EXPERTS_FILE, METRICS_FILE
from hf_aegis.training.run import RESULT_FILE
from hf_aegis.training.run_recipe import RECIPE_FILE


# Below the comparison's folder. An anchor's own folder stays out, so that the anchor is collected again where it is
# needed. Of a run's figures those of each backward pass (`projection.jsonl`) are left out: they are megabytes, and
# their means are in its result.
_COMPARISON = (SETTINGS_FILE, PRETRAINED_FILE, FAILURES_FILE, "anchors/*.yaml", "runs/*/seed_*.yaml")
_RUN = (
    RECIPE_FILE,
    RESULT_FILE,
    METRICS_FILE,
    CERTIFICATE_FILE,
    EXPERTS_FILE,
    ROLLOUTS_FILE,
    f"{ROLLOUTS_FILE}.episodes.jsonl",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, required=True, help="output folder of `hf-aegis compare`")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the copy; an older copy is replaced")
    arguments = parser.parse_args()
    runs = keep(arguments.comparison, arguments.output_dir)
    size = sum(path.stat().st_size for path in arguments.output_dir.rglob("*") if path.is_file())
    print(f"{arguments.output_dir}: {runs} runs, {size / 1e6:.2f} MB")


def keep(comparison: Path, folder: Path) -> int:
    """
    Writes the copy, whole or not at all, with `results.json`, `.csv` and `.md` as they are now.

    Args:
        comparison (`Path`): Output folder of `hf-aegis compare`.
        folder (`Path`): The copy. An older copy there is replaced, another folder is not.

    Returns:
        `int`: The number of finished runs in it.

    Raises:
        OSError: If `comparison` holds none.
        ValueError: If `folder` holds something else than a copy.
    """
    if folder.exists() and not (folder / SETTINGS_FILE).exists():
        raise ValueError(f"{folder} is no copy of a comparison (it has no {SETTINGS_FILE}): it is not replaced")
    results = write_results(comparison)
    finished = [comparison / "runs" / run["condition"] / f"seed_{run['seed']}" for run in results["runs"]]
    sources = [path for pattern in (*_COMPARISON, *RESULT_FILES) for path in sorted(comparison.glob(pattern))]
    sources += [path for run in finished for name in _RUN if (path := run / name).exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staged = Path(temporary) / folder.name
        for source in sources:
            target = staged / source.relative_to(comparison)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text().replace(str(comparison), f"outputs/{folder.name}")
            target.write_text(without_machine_paths(text))
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    return len(finished)


if __name__ == "__main__":
    main()
