"""The trainer holding subspaces under DDP; run as a script, this file is one of two processes."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.training import AEGISConfig, AEGISTrainer


@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", [None, 0.9])
def test_two_processes_equal_one(tmp_path, sensitivity, run_processes):
    alone = train(tmp_path / "one", 4, sensitivity)
    run_processes(__file__, tmp_path / "two", sensitivity, timeout=600)
    together = load_file(tmp_path / "two" / "weights.safetensors")
    start = dict(make_model().named_parameters())
    assert any(not torch.equal(alone[name], start[name]) for name in alone)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def make_model():
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=61,
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
        ids = torch.randint(61, (10,), generator=generator)
        mask = (torch.arange(10) < torch.randint(4, 11, (), generator=generator)).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def train(folder, batch_size, sensitivity):
    """Six steps of four sequences each, over all processes; what is held still is, and the weights are returned."""
    model = make_model()
    others = sequences(16, seed=7)
    batch = {name: torch.stack([row[name] for row in others]) for name in ("input_ids", "attention_mask")}
    options = SubspaceOptions(energy=0.9 if sensitivity is None else 1.0, sensitivity=sensitivity is not None)
    trainer = AEGISTrainer(
        model,
        AEGISConfig(
            output_dir=str(folder),
            preserve="subspace",
            subspace_sensitivity=sensitivity,
            max_steps=6,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-2,
            warmup_steps=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo" if "RANK" in os.environ else None,
            seed=3,
        ),
        anchor=ActivationAnchor.collect(model, [batch], subspaces=options, progress=False),
        train_dataset=sequences(24, seed=0),
    )
    trainer.train()
    assert max(trainer.preservation.held.deviation().values()) < 1e-5
    return {name: p.detach().clone() for name, p in model.named_parameters() if name != "lm_head.weight"}


if __name__ == "__main__":
    folder, sensitivity = Path(sys.argv[1]), None if sys.argv[2] == "None" else float(sys.argv[2])
    found = train(folder, 2, sensitivity)
    if os.environ["RANK"] == "0":
        save_file(found, folder / "weights.safetensors")
    torch.distributed.destroy_process_group()
