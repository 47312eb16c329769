"""
A policy sharded over two processes, against the same under DDP: what it answers, does, saves and resumes from. Run as
a script, this file is one of the two.
"""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.data import LiberoDataset
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.evaluation.vqa import VQAHoldout
from hf_aegis.models import PaliGemmaFlowForAction
from hf_aegis.training import AEGISConfig, AEGISTrainer
from hf_aegis.training.aegis_trainer import _choose_shards
from hf_aegis.training.expert_ema import EMA_FILE


EXPERT = {"expert_hidden_size": 16, "expert_num_layers": 2, "expert_num_heads": 2, "expert_intermediate_size": 32}
# What of the logs is of the machine, or of the steps since resuming alone.
TIMED = ("runtime", "_per_second", "total_flos", "train_loss")


@pytest.mark.slow
def test_a_sharded_policy_is_the_same_policy(tmp_path, demonstrations, flow_anchor, run_processes):
    flow_anchor.save_pretrained(tmp_path / "anchor")
    run_processes(__file__, demonstrations, tmp_path, timeout=900)
    whole, sharded, resumed = (tmp_path / name for name in ("whole", "sharded", "resumed"))
    for found in (sharded, resumed):
        for file in ("checkpoint-4/model.safetensors", f"checkpoint-4/{EMA_FILE}", "model.safetensors"):
            expected = load_file(whole / file)
            stored = load_file(found / file)
            # Tied to the embeddings; what FSDP gathers does not share their memory.
            stored.pop("lm_head.weight", None)
            assert stored.keys() == expected.keys()
            for name, weight in stored.items():
                torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-5, msg=f"{file}: {name}")
        assert logs(found) == pytest.approx(logs(whole), rel=1e-3, abs=1e-4)
    assert json.loads((sharded / "config.json").read_text())["architectures"] == ["PaliGemmaFlowForAction"]
    # Answers and acts after it went to disk, in one process.
    policies = [PaliGemmaFlowForAction.from_pretrained(folder).eval() for folder in (whole, sharded)]
    actions = [act(policy, tmp_path / "inputs.pt") for policy in policies]
    torch.testing.assert_close(actions[1], actions[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.load(tmp_path / "actions.pt"), actions[1], rtol=1e-3, atol=1e-4)


def test_layers_are_gathered_one_at_a_time_and_the_expert_is_not(make_flow_model):
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    _choose_shards(make_flow_model(), plugin, ["action_expert"])
    assert {"Gemma2DecoderLayer", "SiglipEncoderLayer"} <= set(plugin.transformer_cls_names_to_wrap)
    # PaliGemma has the one not at all; the other's cross-attention runs before the layer itself.
    assert {"SiglipTextEmbeddings", "ActionExpertLayer"}.isdisjoint(plugin.transformer_cls_names_to_wrap)
    chosen = SimpleNamespace(transformer_cls_names_to_wrap=["Gemma2DecoderLayer"])
    _choose_shards(make_flow_model(), chosen, ["action_expert"])
    assert chosen.transformer_cls_names_to_wrap == ["Gemma2DecoderLayer"]


def logs(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{line['step']}: {key}": value
        for line in lines
        for key, value in line.items()
        if value is not None and not key.endswith(TIMED)
    }


@torch.no_grad()
def act(policy, file):
    return policy.sample_actions(**torch.load(file))


def train(folder, data, anchor, sharded, resume=None):
    torch.manual_seed(0)
    model = PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, dtype=torch.float32, chunk_size=4, **EXPERT)
    questions = load_easy_vqa("test", 6, seed=0)
    processor = AutoProcessor.from_pretrained(EMBEDDED_VLM)
    args = AEGISConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        expert_ema_decay=0.5,
        warmup_steps=0,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="flow_mse",
        vqa_steps=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
        seed=3,
        fsdp=sharded,
        fsdp_config={"activation_checkpointing": True} if sharded else None,
    )
    if sharded:
        # As in test_processes.py.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = AEGISTrainer(
        model,
        args,
        anchor=anchor,
        vqa_holdout=VQAHoldout(questions, processor),
        train_dataset=LiberoDataset(data, chunk_size=4, split="train"),
        eval_dataset=LiberoDataset(data, chunk_size=4, split="held_out"),
    )
    trainer.train(resume_from_checkpoint=resume)
    assert sharded == any(isinstance(p, DTensor) for p in trainer.model.parameters())
    trainer.save_model()
    return trainer


def main():
    data, folder = sys.argv[1], Path(sys.argv[2])
    anchor = ActivationAnchor.from_pretrained(folder / "anchor")
    trainer = train(folder / "whole", data, anchor, sharded=False)
    batch = trainer.data_collator([trainer.eval_dataset[0], trainer.eval_dataset[1]])
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask", "token_type_ids", "state")}
    inputs["noise"] = torch.randn(batch["actions"].shape, generator=torch.Generator().manual_seed(0))
    trainer = train(folder / "sharded", data, anchor, sharded=True)
    actions = trainer.model.eval().sample_actions(**inputs)
    if os.environ["RANK"] == "0":
        torch.save(inputs, folder / "inputs.pt")
        torch.save(actions, folder / "actions.pt")
        shutil.copytree(folder / "sharded", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoint-4")
    torch.distributed.barrier()
    train(folder / "resumed", data, anchor, sharded=True, resume=str(folder / "resumed" / "checkpoint-2"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
