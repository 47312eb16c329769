"""
The trainer in two processes, under DDP and under FSDP2, against one with batches twice as large; run as a script, this
file is one of the two.
"""

import contextlib
import json
import math
import os
import signal
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerCallback

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.gradients import local_part
from hf_aegis.training import AEGISConfig, AEGISTrainer, NonFiniteTrainingError
from hf_aegis.training.expert_parameters import without_wrappers
from hf_aegis.training.replay_batches import ReplayBatches
from hf_aegis.training.settling import settle_expert
from hf_aegis.training.weight_interpolation import WeightPath


VOCABULARY, STEPS = 61, 3
# In place of an action expert, of which the others have none.
EXPERT = ["model.layers.1.mlp"]
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
    "settled": {"expert_modules": EXPERT},
    "poisoned": {},
}
RESUMED = "streaming"
TERMINATED = "terminated"
SHARDED_RUNS = {
    "sharded": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "sharded_checkpointed": {
        "fsdp_config": {"activation_checkpointing": True},
        "granularity": "global",
        "expert_modules": EXPERT,
    },
    "sharded_both": {
        "preserve": "both",
        "subspace_energy": 0.9,
        "activation_checkpointing": True,
        "expert_modules": EXPERT,
        "expert_ema_decay": 0.5,
    },
    "sharded_pairs": {"preserve": "subspace", "subspace_sensitivity": 0.9, "gradient_accumulation_steps": 2},
}
# FSDP computes all of it in bfloat16, one process what autocast says: about the same.
ROUNDED = {"sharded_bf16": {"bf16": True}}
RESUMED_SHARDED = "sharded_both"


def test_two_processes_equal_one(tmp_path, run_processes, one_sharded_process):
    every = RUNS | SHARDED_RUNS | ROUNDED
    alone = {name: train(tmp_path / "one" / name, 4, **every[name]) for name in every}
    with one_sharded_process():
        compare(train(tmp_path / "first", 4, fsdp=True, **every[RESUMED_SHARDED]), alone[RESUMED_SHARDED])
    run_processes(__file__, tmp_path, timeout=600)
    for name in ROUNDED:
        found, expected = (logs(tmp_path / processes / name)[-1] for processes in ("two", "one"))
        for key in ("loss", "grad_norm", "vlm_grad_norm", "penalty_mean_term", "penalty_std_term"):
            assert found[key] == pytest.approx(expected[key], rel=0.05), key
    for name in RUNS | SHARDED_RUNS:
        compare(load_file(tmp_path / "two" / name / "weights.safetensors"), alone[name])
        found, expected = (logs(tmp_path / processes / name) for processes in ("two", "one"))
        assert len(found) == len(expected) == STEPS
        for one, other in zip(found, expected, strict=True):
            if name == "poisoned" and one["step"] > 1:
                # In the place of a loss that is not finite each process's Trainer counts none.
                one.pop("loss"), other.pop("loss")
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5), name
    # What one process has begun, two went on with; and the other way round.
    compare(load_file(tmp_path / "two" / "resumed" / "weights.safetensors"), alone[RESUMED])
    # One of two that got SIGTERM had both save, and both went on from there.
    one, whole = (load_file(tmp_path / "two" / name / "weights.safetensors") for name in (TERMINATED, RESUMED))
    assert all(torch.equal(one[name], weight) for name, weight in whole.items())
    first = str(tmp_path / "two" / RESUMED / "checkpoint-2")
    compare(train(tmp_path / "one" / "resumed", 4, resume=first, **RUNS[RESUMED]), alone[RESUMED])
    compare(load_file(tmp_path / "two" / "resumed_sharded" / "weights.safetensors"), alone[RESUMED_SHARDED])
    first = str(tmp_path / "two" / RESUMED_SHARDED / "checkpoint-2")
    again = {"resume": first, **every[RESUMED_SHARDED]}
    # No second copy of the weights, and none in a pickle.
    assert not [path.name for path in Path(first).iterdir() if "fsdp" in path.name]
    with one_sharded_process():
        compare(train(tmp_path / "one" / "resumed_sharded", 4, fsdp=True, **again), alone[RESUMED_SHARDED])
    with pytest.raises(ValueError, match=r"was saved with FSDP .*and is resumed without it"):
        train(tmp_path / "one" / "resumed_whole", 4, **again)


@pytest.fixture
def one_sharded_process(monkeypatch, unused_port):
    """A block in which this process is the only one of a training under FSDP."""

    @contextlib.contextmanager
    def alone():
        with monkeypatch.context() as patch:
            here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            for name, value in (here | {"MASTER_PORT": str(unused_port()), "GLOO_SOCKET_IFNAME": "lo"}).items():
                patch.setenv(name, value)
            # What accelerate sets for good.
            patch.setenv("ACCELERATE_USE_FSDP", "false")
            try:
                yield
            finally:
                torch.distributed.destroy_process_group()
                AcceleratorState._reset_state(reset_partial_state=True)

    return alone


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


def logs(folder):
    """What was logged of each step, in the order of steps."""
    merged = defaultdict(dict)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        # Of the whole run: what it cost, which differs with the processes, and the mean of the losses.
        if "train_runtime" not in record:
            merged[record["step"]] |= {key: value for key, value in record.items() if value is not None}
    return [merged[step] for step in sorted(merged)]


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


class TerminateLast(TrainerCallback):
    """Sends SIGTERM to the last process alone."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            signal.raise_signal(signal.SIGTERM)


def terminate_and_resume(folder):
    """A training that is ended after its second step, and goes on."""
    with pytest.raises(SystemExit) as ended:
        train(folder, 2, callbacks=[TerminateLast()], **RUNS[RESUMED])
    assert ended.value.code == 143
    checkpoint = folder / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    return train(folder, 2, resume=str(checkpoint), **RUNS[RESUMED])


def train(folder, batch_size, resume=None, callbacks=None, **changes):
    """Three steps of a batch that all processes share; the whole weights afterwards."""
    model = make_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if not changes.get("fsdp"):
        changes.pop("fsdp_config", None)
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
        save_strategy="steps" if folder.name in (RESUMED, RESUMED_SHARDED, TERMINATED, "first") else "no",
        save_steps=100 if folder.name == TERMINATED else 2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        dataloader_pin_memory=False,
        seed=3,
        **changes,
    )
    if args.fsdp:
        # accelerate shards over accelerators alone; all but what kind of device it is, is what it does there.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    options = SubspaceOptions(energy=1.0, sensitivity=True) if args.holds_subspaces else None
    trainer = AEGISTrainer(
        model,
        args,
        anchor=ActivationAnchor.collect(model, [batch], subspaces=options, progress=False),
        train_dataset=sequences(24, seed=0),
        replay_dataset=others if args.needs_replay else None,
        callbacks=callbacks,
    )
    if folder.name == "poisoned":
        poison(trainer)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.non_finite_guard.skipped_steps == (2 if folder.name == "poisoned" else 0)
    if folder.name == "settled":
        go_back(trainer, start, batch)
    if trainer.preservation.held is not None:
        assert max(trainer.preservation.held.deviation().values()) < 1e-5
    spread = [isinstance(p, DTensor) for p in trainer.model.parameters()]
    assert all(spread) if args.fsdp else not any(spread)
    assert not args.fsdp or all(isinstance(layer, FSDPModule) for layer in inner_layers(model))
    return {without_wrappers(name): whole(p.detach()).clone() for name, p in model.named_parameters()}


def poison(trainer):
    """In the last process alone the second step's loss and gradients are not finite, and the third's loss alone."""
    compute_loss = trainer.compute_loss
    last = trainer.args.process_index == trainer.args.world_size - 1

    def poisoned(*arguments, **options):
        loss = compute_loss(*arguments, **options)
        if not last or trainer.state.global_step == 0:
            return loss
        return loss * math.inf if trainer.state.global_step == 1 else loss + math.inf

    trainer.compute_loss = poisoned


class BreakLast(TrainerCallback):
    """A weight of the last process, or of its part of the weights, is broken before the second step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            with torch.no_grad():
                local_part(model.get_parameter("model.layers.1.mlp.up_proj.weight"))[0, 0] = math.nan


def break_weight(folder):
    """A training that ends in all processes, as one of them has a weight that is not finite."""
    with pytest.raises(NonFiniteTrainingError, match=r"after step 1, first model\.layers\.1\.mlp\.up_proj\.weight"):
        train(folder, 2, callbacks=[BreakLast()], fsdp="sharded" in folder.name, preserve="none")


def go_back(trainer, start, batch):
    """Towards the weights of the start, as far as a loss allows, and some steps more of what makes up the expert."""
    path = WeightPath(trainer.preservation.weights, start)
    with torch.no_grad():
        before = make_model()(**batch).logits

    @torch.no_grad()
    def loss():
        return 1 + float((trainer.model(**batch).logits - before).square().mean())

    shares = [None] * trainer.args.world_size
    share = path.keep_within(loss, 0.02)
    assert 0 < share < 1
    if trainer.args.world_size > 1:
        torch.distributed.all_gather_object(shares, share)
        assert shares == [share] * len(shares)
    settle_expert(trainer, 2)


def inner_layers(model):
    return [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in model.model.layers]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    warnings.simplefilter("error")
    resumed = {
        "resumed": {"resume": str(folder / "one" / RESUMED / "checkpoint-2"), **RUNS[RESUMED]},
        "resumed_sharded": {"resume": str(folder / "first" / "checkpoint-2"), **SHARDED_RUNS[RESUMED_SHARDED]},
    }
    break_weight(folder / "two" / "broken")
    # accelerate does not leave FSDP again.
    for name, options in sorted(
        (RUNS | SHARDED_RUNS | ROUNDED | resumed | {TERMINATED: {}}).items(), key=lambda item: "sharded" in item[0]
    ):
        target = folder / "two" / name
        if name == TERMINATED:
            weights = terminate_and_resume(target)
        else:
            weights = train(target, 2, fsdp="sharded" in name, **options)
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, weights)
        for key in weights:
            assert torch.equal(everyone[0][key], everyone[1][key]), f"{name}: the processes differ in {key}"
        if os.environ["RANK"] == "0":
            save_file(weights, target / "weights.safetensors")
    break_weight(folder / "two" / "broken_sharded")
    torch.distributed.destroy_process_group()
