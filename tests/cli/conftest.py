"""Stand-ins for the commands that other commands start."""

import json
from pathlib import Path

import pytest
import yaml

from hf_aegis.cli import comparison
from hf_aegis.cli.eval_libero import asked_of_comparison


class Commands:
    """
    Notes the calls and writes what they would write.

    `failing` are the names of calls that end with an `error`, by default an invented one; `interrupt_at` is the number
    of the call at which the one that started them is interrupted.
    """

    def __init__(self):
        self.calls = []
        self.failing = set()
        self.error = None
        self.interrupt_at = None
        self.successes, self.crashed = 3, 1
        self.lines = lambda recipe: {"metrics": [{"step": 0}, {"step": recipe["max_steps"]}]}
        self.result = lambda recipe: {"vqa_accuracy": 0.5, "flow_mse": 0.1}

    def __call__(self, calls, logs, placement, *, ended=None, total=None, progress=None):
        self.total, self.placement = total, placement
        for call in calls:
            if len(self.calls) + 1 == self.interrupt_at:
                raise KeyboardInterrupt
            self.calls.append(call.arguments)
            error = (
                (self.error or f"hf-aegis {call.arguments[0]} ended with code 1")
                if call.name in self.failing
                else None
            )
            if error is None:
                self.run(*call.arguments)
            elif ended is None:
                raise OSError(error)
            if ended is not None:
                ended(call, error)
        self.progress = progress() if progress else None

    @property
    def commands(self):
        return [call[0] for call in self.calls]

    def run(self, command, *options):
        named = dict(zip(options[::2], options[1::2], strict=True))
        if command == "eval-vqa":
            scores = {"cross_entropy": 0.1, "accuracy": 0.9, "by_type": {"color": {"accuracy": 0.8}}}
            Path(named["--output"]).write_text(json.dumps(scores))
        elif command == "anchor":
            recipe = Path(named["--config"]).read_text()
            folder = Path(yaml.safe_load(recipe)["output_dir"])
            folder.mkdir()
            (folder / "recipe.yaml").write_text(recipe)
        elif command == "eval-libero":
            self.evaluate(yaml.safe_load(Path(named["--config"]).read_text()))
        else:
            self.train(yaml.safe_load(Path(named["--config"]).read_text()))

    def evaluate(self, recipe):
        section = {name: value for name, value in recipe.items() if name not in ("model", "output")}
        score = {
            "episodes": 4,
            "successes": self.successes,
            "crashed": self.crashed,
            "success_rate": self.successes / 4,
        }
        scores = {"asked": asked_of_comparison(section), **score, "by_suite": {"libero_object": score}}
        Path(recipe["output"]).write_text(json.dumps(scores))

    def train(self, recipe):
        folder = Path(recipe["output_dir"])
        folder.mkdir(exist_ok=True)
        for name, records in self.lines(recipe).items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "config.json").write_text('{"flow_loss_scale": 0.5}')
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "result.json").write_text(json.dumps(self.result(recipe)))


@pytest.fixture
def commands(monkeypatch):
    commands = Commands()
    monkeypatch.setattr(comparison, "run_calls", commands)
    return commands
