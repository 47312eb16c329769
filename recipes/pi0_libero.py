"""
Fine-tunes transformers' π0 on LIBERO under each condition, and compares what it learns with what its vision-language
model still answers.

    python recipes/pi0_libero.py --config recipes/pi0_libero.yaml

Each condition × seed starts from the same checkpoint and sees the same batches, one run after another. What is
finished is not repeated, and an interrupted run continues from its last checkpoint. Each run's folder gets its logs,
the fine-tuned π0 with its processor in `model`, for transformers' own `from_pretrained`, and `result.json`; the output
folder gets `results.json`, `.csv` and `.md`.
"""

import dataclasses
import gc
import json
import logging
import shutil
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
import yaml
from pi0_libero_config import PI0Study
from pi0_libero_scores import COLUMNS, VERSIONS, flow_error, markdown_table
from transformers import AutoProcessor, PI0Config, set_seed

from hf_aegis.anchors import ActivationAnchor, SampleBatches, SubspaceOptions
from hf_aegis.assets import DEMONSTRATIONS
from hf_aegis.atomic_files import write_text
from hf_aegis.cli.script_study import chosen_conditions, settings_with_earlier, study_parser, write_study_results
from hf_aegis.data import LiberoDataset
from hf_aegis.data.vqa import VQACollator, VQASample
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.models import PI0Collator, pi0_processor, pi0_vlm
from hf_aegis.reports.results_table import SETTINGS_FILE
from hf_aegis.training import AEGISConfig, AEGISTrainer
from hf_aegis.training.adapters import add_gse, add_lora
from hf_aegis.training.json_lines import finite_json
from hf_aegis.training.resources import ResourceCallback
from hf_aegis.training.run_lock import locked_folder
from hf_aegis.training.run_scores import projection_means
from hf_aegis.training.weight_interpolation import WeightPath


logger = logging.getLogger("pi0_libero")

ADAPTERS = {"lora": add_lora, "gse": add_gse}
# Beside adapters on the language model, these train in full.
TRAINED_IN_FULL = ["multi_modal_projector", "dit", "embed_action_time", "action_out_proj"]


class Material:
    """What all runs of a study share: data, processors, questions."""

    def __init__(self, study: PI0Study) -> None:
        self.study = study
        paths: Any = study.demonstrations or DEMONSTRATIONS
        config = PI0Config.from_pretrained(study.model)
        # In robot units: π0's processor normalises. Past the end of an episode its last action is repeated.
        options: dict[str, Any] = {"chunk_size": config.chunk_size, "normalize": False, "short_demonstrations": "pad"}
        options["held_out_per_task"] = study.held_out_per_task
        self.train = LiberoDataset(paths, split="train", **options)
        self.held_out = LiberoDataset(paths, split="held_out", statistics=self.train.statistics, **options)
        self.processor = pi0_processor(
            study.processor, self.train.statistics, config.chunk_size, max_state_dim=config.max_state_dim
        )
        self.collator = PI0Collator(self.processor)
        self.vqa_processor = AutoProcessor.from_pretrained(study.processor)
        self.vqa_collator = VQACollator(self.vqa_processor)

    @cached_property
    def questions(self) -> Sequence[VQASample]:
        """Those of the anchor, which methods with replay see again."""
        return self.study.anchored.load()

    @cached_property
    def holdout(self) -> VQAHoldout:
        return VQAHoldout(self.study.holdout.load(), self.vqa_processor, batch_size=self.study.holdout.batch_size)

    def scores(self, model: torch.nn.Module) -> dict[str, Any]:
        """Of a π0, wrapped or not: error on held-out demonstrations, and its vision-language model's answers."""
        size = self.study.training.get("per_device_eval_batch_size", AEGISConfig.per_device_eval_batch_size)
        answers = self.holdout.evaluate(pi0_vlm(model))
        return {
            "vqa_cross_entropy": answers.cross_entropy,
            "vqa_accuracy": answers.accuracy,
            "flow_mse": flow_error(model, self.held_out, self.collator, self.study.flow_samples, size),
        }


def prepare(study: PI0Study, material: Material, device: torch.device, anchored: bool) -> None:
    """What the runs start from, as far as it is missing: the scores of the checkpoint and, if needed, its anchor."""
    anchor, before = study.folder / "anchor", study.folder / "before.json"
    collects = anchored and not (anchor / "anchor_config.json").exists()
    if before.exists() and not collects:
        return
    model = study.load_model().to(device)
    if collects:
        partial = study.folder / "anchor_partial"
        batches = SampleBatches(material.questions, study.anchored.batch_size, material.vqa_collator)
        ActivationAnchor.collect(
            pi0_vlm(model),
            batches,
            moments=study.moments,
            subspaces=SubspaceOptions(**study.subspaces) if study.subspaces else None,
            dataset_id=study.anchored.dataset,
            num_batches=len(batches),
            partial_folder=partial,
            settings=dataclasses.asdict(study.anchored),
        ).save_pretrained(anchor)
        shutil.rmtree(partial)
    if not before.exists():
        write_text(before, json.dumps(finite_json(material.scores(model)), indent=2))


def fine_tune(study: PI0Study, material: Material, condition: str, seed: int) -> None:
    """One run, from the checkpoint to its `result.json`."""
    recipe, args = study.recipe(condition), study.arguments(condition, seed)
    folder = study.run_folder(condition, seed)
    set_seed(seed)
    model: Any = study.load_model()
    vlm = pi0_vlm(model)
    adapter = next((name for name in ADAPTERS if recipe.get(name) is not None), None)
    if adapter is not None:
        model = ADAPTERS[adapter](model, {"modules_to_save": TRAINED_IN_FULL, **recipe[adapter]})
    for name, parameter in model.named_parameters():
        # The expert is given embeddings: its own table of them is in the checkpoint, and never read.
        if ".dit." in name and "embed_tokens" in name:
            parameter.requires_grad_(False)
    resources = ResourceCallback()
    trainer = AEGISTrainer(
        model,
        args,
        anchor=ActivationAnchor.from_pretrained(study.folder / "anchor") if args.needs_anchor else None,
        answering_model=vlm,
        vqa_holdout=material.holdout,
        replay_dataset=material.questions if args.needs_replay else None,
        replay_collator=material.vqa_collator,
        data_collator=material.collator,
        train_dataset=material.train,
        processing_class=material.processor,
        callbacks=[resources],
    )
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    share = recipe.get("weight_interpolation")
    kept = trainer.preservation.weights
    pretrained = {} if share is None else {name: p.detach().clone() for name, p in kept.items()}
    trainer.train(resume_from_checkpoint=True)
    if share is not None:
        WeightPath(kept, pretrained).go_to(share)
    if adapter is not None:
        trainer.model.save_pretrained(folder / "adapter")
    if adapter == "lora":
        trainer.model = trainer.model.merge_and_unload()
    result = {
        **material.scores(trainer.model),
        "step_ms": resources.step_ms,
        "step_processor_ms": resources.step_processor_ms,
        "peak_memory_mb": resources.peak_mb,
        "trainable_parameters": trainable,
        **(projection_means(folder) if trainer.shield is not None else {}),
        "skipped_steps": trainer.non_finite_guard.skipped_steps,
        "unprotected_steps": trainer.unprotected_steps,
        "fingerprints": {"train": material.train.fingerprint, "vqa_final": material.holdout.fingerprint},
        "versions": VERSIONS,
    }
    if adapter != "gse":
        # What routes cannot be merged: there the adapter is what is left.
        trainer.model.save_pretrained(folder / "model")
        material.processor.save_pretrained(folder / "model")
    write_text(folder / "result.json", json.dumps(finite_json(result), indent=2, allow_nan=False))


def write_settings(study: PI0Study, chosen: list[str]) -> None:
    """
    Notes what the folder holds, and refuses to mix it with other settings; conditions and seeds may be added.

    Raises:
        ValueError: If a setting differs from that of what is there already.
    """
    whole = {k: v for k, v in dataclasses.asdict(study).items() if k not in ("output_dir", "conditions", "seeds")}
    recipes = {name: study.recipe(name) for name in chosen}
    noted = settings_with_earlier(study.folder, {"study": whole}, recipes, study.seeds)
    write_text(study.folder / SETTINGS_FILE, json.dumps(noted, indent=2))
    written = yaml.safe_dump(without_machine_paths(dataclasses.asdict(study)), sort_keys=False)
    write_text(study.folder / "recipe.yaml", written)


def write_tables(study: PI0Study) -> dict[str, Any]:
    """Writes `results.json`, `.csv` and `.md`, and returns the results."""
    return write_study_results(study.folder, partial(markdown_table, columns=COLUMNS))


def run_study(study: PI0Study, only: list[str] | None = None) -> dict[str, Any]:
    """
    Does what is left to do of the whole study, or of the conditions that `only` names.

    Raises:
        ValueError: If `only` names no condition, another process works in the folder, or it holds other settings.
    """
    chosen = chosen_conditions(study.conditions, only)
    arguments = {name: study.arguments(name, seed=0) for name in chosen}
    with locked_folder(study.folder):
        write_settings(study, chosen)
        material = Material(study)
        anchored = any(args.needs_anchor for args in arguments.values())
        prepare(study, material, next(iter(arguments.values())).device, anchored)
        # Seed by seed, so that a study under way already says something of every condition.
        for condition, seed in ((name, seed) for seed in study.seeds for name in chosen):
            if (study.run_folder(condition, seed) / "result.json").exists():
                continue
            logger.info("%s, seed %d", condition, seed)
            fine_tune(study, material, condition, seed)
            write_tables(study)
            # Trainer and model refer to one another.
            gc.collect()
            torch.cuda.empty_cache()
        return write_tables(study)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = study_parser(__doc__).parse_args()
    study = PI0Study.from_yaml(options.config)
    if options.output_dir is not None:
        study = dataclasses.replace(study, output_dir=options.output_dir)
    results = run_study(study, options.only)
    logger.info("%s\n%s/results.json, results.csv, results.md", markdown_table(results, COLUMNS), study.folder)


if __name__ == "__main__":
    main()
