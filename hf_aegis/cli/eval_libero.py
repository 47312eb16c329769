"""`hf-aegis eval-libero`: how often a policy succeeds in the LIBERO simulator."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.format_version import written_version


if TYPE_CHECKING:
    from hf_aegis.data.libero_pictures import PictureSettings
    from hf_aegis.evaluation.rollouts.episode_file import EpisodeFile
    from hf_aegis.evaluation.rollouts.episodes import EpisodeResult, EpisodeSpec


CHOSEN_BY_COMPARISON = ("model", "policy", "revision", "demonstrations", "output")
"""Fields that `hf-aegis compare` fills in for each of its runs."""

# How an evaluation is carried out, which its results do not depend on.
_CARRYING_OUT = ("num_envs", "hang_seconds", "retry_crashed", "film_format")
PICTURES = ("image_size", "supersampling", "rendering")
"""Fields that say how pictures are rendered, as of [`~data.PictureSettings`]."""
_ERRORS_SHOWN = 3


@dataclass
class EvalLiberoArguments:
    """
    What `hf-aegis eval-libero` evaluates; each field is an option and a key of its recipe.

    Args:
        model (`str`, *optional*): Folder or Hub id of a model with an action expert.
        policy (`str`, *optional*): In a model's place `"expert"`, the scripted one of LIBERO-Object and
            LIBERO-Spatial; `"replay"` of demonstrations from their recorded states; `"zero"`, doing nothing.
        revision (`str`, *optional*): Of a model on the Hub.
        suite (`list[str]`, *optional*): Suites; only `"replay"` can do without, and then takes all that is recorded.
        tasks (`list[str]`, *optional*): Indices or names of tasks, in each of the suites; by default all.
        episodes (`int`, *optional*, defaults to `50`): Per task, from the first so many fixed initial states; of a
            replay, the first so many demonstrations.
        protocol (`str`, *optional*, defaults to `"openpi"`): Whose step limits.
        replan_steps (`int`, *optional*, defaults to `5`): Actions of a chunk before the policy looks again.
        seed (`int`, *optional*, defaults to `7`): Of fixtures' poses and the flow's noise; every episode has its own
            from it.
        num_envs (`int`, *optional*): Environments side by side; by default one per core.
        image_size, supersampling, rendering (*optional*): How pictures are rendered; by default as those that the
            model was trained on, as far as it says so (others are warned of), or else 128, 1 and `"fast"`.
        head (`str`, *optional*, defaults to `"flow"`): `"fast"` acts through the language model's action tokens.
        num_inference_steps (`int`, *optional*): Euler steps of the flow; by default the model's.
        device, dtype, attn_implementation: Of the model.
        demonstrations (`list[str]`, *optional*): What `"replay"` replays; by default the embedded ones.
        films (`int`, *optional*, defaults to `0`): Film the first so many episodes of each task.
        film_format (`str`, *optional*, defaults to `"webp"`): `"webp"` or the larger `"gif"`.
        hang_seconds (`float`, *optional*, defaults to `600`): After so much silence a simulator is taken for dead.
        retry_crashed (`bool`, *optional*, defaults to `False`): Repeat the episodes that crashed before.
        output (`str`, *optional*): File for the scores; each episode goes to `<output>.episodes.jsonl` beside it, from
            which an evaluation that was stopped continues, and films to the folder `<output>.films`.

    Raises:
        ValueError: If a value does not fit; the message names the field.
    """

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a model with an action expert."})
    policy: Literal["expert", "replay", "zero"] | None = field(default=None, metadata={"help": "In a model's place."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a model on the Hub."})
    suite: list[str] | None = field(default=None, metadata={"help": "Suites, such as libero_object."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Indices or names of tasks; default: all."})
    episodes: int = field(default=50, metadata={"help": "Per task, from its first so many fixed starts."})
    protocol: Literal["openpi", "lerobot"] = field(default="openpi", metadata={"help": "Whose step limits."})
    replan_steps: int = field(default=5, metadata={"help": "Actions of a chunk before the policy looks again."})
    seed: int = field(default=7, metadata={"help": "Of fixtures' poses and the flow's noise."})
    num_envs: int | None = field(default=None, metadata={"help": "Environments side by side; default: one per core."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the pictures; default: as in training."})
    supersampling: int | None = field(default=None, metadata={"help": "Render so many times larger; default: same."})
    rendering: Literal["fast", "standard"] | None = field(
        default=None, metadata={"help": "fast: no shadows and reflections; standard: LIBERO's; default: same."}
    )
    head: Literal["flow", "fast"] = field(default="flow", metadata={"help": "What predicts the actions."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "Euler steps; default: the model's."})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "Of the model."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    attn_implementation: str = field(default="eager", metadata={"help": "Of the model."})
    demonstrations: list[str] | None = field(default=None, metadata={"help": "To replay; default: the embedded."})
    films: int = field(default=0, metadata={"help": "Film the first so many episodes of each task."})
    film_format: Literal["webp", "gif"] = field(default="webp", metadata={"help": "Of the films."})
    hang_seconds: float = field(default=600.0, metadata={"help": "Silence after which a simulator is dead."})
    retry_crashed: bool = field(default=False, metadata={"help": "Repeat the episodes that crashed before."})
    output: str | None = field(default=None, metadata={"help": "File for the scores; makes it resumable."})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.policy is None):
            raise ValueError(f"give either model or policy, found {self.model!r} and {self.policy!r}")
        if self.suite is None and self.policy != "replay":
            raise ValueError("suite is missing, such as libero_object")
        if self.tasks is not None and self.suite is None:
            raise ValueError("tasks are those of a suite, and suite is missing")
        for name in ("episodes", "replan_steps", "num_envs", "image_size", "supersampling", "num_inference_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        for name in ("seed", "films"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, found {value}")
        if not self.hang_seconds > 0:
            raise ValueError(f"hang_seconds must be positive, found {self.hang_seconds}")
        if self.films and self.output is None:
            raise ValueError("films are written beside the output, and output is missing")


def configure(parser: CommandParser) -> None:
    """Makes the fields of [`EvalLiberoArguments`] the options."""
    parser.take_recipe(EvalLiberoArguments)


def run(arguments: argparse.Namespace) -> None:
    """
    Runs what is left of the evaluation, prints a table and the scores as JSON.

    Raises:
        ValueError: If a field does not fit, or the output holds results of other settings.
        OSError: If a file or model cannot be read, or episode after episode crashes.
        ImportError: If the `libero` extra is not installed.
    """
    from contextlib import nullcontext

    from hf_aegis.atomic_files import write_text
    from hf_aegis.cli.processes import available_cores
    from hf_aegis.evaluation.rollouts.episode_file import EpisodeFile
    from hf_aegis.evaluation.rollouts.libero import evaluate
    from hf_aegis.evaluation.rollouts.worker import LiberoWorld, WorkerSetup

    asked: EvalLiberoArguments = arguments.recipe[0]
    output = None if asked.output is None else Path(asked.output)
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"output {output}: the folder {output.parent} does not exist")
    specs = _filmed(_specs(asked), asked, output)
    pictures = _pictures(asked)
    settings = _settings(asked, pictures)
    world = LiberoWorld(pictures.image_size, pictures.supersampling, pictures.rendering)
    episodes = output.with_name(f"{output.name}.episodes.jsonl") if output is not None else None
    with EpisodeFile(episodes, settings) if episodes is not None else nullcontext() as file:
        finished = file is not None and all(spec.key in file.results for spec in specs)
        if file is not None and (missing := _never_filmed(specs, file)):
            _warn(f"{missing} episodes to be filmed were finished before without, and are not repeated")
        policy = (
            _load_policy(asked) if asked.model is not None and not (finished and not asked.retry_crashed) else None
        )
        if policy is not None and asked.replan_steps > policy.chunk_size:
            raise ValueError(f"replan_steps is {asked.replan_steps}, but a chunk has {policy.chunk_size} actions")
        results = evaluate(
            specs,
            WorkerSetup(world, _local_policy(asked.policy), policy.cameras if policy is not None else ()),
            policy,
            file,
            num_envs=asked.num_envs or available_cores(),
            hang_seconds=asked.hang_seconds,
            retry_crashed=asked.retry_crashed,
            line={"protocol": settings["protocol"], "policy": settings["fingerprint"]},
        )
    scores = {"asked": _asked(asked), **score_table(results, settings)}
    print(format_table(scores))
    text = json.dumps(scores, indent=2)
    print(text)
    if output is not None:
        write_text(output, text + "\n")


def asked_of_comparison(section: dict[str, Any]) -> dict[str, Any]:
    """What the key `asked` of an output is, after an evaluation with the fields that a comparison's recipe has."""
    return _asked(EvalLiberoArguments(model="its own", output="its own", **section))


def _asked(asked: EvalLiberoArguments) -> dict[str, Any]:
    left_out = (*CHOSEN_BY_COMPARISON, *_CARRYING_OUT)
    return {name: value for name, value in dataclasses.asdict(asked).items() if name not in left_out}


def score_table(results: "Sequence[EpisodeResult]", settings: dict[str, Any]) -> dict[str, Any]:
    """
    What is written to the output: the settings, and the scores in total, by suite and by task; and where the time of
    the episodes went, in seconds of the process that ran each, and how often which error came.
    """
    from hf_aegis.evaluation.rollouts.scores import RolloutScore, scores_by

    seconds: dict[str, float] = {}
    for result in results:
        for name, value in result.seconds.items():
            seconds[name] = round(seconds.get(name, 0.0) + value, 3)
    errors = Counter(result.error for result in results if result.error is not None)
    return {
        **written_version("rollout scores"),
        **settings,
        "counted": "success_rate is successes / episodes; crashed episodes are not among these episodes",
        **RolloutScore.of(results).to_dict(),
        "by_suite": {name: score.to_dict() for name, score in scores_by(results, "suite").items()},
        "by_task": {name: score.to_dict() for name, score in scores_by(results, "suite", "task").items()},
        "errors": dict(errors.most_common()),
        "seconds": seconds,
    }


def format_table(scores: dict[str, Any]) -> str:
    """
    One line per task, one per suite and one for all: episodes that ended, success in per cent of them with its 95 %
    interval, mean steps of the successful ones, and the crashed ones; below, the most frequent errors, and where the
    time went.
    """
    rows = {**scores["by_task"], **scores["by_suite"]}
    if len(scores["by_suite"]) > 1:
        rows["all"] = scores
    width = max(12, *(len(name) + 2 for name in rows))
    lines = [f"{'task':<{width}}{'episodes':>9}{'success':>10}{'95 %':>16}{'steps':>8}{'crashed':>9}"]
    for name, row in rows.items():
        rate = interval = steps = "–"
        if row["success_rate"] is not None:
            rate = f"{100 * row['success_rate']:.1f} %"
            interval = "{:.1f} – {:.1f}".format(*(100 * bound for bound in row["interval"]))
        if row["mean_steps"] is not None:
            steps = f"{row['mean_steps']:.0f}"
        lines.append(f"{name:<{width}}{row['episodes']:>9}{rate:>10}{interval:>16}{steps:>8}{row['crashed']:>9}")
    if scores["crashed"]:
        lines.append("Success is over the episodes that ended; those that crashed are beside them, and say nothing.")
    if scores["faults"]:
        lines.append(f"{scores['faults']} episodes failed because the policy's answer could not be executed.")
    lines += [f"{count} x {error}" for error, count in list(scores["errors"].items())[:_ERRORS_SHOWN]]
    if (more := len(scores["errors"]) - _ERRORS_SHOWN) > 0:
        lines.append(f"and {more} other errors, each beside its episode.")
    if total := sum(scores["seconds"].values()):
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in scores["seconds"].items())
        lines.append(f"Time of the episodes: {shares}.")
    return "\n".join(lines)


def _specs(asked: EvalLiberoArguments) -> "list[EpisodeSpec]":
    from hf_aegis.evaluation.rollouts.libero import chosen_tasks, plan_episodes, plan_replays
    from hf_aegis.evaluation.rollouts.protocols import PROTOCOLS

    tasks = None if asked.suite is None else chosen_tasks(asked.suite, asked.tasks)
    if asked.policy == "replay":
        return plan_replays(_demonstrations(asked), asked.episodes, tasks)
    assert tasks is not None  # checked at the door
    return plan_episodes(tasks, asked.episodes, PROTOCOLS[asked.protocol], asked.replan_steps, asked.seed)


def _filmed(specs: "list[EpisodeSpec]", asked: EvalLiberoArguments, output: Path | None) -> "list[EpisodeSpec]":
    if output is None:
        return specs
    folder = output.with_name(f"{output.name}.films")
    return [
        dataclasses.replace(
            spec, film=str(folder / spec.suite / f"{spec.task}_start_{spec.start}.{asked.film_format}")
        )
        if spec.start < asked.films
        else spec
        for spec in specs
    ]


def _never_filmed(specs: "list[EpisodeSpec]", file: "EpisodeFile") -> int:
    """Finished episodes of which a film is asked for and there is none; those that crashed left none."""
    ended = [spec for spec in specs if spec.key in file.results and file.results[spec.key].success is not None]
    return sum(spec.film is not None and not Path(spec.film).exists() for spec in ended)


def _pictures(asked: EvalLiberoArguments) -> "PictureSettings":
    """How pictures are rendered. What is chosen without the model's knowing is said on standard error."""
    from hf_aegis.data.libero_pictures import PictureSettings

    chosen = {name: value for name in PICTURES if (value := getattr(asked, name)) is not None}
    otherwise = PictureSettings(image_size=128, supersampling=1, rendering="fast")
    if asked.model is None:
        return dataclasses.replace(otherwise, **chosen)
    from hf_aegis.evaluation.rollouts.model_policy import trained_pictures

    known = trained_pictures(asked.model, asked.revision)
    pictures = dataclasses.replace(known or otherwise, **chosen)
    if known is not None and pictures != known:
        _warn(f"{asked.model} was trained on other pictures ({known}) than it will see ({pictures})")
    elif known is None and chosen.keys() != set(PICTURES):
        _warn(f"{asked.model} does not say how the pictures it was trained on were rendered; it will see {pictures}")
    return pictures


def _warn(text: str) -> None:
    print(f"hf-aegis eval-libero: warning: {text}", file=sys.stderr, flush=True)


def _settings(asked: EvalLiberoArguments, pictures: "PictureSettings") -> dict[str, Any]:
    """What results depend on, but for which episodes there are: more may be added to the same file."""
    from hf_aegis.cli.device import resolve_device
    from hf_aegis.data.libero_files import resolve_files
    from hf_aegis.evaluation.rollouts.libero import hash_files, simulator_versions
    from hf_aegis.evaluation.rollouts.protocols import PROTOCOLS
    from hf_aegis.evaluation.weight_files import policy_fingerprint

    settings: dict[str, Any] = {"policy": asked.policy or "model"}
    if asked.model is not None:
        settings["fingerprint"] = policy_fingerprint(asked.model, asked.revision)
        for name in ("head", "num_inference_steps", "dtype", "attn_implementation"):
            settings[name] = getattr(asked, name)
        settings["device"] = resolve_device(asked.device)
        settings |= pictures.to_dict()
    elif asked.policy == "replay":
        settings["fingerprint"] = hash_files(resolve_files(_demonstrations(asked)))
    else:
        settings["fingerprint"] = asked.policy
    if asked.policy == "replay":
        settings["protocol"] = "to the demonstration's end"
    else:
        settings["protocol"] = asked.protocol
        settings["max_steps"] = dict(PROTOCOLS[asked.protocol].max_steps)
        settings["replan_steps"] = asked.replan_steps
        settings["seed"] = asked.seed
    return {**settings, "versions": simulator_versions()}


def _demonstrations(asked: EvalLiberoArguments) -> list[str]:
    from hf_aegis.assets import DEMONSTRATIONS

    return asked.demonstrations or [str(DEMONSTRATIONS)]


def _local_policy(name: str | None) -> Any:
    from hf_aegis.evaluation.rollouts import simulator_policies

    policies = {
        "expert": simulator_policies.scripted_policy,
        "replay": simulator_policies.replay_policy,
        "zero": simulator_policies.zero_policy,
    }
    return None if name is None else policies[name]


def _load_policy(asked: EvalLiberoArguments) -> Any:
    from hf_aegis.cli.device import resolve_device
    from hf_aegis.evaluation.rollouts.model_policy import ModelPolicy

    assert asked.model is not None  # asked for by the caller
    return ModelPolicy.from_pretrained(
        asked.model,
        revision=asked.revision,
        dtype=asked.dtype,
        device=resolve_device(asked.device),
        attn_implementation=asked.attn_implementation,
        head=asked.head,
        num_inference_steps=asked.num_inference_steps,
    )
