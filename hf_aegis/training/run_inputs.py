"""What a run learns from and is asked: made from its arguments before anything trains."""

from collections.abc import Sequence
from typing import Any

from hf_aegis.assets import DEMONSTRATIONS
from hf_aegis.data import LiberoDataset
from hf_aegis.data.fast_tokenizer import FASTTokenizer
from hf_aegis.data.vqa import VQASample
from hf_aegis.data.vqa_sources import load_vqa
from hf_aegis.training.run_arguments import RunArguments


def load_demonstrations(run: RunArguments) -> tuple[LiberoDataset, LiberoDataset]:
    """The demonstrations to train on, and those held out, normalised by the statistics of the former."""
    paths: Any = run.demonstrations or DEMONSTRATIONS
    common: dict[str, Any] = {
        "chunk_size": run.chunk_size,
        "held_out_per_task": run.held_out_per_task,
        "short_demonstrations": run.short_demonstrations,
    }
    train = LiberoDataset(paths, split="train", **common)
    return train, LiberoDataset(paths, split="held_out", statistics=train.statistics, **common)


def fit_action_tokenizer(run: RunArguments, dataset: LiberoDataset) -> FASTTokenizer | None:
    """The FAST tokenizer of the training actions; `None` without a discrete head."""
    return None if run.fast is None else FASTTokenizer.fit(list(dataset.action_chunks()), **run.fast)


def load_holdout(run: RunArguments) -> Sequence[VQASample]:
    """Questions asked during training; may be none."""
    return _questions(run.vqa_dataset, run.vqa_split, run.vqa_samples, run.vqa_seed)


def load_final_questions(run: RunArguments) -> Sequence[VQASample]:
    """Questions asked after training; may be none."""
    dataset, split = run.vqa_final_dataset or run.vqa_dataset, run.vqa_final_split or run.vqa_split
    return _questions(dataset, split, run.vqa_final_samples, run.vqa_seed)


def load_replayed_questions(run: RunArguments) -> Sequence[VQASample]:
    """Questions that methods with replay or Fisher information learn from."""
    seed = run.vqa_seed if run.replay_seed is None else run.replay_seed
    return _questions(run.replay_dataset, run.replay_split, run.replay_samples, seed)


def _questions(dataset: str, split: str, samples: int | None, seed: int) -> Sequence[VQASample]:
    return [] if samples == 0 else load_vqa(dataset, split, samples, seed=seed)
