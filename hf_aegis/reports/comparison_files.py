"""The files of a comparison's folder, read and checked."""

from pathlib import Path
from typing import Any

from hf_aegis.format_version import check_format_version
from hf_aegis.json_files import parse_json, parse_json_object, read_json_object, require_keys
from hf_aegis.reports.run_files import check_episodes, is_plain_name


_NUMBER_OR_NONE = (float, type(None))


def read_settings(path: Path) -> dict[str, Any]:
    """
    The settings of a comparison.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not what it should be, or has a newer format; file and key are named.
    """
    settings = read_json_object(path)
    check_format_version(settings, "comparison", path)
    texts, mappings = (str, type(None)), (dict, type(None))
    kinds: dict[str, Any] = {"conditions": dict, "seeds": list, "command": texts, "gap": (list, type(None))}
    require_keys(settings, {**kinds, **dict.fromkeys(("machine", "libero", "questions", "anchors"), mappings)}, path)
    require_keys(settings["conditions"], dict.fromkeys(settings["conditions"], dict), f"{path}, conditions")
    require_keys(settings.get("machine") or {}, {"jobs": (int, type(None))}, f"{path}, machine")
    # They are names of folders.
    if wrong := [name for name in settings["conditions"] if not is_plain_name(name)]:
        raise ValueError(f"{path}: a condition is called {wrong[0]!r}, expected a name that leads to no other folder")
    if wrong := [seed for seed in settings["seeds"] if type(seed) is not int]:
        raise ValueError(f"{path}: key 'seeds' holds {wrong[0]!r}, expected integers")
    gap = settings.get("gap")
    if gap and not (len(gap) == 2 and all(isinstance(name, str) for name in gap)):
        raise ValueError(f"{path}: key 'gap' is {gap!r}, expected two conditions")
    return settings


def read_result(path: Path) -> dict[str, Any]:
    """
    What a run has measured.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not what it should be, or has a newer format; file and key are named.
    """
    result = read_json_object(path)
    check_format_version(result, "training result", path)
    mappings = (dict, type(None))
    return require_keys(result, {"fingerprints": mappings, "versions": mappings}, path)


def read_failures(path: Path) -> list[dict[str, Any]]:
    """
    The runs that ended with an error; none without a file.

    Raises:
        ValueError: If the file is not what it should be; file and key are named.
    """
    failures = parse_json(path.read_bytes(), path) if path.exists() else []
    if not isinstance(failures, list):
        raise ValueError(f"{path}: expected a list of failures, found {type(failures).__name__}")
    return [require_keys(failure, {"condition": str, "seed": int, "error": str}, path) for failure in failures]


def read_rollout_scores(path: Path) -> dict[str, Any]:
    """
    What `hf-aegis eval-libero` wrote.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not what it should be, or has a newer format; file and key are named.
    """
    scores = read_json_object(path)
    check_format_version(scores, "rollout scores", path)
    counts = dict.fromkeys(("episodes", "successes", "crashed"), int)
    require_keys(scores, {"success_rate": _NUMBER_OR_NONE, "by_suite": dict, **counts}, path)
    if not 0 <= scores["successes"] <= scores["episodes"] or scores["crashed"] < 0:
        found = {name: scores[name] for name in counts}
        raise ValueError(f"{path}: {found} are no counts of episodes")
    for name, score in scores["by_suite"].items():
        require_keys(score, {"success_rate": _NUMBER_OR_NONE}, f"{path}, by_suite.{name}")
    return scores


def read_scores(path: Path) -> dict[str, Any]:
    """
    What `hf-aegis eval-vqa` wrote of both measures.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not what it should be, or has a newer format; file and key are named.
    """
    scores = read_json_object(path)
    check_format_version(scores, "VQA scores", path)
    kinds: dict[str, Any] = {"cross_entropy": float, "accuracy": float, "any_match": _NUMBER_OR_NONE, "by_type": dict}
    require_keys(scores, {**kinds, "by_answer_type": (dict, type(None)), "fingerprint": (str, type(None))}, path)
    for key in ("by_type", "by_answer_type"):
        for name, score in (scores.get(key) or {}).items():
            require_keys(score, {"accuracy": float}, f"{path}, {key}.{name}")
    return scores


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """
    The lines of finished episodes; a last one that a killed process left half-written is passed over.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line is not what it should be, or the file has a newer format; line and key are named.
    """
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
    found = [parse_json_object(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if found:
        check_format_version(found[0], "episodes", f"{path}, line 1")
    # The settings come first.
    check_episodes(found[1:], path)
    return found[1:]
