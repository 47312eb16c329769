"""
Does preservation hold on a plain language model? Pre-trains a tiny Llama on prose, fine-tunes it on code.

    python recipes/text_study.py --config recipes/text_study.yaml

Prose is the language reference that `pydoc` carries, code the sources of the standard library: every CPython has both.
Each condition × seed fine-tunes from the same weights on the same batches, one run per core at a time, each in a
process of its own. What is finished is not repeated: pre-training continues from its last checkpoint, fine-tuning run
by run. The output folder gets `results.json`, `.csv`, `.md` and `figures/trade_off.png`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from text_study_corpora import END, CorporaConfig, build_corpora
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    default_data_collator,
    set_seed,
)

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.atomic_files import replacing, write_text
from hf_aegis.cli.parent_process import PARENT_VARIABLE, end_with_parent
from hf_aegis.cli.processes import available_cores
from hf_aegis.cli.recipe import check_values, option_types, read_recipe, require_keys
from hf_aegis.cli.script_study import chosen_conditions, settings_with_earlier, study_parser, write_study_results
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.reports.results_table import (
    FAILURES_FILE,
    SETTINGS_FILE,
    Column,
    measured_columns,
)
from hf_aegis.reports.style import condition_order
from hf_aegis.reports.trade_off import Measure, plot_trade_off, plottable
from hf_aegis.training import AEGISConfig, AEGISTrainer
from hf_aegis.training.adapters import add_lora
from hf_aegis.training.json_lines import finite_json
from hf_aegis.training.resources import ResourceCallback
from hf_aegis.training.run_lock import locked_folder
from hf_aegis.training.run_scores import certified_deviations, projection_means


logger = logging.getLogger("text_study")

EVALUATION_BATCH = 32
# Beside what a condition says: adapters on all linear layers, nothing else trains.
LORA = {"target_modules": "all-linear", "modules_to_save": None}
RECIPE = "recipe.yaml"
PACKAGES = ("hf-aegis", "torch", "transformers", "tokenizers", "peft", "safetensors")
COLUMNS = (
    Column("prose_loss", "prose loss (nats/token)", ".3f"),
    Column("prose_loss_change", "change", "+.3f"),
    Column("code_loss", "code loss (nats/token)", ".3f"),
    Column("certificate_layers", "largest deviation of a layer", ".3f"),
    Column("certificate_divergence", "KL on prose (nats/token)", ".3f"),
    Column("step_ms", "step (ms)", ".0f"),
    Column("step_processor_ms", "step, processor time (ms)", ".0f"),
    Column("peak_memory_mb", "peak memory (MB)", ".0f"),
    Column("trainable_parameters", "trainable parameters", ",.0f", spread=False),
    Column("throttle_rate", "throttle rate (%)", ".1f", 100),
    Column("energy_shed", "energy shed (%)", ".2f", 100),
)
CODE_LOSS = Measure("code_loss", "code loss after training (nats per token, ← better)")
PROSE_LOSS = Measure("prose_loss", "prose loss after training (nats per token, ↓ better)")


@dataclasses.dataclass(frozen=True)
class AnchorConfig:
    batch_size: int
    moments: str
    subspaces: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    output_dir: str
    seed: int
    seeds: list[int]
    corpora: CorporaConfig
    model: dict[str, Any]
    pretraining: dict[str, Any]
    anchor: AnchorConfig
    certificate_samples: int
    training: dict[str, Any]
    conditions: dict[str, Any]
    jobs: int | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> "StudyConfig":
        """
        Raises:
            ValueError: If a key is unknown, missing or has the wrong type; file and key are named.
        """
        path = Path(path)
        parts = {"corpora": CorporaConfig, "anchor": AnchorConfig}
        raw = read_recipe(path, option_types([cls]) | dict.fromkeys(parts, dict[str, Any]))
        require_keys(cls, raw, str(path))
        for name, part in parts.items():
            where = f"{path}: {name}"
            require_keys(part, check_values(raw[name], option_types([part]), where), where)
            raw[name] = part(**raw[name])
        fields = option_types([AEGISConfig])
        for name in ("pretraining", "training"):
            check_values(raw[name], fields, f"{path}: {name}")
        for name, own in raw["conditions"].items():
            check_values(own, fields | {"lora": dict[str, Any]}, f"{path}: conditions: {name}")
        config = cls(**raw)
        # What does not fit is to be known before the pre-training.
        SubspaceOptions(**config.anchor.subspaces)
        for name in config.conditions:
            try:
                config.arguments(name, seed=0)
            except ValueError as error:
                raise ValueError(f"{path}: conditions: {name}: {error}") from error
        return config

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def run_folder(self, condition: str, seed: int) -> Path:
        return self.folder / "runs" / condition / f"seed_{seed}"

    def recipe(self, condition: str) -> dict[str, Any]:
        """All fields of a condition."""
        return {**self.training, **self.conditions[condition]}

    def arguments(self, condition: str, seed: int) -> AEGISConfig:
        fields = {name: value for name, value in self.recipe(condition).items() if name != "lora"}
        return make_arguments(self.run_folder(condition, seed), seed, disable_tqdm=True, **fields)

    def to_dict(self, *left_out: str) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}


def make_arguments(folder: Path, seed: int, **fields: Any) -> AEGISConfig:
    defaults = {"save_strategy": "no", "report_to": "none", "use_cpu": True}
    return AEGISConfig(output_dir=str(folder), seed=seed, **{**defaults, **fields})


def as_dataset(samples: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": sample, "labels": sample} for sample in samples]


def as_batches(samples: Tensor, size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": batch} for batch in samples.split(size)]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, samples: Tensor) -> float:
    """Cross-entropy of the next token, in nats, over all but each sample's first."""
    model.eval()
    total = 0.0
    for batch in as_batches(samples, EVALUATION_BATCH):
        ids = batch["input_ids"].to(next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / samples[:, 1:].numel()


def scores(model: torch.nn.Module, samples: Mapping[str, Tensor]) -> dict[str, float]:
    return {f"{name}_loss": held_out_loss(model, samples[f"{name}_held_out"]) for name in ("prose", "code")}


def pretrain(config: StudyConfig, samples: Mapping[str, Tensor], tokenizer: Any) -> None:
    """Trains the Llama on prose, from the last checkpoint if there is one, and writes it to `model`."""
    target = config.folder / "model"
    if target.exists():
        return
    set_seed(config.seed)
    end = tokenizer.token_to_id(END)
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    shape = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": config.corpora.context}
    trainer = AEGISTrainer(
        LlamaForCausalLM(LlamaConfig(**shape, **special, **config.model)),
        make_arguments(
            config.folder / "pretraining",
            config.seed,
            **{"preserve": "none", "eval_strategy": "steps", "save_strategy": "steps", "save_total_limit": 1},
            **{"per_device_eval_batch_size": EVALUATION_BATCH, "prediction_loss_only": True},
            **{"disable_tqdm": not sys.stderr.isatty(), **config.pretraining},
        ),
        train_dataset=as_dataset(samples["prose_train"]),
        eval_dataset=as_dataset(samples["prose_held_out"]),
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=True)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.save_pretrained(partial)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(partial)
    os.replace(partial, target)


def load_model(config: StudyConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(config.folder / "model", dtype=torch.float32)


def prepare(config: StudyConfig, samples: dict[str, Tensor], tokenizer: Any) -> None:
    """What all runs start from, as far as it is missing: samples, the pre-trained model, its anchor, its scores."""
    with replacing(config.folder / "samples.safetensors") as staged:
        save_file(samples, staged)
    pretrain(config, samples, tokenizer)
    anchor = config.folder / "anchor"
    if not (anchor / "anchor_config.json").exists():
        ActivationAnchor.collect(
            load_model(config),
            as_batches(samples["prose_train"], config.anchor.batch_size),
            moments=config.anchor.moments,
            subspaces=SubspaceOptions(**config.anchor.subspaces),
            dataset_id="pydoc_data.topics",
        ).save_pretrained(anchor)
    if not (before := config.folder / "before.json").exists():
        write_text(before, json.dumps(scores(load_model(config), samples), indent=2))


def fine_tune(config: StudyConfig, condition: str, seed: int) -> None:
    """One run, from the pre-trained model to its `result.json`."""
    folder = config.run_folder(condition, seed)
    samples = load_file(config.folder / "samples.safetensors")
    before = json.loads((config.folder / "before.json").read_text())
    set_seed(seed)
    model: Any = load_model(config)
    if (lora := config.recipe(condition).get("lora")) is not None:
        model = add_lora(model, {**LORA, **lora})
    resources = ResourceCallback()
    trainer = AEGISTrainer(
        model,
        config.arguments(condition, seed),
        anchor=ActivationAnchor.from_pretrained(config.folder / "anchor"),
        train_dataset=as_dataset(samples["code_train"]),
        replay_dataset=as_dataset(samples["prose_train"]),
        certificate_batches=as_batches(samples["prose_held_out"][: config.certificate_samples], EVALUATION_BATCH),
        data_collator=default_data_collator,
        callbacks=[resources],
    )
    # What it prints is in metrics.jsonl.
    trainer.remove_callback(PrinterCallback)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    after = scores(trainer.model, samples)
    result = {
        **after,
        "prose_loss_change": after["prose_loss"] - before["prose_loss"],
        **certified_deviations(folder),
        "step_ms": resources.step_ms,
        "step_processor_ms": resources.step_processor_ms,
        "peak_memory_mb": resources.peak_mb,
        "trainable_parameters": trainable,
        **(projection_means(folder) if trainer.shield is not None else {}),
        "skipped_steps": trainer.non_finite_guard.skipped_steps,
        "unprotected_steps": trainer.unprotected_steps,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
    }
    write_text(folder / "result.json", json.dumps(finite_json(result), indent=2, allow_nan=False))


def in_own_process(config: StudyConfig, condition: str, seed: int) -> None:
    """
    [`fine_tune`] in a process of one thread, so that memory is measured apart; what it says is added to its log.

    Raises:
        OSError: If it fails.
    """
    log = config.folder / "logs" / f"{condition}_seed_{seed}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--config", str(config.folder / RECIPE), "--run", condition, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", PARENT_VARIABLE: str(os.getpid())}
    with log.open("a") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
    if code:
        said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise OSError(f"{condition} seed {seed} ended with code {code}: {said[0]} (all of it in {log})")


Runner = Callable[[StudyConfig, str, int], None]


def fine_tune_all(config: StudyConfig, runs: list[tuple[str, int]], jobs: int, runner: Runner) -> None:
    """Runs what is not finished, `jobs` at a time; the table is written anew after each."""
    path = config.folder / FAILURES_FILE
    failures: list[dict[str, Any]] = []
    write_text(path, "[]")
    pending = [run for run in runs if not (config.run_folder(*run) / "result.json").exists()]
    pool = ThreadPoolExecutor(jobs)
    futures: dict[Future[None], tuple[str, int]] = {pool.submit(runner, config, *run): run for run in pending}
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc="fine-tuning", unit="run", disable=None):
            if (error := future.exception()) is not None:
                condition, seed = futures[future]
                failures.append({"condition": condition, "seed": seed, "error": without_machine_paths(str(error))})
                write_text(path, json.dumps(failures, indent=2))
            write_tables(config)
    finally:
        # After an interruption those that wait do not begin.
        pool.shutdown(cancel_futures=True)


def write_tables(config: StudyConfig) -> dict[str, Any]:
    """Writes `results.json`, `.csv` and `.md`, and returns the results."""
    return write_study_results(config.folder, markdown_table)


def markdown_table(results: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over seeds, one row per condition."""
    columns = measured_columns(results, COLUMNS)
    before = {name: {"mean": value, "std": None, "n": 1} for name, value in results["before"].items()}
    rows = [
        ["condition", "seeds", *(column.header for column in columns)],
        ["---", *["---:"] * (len(columns) + 1)],
        ["before fine-tuning", "", *(column.cell(before.get(column.key), 1) for column in columns)],
    ]
    for name, condition in results["conditions"].items():
        cells = (column.cell(condition["measures"].get(column.key), condition["runs"]) for column in columns)
        rows.append([name, str(condition["runs"]), *cells])
    notes = [
        "Mean ± standard deviation (n − 1) over seeds. Losses are of held-out documents.",
        f"Step times were measured with {results['machine']['jobs']} processes side by side, of one thread each.",
        *(f"Failed: {run['condition']}, seed {run['seed']}: {run['error']}" for run in results["failed"]),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n" + "\n\n".join(notes) + "\n"


def draw(config: StudyConfig, results: Mapping[str, Any]) -> None:
    conditions = results["conditions"]
    if names := condition_order(plottable(conditions, CODE_LOSS, PROSE_LOSS)):
        (config.folder / "figures").mkdir(exist_ok=True)
        with replacing(config.folder / "figures" / "trade_off.png") as staged:
            plot_trade_off(conditions, names, results["before"], staged, CODE_LOSS, PROSE_LOSS)


def write_settings(config: StudyConfig, about: Mapping[str, Any], chosen: list[str], jobs: int) -> None:
    """
    Notes what the folder holds, and refuses to mix it with other settings; conditions and seeds may be added.

    Raises:
        ValueError: If a setting differs from that of what is there already.
    """
    whole = config.to_dict("output_dir", "seeds", "training", "conditions", "jobs")
    recipes = {name: config.recipe(name) for name in chosen}
    own = settings_with_earlier(config.folder, {"corpora": about, "study": whole}, recipes, config.seeds)
    own["conditions"] = {name: own["conditions"][name] for name in condition_order(own["conditions"])}
    noted = {
        "command": without_machine_paths(shlex.join(["python", *sys.argv])),
        "machine": {"cores": available_cores(), "jobs": jobs, "threads": 1},
        **own,
    }
    write_text(config.folder / SETTINGS_FILE, json.dumps(noted, indent=2))
    write_text(config.folder / RECIPE, yaml.safe_dump(config.to_dict(), sort_keys=False))


def study(config: StudyConfig, only: list[str] | None = None, runner: Runner = in_own_process) -> dict[str, Any]:
    """
    Does what is left to do of the whole study, or of the conditions that `only` names.

    Raises:
        ValueError: If `only` names no condition, another process works in the folder, or it holds other settings.
    """
    chosen = chosen_conditions(config.conditions, only)
    # Seed by seed, so that a study under way already says something of every condition.
    runs = [(name, seed) for seed in config.seeds for name in chosen]
    jobs = min(config.jobs or available_cores(), len(runs))
    with locked_folder(config.folder):
        samples, about, tokenizer = build_corpora(config.corpora, config.seed)
        write_settings(config, about, chosen, jobs)
        prepare(config, samples, tokenizer)
        fine_tune_all(config, runs, jobs, runner)
        results = write_tables(config)
        draw(config, results)
    return results


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = study_parser(__doc__)
    parser.add_argument("--run", nargs=2, metavar=("CONDITION", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = StudyConfig.from_yaml(options.config)
    if options.run is not None:
        end_with_parent()
        condition, seed = options.run
        fine_tune(config, condition, int(seed))
        return 0
    if options.output_dir is not None:
        config = dataclasses.replace(config, output_dir=options.output_dir)
    results = study(config, options.only)
    logger.info("%s\n%s/results.json, results.csv, results.md", markdown_table(results), config.folder)
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
