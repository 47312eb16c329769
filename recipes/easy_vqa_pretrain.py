"""
Trains the embedded vision-language model from scratch on easy-VQA.

    python recipes/easy_vqa_pretrain.py --config recipes/easy_vqa_pretrain.yaml

Two stages: the vision tower and projector learn colour and shape as a classifier, then the whole model learns to
answer. Every step's batch is drawn from (seed, stage, step) alone, so an interrupted run continues from its last
checkpoint exactly as if it had not stopped.
"""

import argparse
import copy
import dataclasses
import json
import logging
import math
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm
from transformers import (
    Gemma2Config,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma import GemmaTokenizer
from transformers.models.siglip import SiglipImageProcessorPil

from hf_aegis.cli.recipe import check_values, option_types, read_recipe, require_keys
from hf_aegis.data.vqa import VQA_PROMPT, VQACollator, VQASample, load_easy_vqa
from hf_aegis.evaluation.vqa import VQAHoldout


logger = logging.getLogger("easy_vqa_pretrain")

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
WORKERS = 2
STAGES = ("vision", "language")
MODEL_CARD = Path(__file__).parents[1] / "model_cards" / "paligemma2-easy-vqa.md"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_shift: int
    curriculum_steps: int = 0


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    output_dir: str
    seed: int
    checkpoint_every: int
    tokenizer: dict[str, Any]
    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    vision: StageConfig
    language: StageConfig
    max_train_samples: int | None = None
    max_test_samples: int | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> "PretrainConfig":
        """
        Raises:
            ValueError: If a key is unknown, missing or has the wrong type; file and key are named.
        """
        path = Path(path)
        raw = read_recipe(path, option_types([cls]) | dict.fromkeys(STAGES, dict[str, Any]))
        require_keys(cls, raw, str(path))
        for name in STAGES:
            where = f"{path}: {name}"
            require_keys(StageConfig, check_values(raw[name], option_types([StageConfig]), where), where)
            raw[name] = StageConfig(**raw[name])
        return cls(**raw)


def build_processor(config: PretrainConfig, samples: list[VQASample]) -> PaliGemmaProcessor:
    """A Gemma tokenizer (BPE, byte fallback) trained on the questions, the answers and the recipe's corpus."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    # One byte token per value, then printable ASCII: nothing can become <unk>.
    alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    reserved = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "▁")
    # Merges must not cross words, or the vocabulary would fill with whole questions.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^▁A-Za-z]"), behavior="isolated"),
        ]
    )
    questions = sorted({sample.question for sample in samples})
    # An answer follows the prompt's newline without a space, so it needs a token of its own.
    answers = sorted({sample.answer for sample in samples}) * 200
    prompts = ["answer en"] * 200
    trainer = trainers.BpeTrainer(
        vocab_size=config.tokenizer["vocab_size"],
        special_tokens=reserved,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator([*questions, *answers, *prompts, *config.tokenizer["corpus"] * 3], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=trained["vocab"], merges=[tuple(merge) for merge in trained["merges"]])

    size = config.vision_config["image_size"]
    image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    image_processor.image_seq_length = (size // config.vision_config["patch_size"]) ** 2
    return PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)


def build_model(config: PretrainConfig, processor: PaliGemmaProcessor) -> PaliGemmaForConditionalGeneration:
    tokenizer = processor.tokenizer
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model_config = PaliGemmaConfig(
        text_config=Gemma2Config(vocab_size=len(tokenizer), **special, **config.text_config),
        vision_config=SiglipVisionConfig(vision_use_head=False, **config.vision_config),
        image_token_index=processor.image_token_id,
        vocab_size=len(tokenizer),
        hidden_size=config.text_config["hidden_size"],
        projection_dim=config.text_config["hidden_size"],
        **special,
    )
    model_config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(model_config)
    model.generation_config = GenerationConfig(max_new_tokens=8, do_sample=False, **special)
    return model


class TrainingSet:
    """easy-VQA's training split as tensors: images once each, texts once each, questions as pairs of indices."""

    def __init__(self, samples: list[VQASample], processor: PaliGemmaProcessor):
        collator = VQACollator(processor)
        images, texts = {}, {}
        for sample in samples:
            images.setdefault(id(sample.image), (len(images), sample))
            texts.setdefault((sample.question, sample.answer), (len(texts), sample))
        self.pixel_values = torch.cat(
            [collator([sample])["pixel_values"] for _, sample in tqdm(images.values(), desc="images", leave=False)]
        )
        self.texts = collator([sample for _, sample in texts.values()])
        self.image_of = torch.tensor([images[id(sample.image)][0] for sample in samples])
        self.text_of = torch.tensor([texts[(sample.question, sample.answer)][0] for sample in samples])
        self.perception = torch.tensor([i for i, sample in enumerate(samples) if sample.question_type != "yes/no"])
        # Two labels per image, -100 where no training question reveals one.
        self.color = torch.full((len(images),), -100)
        self.shape = torch.full((len(images),), -100)
        for sample in samples:
            image = images[id(sample.image)][0]
            if sample.answer in COLORS:
                self.color[image] = COLORS.index(sample.answer)
            elif sample.answer in SHAPES:
                self.shape[image] = SHAPES.index(sample.answer)

    def questions(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        texts = self.text_of[indices]
        length = int(self.texts["attention_mask"][texts].sum(1).max())
        return {
            key: self.texts[key][texts, :length] for key in ("input_ids", "attention_mask", "token_type_ids", "labels")
        }


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * len(STAGES) + STAGES.index(stage)) * 1_000_000 + step)


def augment(pixel_values: torch.Tensor, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Shifts each image `(B, 3, h, w)` by up to `max_shift` pixels, the edges repeated, and mirrors half of them."""
    batch, _, height, width = pixel_values.shape
    padded = pad(pixel_values, (max_shift,) * 4, mode="replicate")
    shift = torch.randint(0, 2 * max_shift + 1, (2, batch, 1), generator=generator)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


Batch = dict[str, torch.Tensor]


class VisionStage:
    """Classifies colour and shape from the projected, mean-pooled image features."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, data: TrainingSet, config: StageConfig, seed: int):
        self.model, self.data, self.config, self.seed = model, data, config, seed
        self.head = torch.nn.Linear(model.config.text_config.hidden_size, len(COLORS) + len(SHAPES))
        self.modules = torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector, self.head])

    def batch(self, step: int) -> Batch:
        generator = step_generator(self.seed, "vision", step)
        indices = torch.randint(len(self.data.pixel_values), (self.config.batch_size,), generator=generator)
        return {
            "pixel_values": augment(self.data.pixel_values[indices], self.config.max_shift, generator),
            "color": self.data.color[indices],
            "shape": self.data.shape[indices],
        }

    def loss(self, pixel_values: torch.Tensor, color: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        features = self.model.model.get_image_features(pixel_values).pooler_output.mean(1)
        logits = self.head(features).float().split([len(COLORS), len(SHAPES)], dim=1)
        # Not the built-in mean: it is 0/0 where no image of a small share has a label.
        return sum(
            cross_entropy(scores, labels, reduction="sum") / (labels != -100).sum().clamp(min=1)
            for scores, labels in zip(logits, (color, shape), strict=True)
        )


class LanguageStage:
    """Cross-entropy of the answers, end to end."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, data: TrainingSet, config: StageConfig, seed: int):
        self.model, self.data, self.config, self.seed = model, data, config, seed
        self.modules = torch.nn.ModuleList([model])

    def batch(self, step: int) -> Batch:
        generator = step_generator(self.seed, "language", step)
        indices = torch.randint(len(self.data.text_of), (self.config.batch_size,), generator=generator)
        if step < self.config.curriculum_steps:
            half = self.config.batch_size // 2
            chosen = torch.randint(len(self.data.perception), (half,), generator=generator)
            indices[:half] = self.data.perception[chosen]
        images = self.data.pixel_values[self.data.image_of[indices]]
        return {
            **self.data.questions(indices),
            "pixel_values": augment(images, self.config.max_shift, generator),
        }

    def loss(self, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        labels = labels[:, 1:]
        # The head is only needed where some sample of the batch has an answer token next.
        answered = (labels != -100).any(0).nonzero()[:, 0]
        logits = self.model(**inputs, logits_to_keep=answered, use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), labels[:, answered].flatten())


def learning_rate(step: int, config: StageConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def weight_decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def accumulate_gradients(stage: VisionStage | LanguageStage, step: int, workers: ThreadPoolExecutor) -> float:
    """
    Adds the gradients of the step's loss, each worker thread taking an equal share of the batch.

    Threads that meet once a step lose little on shared cores; operators split over cores meet thousands of times. Two
    shares add up to the same bits in either order, more than two may not.
    """
    batch = stage.batch(step)
    split = zip(*(tensor.chunk(WORKERS) for tensor in batch.values()), strict=True)
    shares = [dict(zip(batch, share, strict=True)) for share in split]

    def backward(share: Batch) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = stage.loss(**share) / len(shares)
        loss.backward()
        return loss.item()

    return sum(workers.map(backward, shares))


def load_checkpoint(path: Path, config: PretrainConfig) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if state["config"] != dataclasses.asdict(config):
        raise ValueError(f"{path} belongs to another recipe; remove it or set another output_dir.")
    return state


def run_stage(
    name: str,
    stage: VisionStage | LanguageStage,
    optimizer_state: dict[str, Any] | None,
    record: dict[str, Any],
    max_steps: float,
    checkpoint_every: int,
    workers: ThreadPoolExecutor,
    save: Callable[..., None],
) -> int:
    """Runs a stage from where `record` says it stands, for `max_steps` at most; returns the number of steps run."""
    config = stage.config
    optimizer = torch.optim.AdamW(weight_decay_groups(stage.modules, config.weight_decay), betas=(0.9, 0.99))
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    before = record.get(name, {"steps": 0, "seconds": 0.0})
    first, end = before["steps"], int(min(config.steps, before["steps"] + max_steps))
    started = time.monotonic()
    stage.modules.train()
    bar = tqdm(range(first, end), initial=first, total=config.steps, desc=name)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = accumulate_gradients(stage, step, workers)
        torch.nn.utils.clip_grad_norm_(stage.modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.4f}")
        if step + 1 == end or (step + 1) % checkpoint_every == 0:
            seconds = before["seconds"] + time.monotonic() - started
            record[name] = {"steps": step + 1, "seconds": seconds, "loss": loss}
            save(stage=name, optimizer=optimizer.state_dict())
    return end - first


def train(config: PretrainConfig, stop_after: int | None = None) -> tuple[Any, PaliGemmaProcessor, dict[str, Any]]:
    """
    Runs both stages, from the last checkpoint if there is one; `stop_after` ends after so many steps of both stages
    together. Returns the model, the processor and what happened (minutes, steps, final losses).
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    samples = load_easy_vqa("train", config.max_train_samples)
    processor = build_processor(config, samples)
    data = TrainingSet(samples, processor)
    torch.manual_seed(config.seed)
    model = build_model(config, processor)
    stages = {
        "vision": VisionStage(model, data, config.vision, config.seed),
        "language": LanguageStage(model, data, config.language, config.seed),
    }

    path = folder / "checkpoint.pt"

    def save(**progress: Any) -> None:
        state = {"model": model.state_dict(), "head": stages["vision"].head.state_dict(), "record": record, **progress}
        partial = path.with_suffix(".partial")
        torch.save({"config": dataclasses.asdict(config), **state}, partial)
        os.replace(partial, path)

    resumed = load_checkpoint(path, config)
    record = resumed["record"] if resumed else {}
    if resumed:
        model.load_state_dict(resumed["model"])
        stages["vision"].head.load_state_dict(resumed["head"])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            remaining = math.inf if stop_after is None else stop_after
            for name, stage in stages.items():
                optimizer_state = resumed["optimizer"] if resumed and resumed["stage"] == name else None
                remaining -= run_stage(
                    name, stage, optimizer_state, record, remaining, config.checkpoint_every, workers, save
                )
    finally:
        torch.set_num_threads(threads)
    return model, processor, record


def question_only_accuracy(train: list[VQASample], test: list[VQASample]) -> float:
    """What a model scores on `test` that never looks: each question's most frequent answer in `train`."""
    answers: dict[str, Counter[str]] = {}
    for sample in train:
        answers.setdefault(sample.question, Counter())[sample.answer] += 1
    guesses = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    return sum(guesses.get(sample.question) == sample.answer for sample in test) / len(test)


def export(config: PretrainConfig, model: Any, processor: PaliGemmaProcessor, record: dict[str, Any]) -> Path:
    """Stores the model in bfloat16, evaluates what was stored in float32, and writes the figures beside it."""
    folder = Path(config.output_dir) / "model"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
    # The tokenizer would store how it last padded a batch.
    processor.tokenizer.backend_tokenizer.no_padding()
    processor.save_pretrained(partial)

    stored = PaliGemmaForConditionalGeneration.from_pretrained(
        partial, dtype=torch.float32, attn_implementation="eager"
    )
    test = load_easy_vqa("test", config.max_test_samples)
    result = VQAHoldout(test, PaliGemmaProcessor.from_pretrained(partial), batch_size=128).evaluate(stored)
    evaluation = {
        "dataset": "easy-vqa 1.0, test split",
        "protocol": f"greedy generation, prompt {VQA_PROMPT!r}, exact match; stored in bfloat16, computed in float32",
        **result.to_dict(),
        "question_only_accuracy": question_only_accuracy(load_easy_vqa("train", config.max_train_samples), test),
        "training": record,
        "minutes": sum(stage["seconds"] for stage in record.values()) / 60,
        "parameters": stored.num_parameters(),
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "easy-vqa")},
    }
    (partial / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    (partial / "README.md").write_text(model_card(evaluation))
    for path in partial.iterdir():
        # safetensors writes files that only their owner can read.
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def model_card(evaluation: dict[str, Any]) -> str:
    rows = {**evaluation["by_type"], "all": evaluation}
    table = "\n".join(
        f"| {name} | {row['count']:,} | {100 * row['accuracy']:.1f} % | {row['cross_entropy']:.4f} |"
        for name, row in rows.items()
    )
    template = MODEL_CARD.read_text()
    return template.format(table=table, **evaluation, **evaluation["config"])


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe (YAML)")
    config = PretrainConfig.from_yaml(parser.parse_args().config)
    folder = export(config, *train(config))
    logger.info("%s", (folder / "evaluation.json").read_text())
    logger.info("exported to %s", folder)


if __name__ == "__main__":
    main()
