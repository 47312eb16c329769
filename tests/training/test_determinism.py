"""
The same seed gives the same training, cut in the middle of an epoch or not, to the last bit: weights, averages,
optimiser, random numbers and logs, for each part that keeps or draws something.
"""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed

from hf_aegis import GSEConfig
from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.training import AEGISTrainer
from hf_aegis.training.json_lines import JSONLines


# PEFT asks the model by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CUT, STEPS = 2, 4
# Three steps are an epoch of the language model's data.
SAVED = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": CUT, "gradient_accumulation_steps": 2}
WORKERS = {"dataloader_num_workers": 1, "dataloader_pin_memory": False}
PENALTIES = {"transport": 1.0, "distillation": 1.0, "replay": 0.5, "l2sp": 1.0, "ewc": 10.0}
ADAPTED = {"target_modules": ["q_proj", "down_proj"]}

CASES = {
    "projection, workers": WORKERS,
    "projection, recomputed": {"activation_checkpointing": True, "reference_share": 0.5},
    "replay, graddrop": {"reference": "replay", "combiner": "graddrop", "granularity": "tensor"},
    "penalties": {"preserve": "none", "penalties": PENALTIES, "fisher_samples": 5},
    "both": {"preserve": "both", "subspace_energy": 0.5, "subspace_steps": 2},
    "pairs": {"preserve": "subspace", "subspace_sensitivity": 0.9},
    "lora": {"preserve": "subspace", "adapter": LoraConfig(r=4, lora_dropout=0.2, **ADAPTED)},
    "experts": {"adapter": GSEConfig(r=8, num_experts=4, **ADAPTED)},
    "policy with discrete actions and an average": {"policy": True, **WORKERS},
}


def draw():
    """The next random number of each library that has a state of its own."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Draw(TrainerCallback):
    """Draws as augmentations may, from what PyTorch does not know of."""

    def on_step_begin(self, args, state, control, **kwargs):
        draw()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == CUT


@pytest.fixture
def make_language_trainer(make_language_model, make_args, token_dataset):
    def make(callbacks=None, adapter=None, **changes):
        model = make_language_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        args = make_args(**SAVED, **changes)
        others = type(token_dataset)(12, seed=7)
        rows = [others[index] for index in range(8)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
        options = SubspaceOptions(energy=1.0, sensitivity=True) if args.holds_subspaces else None
        anchor = None
        if args.needs_anchor:
            anchor = ActivationAnchor.collect(model, [batch], subspaces=options, progress=False)
        if adapter is not None:
            torch.manual_seed(0)
            model = get_peft_model(model, adapter)
        data = {"train_dataset": token_dataset, "replay_dataset": others if args.needs_replay else None}
        return AEGISTrainer(model, args, anchor=anchor, callbacks=callbacks, **data)

    return make


@pytest.fixture
def make_policy_trainer(make_flow_model, make_args, make_libero, flow_anchor):
    from hf_aegis.assets import EMBEDDED_VLM
    from hf_aegis.data.fast_tokenizer import FASTTokenizer
    from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowProcessor

    def make(callbacks=None, **changes):
        train = make_libero()
        processor = PaliGemmaFlowProcessor.from_vlm_processor(
            EMBEDDED_VLM,
            statistics=train.statistics,
            cameras=train.cameras,
            action_tokenizer=FASTTokenizer.fit(list(train.action_chunks()), vocab_size=64),
        )
        args = make_args(
            **SAVED, per_device_train_batch_size=1, learning_rate=1e-3, expert_learning_rate=1e-2, **changes
        )
        collator = PaliGemmaFlowCollator(processor, action_tokens=True)
        model = make_flow_model()
        return AEGISTrainer(model, args, flow_anchor, data_collator=collator, train_dataset=train, callbacks=callbacks)

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_one_training_whole_or_in_parts(request, tmp_path, case):
    changes = dict(CASES[case])
    kind = "policy" if changes.pop("policy", False) else "language"
    make = request.getfixturevalue(f"make_{kind}_trainer")
    whole = make(output_dir=str(tmp_path / "whole"), callbacks=[Draw()], **changes)
    whole.train()
    drawn = draw()
    set_seed(99)
    make(output_dir=str(tmp_path / "cut"), callbacks=[Draw(), Stop()], **changes).train()
    resumed = make(output_dir=str(tmp_path / "cut"), callbacks=[Draw()], **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert draw() == drawn
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert (whole.ema is None) == (resumed.ema is None)
    if whole.ema is not None:
        assert whole.ema.step == resumed.ema.step == STEPS
        torch.testing.assert_close(whole.ema.average, resumed.ema.average, rtol=0, atol=0)
    logs = {path.name for path in (tmp_path / "whole").glob("*.jsonl")}
    assert "metrics.jsonl" in logs
    for log in logs:
        records = [
            [r for r in JSONLines(tmp_path / folder / log).read() if "train_runtime" not in r]
            for folder in ("whole", "cut")
        ]
        assert [r["step"] for r in records[0]][-1] == STEPS
        assert records[0] == records[1], log
