"""Steps of the action expert alone, after the model that it reads has changed."""

import copy
from pathlib import Path

from hf_aegis.training.aegis_trainer import AEGISTrainer
from hf_aegis.training.expert_parameters import expert_parameters


SETTLING_FOLDER = "settling"


def settle_expert(trainer: AEGISTrainer, steps: int) -> None:
    """
    Trains the action expert of a trained model for a few steps more, with all else frozen: an expert that was trained
    beside weights which have since gone back reads features that it has not learned from. These steps need no
    gradient of the vision-language model.

    They have the trainer's batches, drawn anew, its expert's learning rate from the schedule's start, and a folder of
    their own for their logs; an interrupted run makes them again.

    Args:
        trainer ([`AEGISTrainer`]): Has trained; its model's expert, and the average of it, are changed.
        steps (`int`): Optimiser steps.

    Raises:
        ValueError: If the model has no action expert that trains.
    """
    expert = expert_parameters(trainer.model, trainer.args.expert_modules)
    if not expert:
        raise ValueError(f"settling trains the action expert alone, and {type(trainer.model).__name__} has none")
    args = copy.copy(trainer.args)
    args.output_dir = str(Path(str(args.output_dir)) / SETTLING_FOLDER)
    args.preserve, args.penalties = "none", None
    args.max_steps, args.warmup_steps, args.seed = steps, min(args.warmup_steps, steps // 5), args.seed + 1
    args.save_strategy = args.eval_strategy = "no"
    args.load_best_model_at_end = args.push_to_hub = False
    others = [p for n, p in trainer.model.named_parameters() if p.requires_grad and n not in expert]
    for parameter in others:
        parameter.requires_grad_(False)
    settling = AEGISTrainer(
        trainer.model,
        args,
        data_collator=trainer.data_collator,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    settling.train()
    for parameter in others:
        parameter.requires_grad_(True)
    trainer.ema = settling.ema
