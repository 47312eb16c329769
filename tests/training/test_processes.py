"""The trainer in two processes, against one with batches twice as large; run as a script, this file is one of two."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.training import AEGISConfig, AEGISTrainer
from hf_aegis.training.replay_batches import ReplayBatches


VOCABULARY, STEPS = 61, 3
# How knowledge is kept, and what else is asked for.
RUNS = {
    "streaming": {"neuron_cosine_steps": 1},
    "checkpointed": {"activation_checkpointing": True, "gradient_accumulation_steps": 2},
    "penalties": {
        "preserve": "none",
        "penalties": {"transport": 0.1, "distillation": 0.1, "ewc": 10.0},
        "fisher_samples": 5,
        "gradient_accumulation_steps": 2,
    },
    "replayed_transport": {"reference": "replayed_transport", "granularity": "tensor"},
}
RESUMED = "streaming"


def test_two_processes_equal_one(tmp_path, run_processes):
    alone = {name: train(tmp_path / "one" / name, 4, **RUNS[name]) for name in RUNS}
    run_processes(__file__, tmp_path)
    for name in RUNS:
        compare(load_file(tmp_path / "two" / name / "weights.safetensors"), alone[name])
        found, expected = (last_log(tmp_path / processes / name) for processes in ("two", "one"))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # What one process has begun, two went on with; and the other way round.
    compare(load_file(tmp_path / "two" / "resumed" / "weights.safetensors"), alone[RESUMED])
    first = str(tmp_path / "two" / RESUMED / "checkpoint-2")
    compare(train(tmp_path / "one" / "resumed", 4, resume=first, **RUNS[RESUMED]), alone[RESUMED])


def test_replayed_batches_are_spread_over_processes():
    alone = ReplayBatches(list(range(23)), list, 6, seed=1)
    shares = [ReplayBatches(list(range(23)), list, 2, seed=1, rank=rank, size=3) for rank in range(3)]
    for number in range(8):
        assert [row for share in shares for row in share[number]] == alone[number]
    with pytest.raises(ValueError, match="replay_dataset has 5 samples, fewer than a batch of 6"):
        ReplayBatches(list(range(5)), list, 2, seed=1, rank=0, size=3)


def compare(found, expected):
    start = dict(make_model().named_parameters())
    assert found.keys() == expected.keys()
    assert any(not torch.equal(weight, start[name]) for name, weight in found.items())
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def last_log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    merged = {key: value for line in lines for key, value in line.items() if key not in timed}
    return {key: value for key, value in merged.items() if value is not None}


def make_model():
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=VOCABULARY,
        attn_implementation="eager",
        use_cache=False,
        initializer_range=0.2,
    )
    return Gemma2ForCausalLM(config)


def sequences(size, seed):
    """Random token sequences of varying length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(size):
        ids = torch.randint(VOCABULARY, (10,), generator=generator)
        mask = (torch.arange(10) < torch.randint(4, 11, (), generator=generator)).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def train(folder, batch_size, resume=None, **changes):
    """Three steps of a batch that all processes share; the weights afterwards."""
    model = make_model()
    others = sequences(8, seed=7)
    for row in others:
        # One length: a replayed batch's loss is the mean of its processes' means.
        row["attention_mask"] = torch.ones(10, dtype=torch.long)
        row["labels"] = row["input_ids"]
    batch = {name: torch.stack([row[name] for row in others]) for name in ("input_ids", "attention_mask")}
    args = AEGISConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        save_strategy="steps" if folder.name == RESUMED else "no",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        dataloader_pin_memory=False,
        seed=3,
        **changes,
    )
    trainer = AEGISTrainer(
        model,
        args,
        anchor=ActivationAnchor.collect(model, [batch], progress=False),
        train_dataset=sequences(24, seed=0),
        replay_dataset=others if args.needs_replay else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    warnings.simplefilter("error")
    for name in (*RUNS, "resumed"):
        target = folder / "two" / name
        first = str(folder / "one" / RESUMED / "checkpoint-2") if name == "resumed" else None
        weights = train(target, 2, resume=first, **RUNS[RESUMED if name == "resumed" else name])
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, weights)
        for key in weights:
            assert torch.equal(everyone[0][key], everyone[1][key]), f"{name}: the processes differ in {key}"
        if os.environ["RANK"] == "0":
            save_file(weights, target / "weights.safetensors")
    torch.distributed.destroy_process_group()
