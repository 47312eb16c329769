"""The related methods under the same trainer: what each adds to, or makes of, the task's gradient."""

import copy
import re

import pytest
import torch
from transformers import TrainerCallback

from hf_aegis.training import AEGISTrainer
from hf_aegis.training.json_lines import JSONLines
from hf_aegis.training.replay_batches import ReplayBatches


SGD = {"optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.5}
REPLAYED = {"preserve": "projection", "reference": "replay"}
METHODS = {
    "ewc": {"preserve": "none", "penalties": {"ewc": 50.0}},
    "l2sp": {"preserve": "none", "penalties": {"l2sp": 2.0}},
    "distillation": {"preserve": "none", "penalties": {"distillation": 3.0}},
    "transport": {"preserve": "none", "penalties": {"transport": 3.0}},
    "cotrain": {"preserve": "none", "penalties": {"replay": 0.5}},
    "a_gem": REPLAYED,
    "pcgrad": {**REPLAYED, "combiner": "pcgrad", "granularity": "global"},
    "graddrop": {**REPLAYED, "combiner": "graddrop", "granularity": "tensor"},
    "both": {"preserve": "projection", "penalties": {"l2sp": 2.0, "transport": 1.0}},
}


class GradientRecorder(TrainerCallback):
    """Keeps the gradients that each optimiser step is given, and the weights it was given them at."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = dict(model.named_parameters())
        self.steps.append(
            ({n: p.detach().clone() for n, p in named.items()}, {n: p.grad.clone() for n, p in named.items()})
        )


@pytest.fixture
def replay_dataset(token_dataset):
    return type(token_dataset)(12, seed=5)


@pytest.fixture
def train(make_language_model, make_anchor, make_args, token_dataset, replay_dataset):
    def run(resume=None, recorder=None, **changes):
        model = make_language_model()
        args = make_args(fisher_samples=5, **changes)
        trainer = AEGISTrainer(
            model,
            args,
            anchor=make_anchor(model) if args.needs_anchor else None,
            replay_dataset=replay_dataset if args.needs_replay else None,
            train_dataset=token_dataset,
            callbacks=[recorder] if recorder else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture
def record(train, make_language_model):
    """Steps of a run as a model at each step's weights, the batch it saw, and the gradients that were applied."""

    def run(**changes):
        recorder = GradientRecorder()
        trainer = train(recorder=recorder, **{**SGD, "max_steps": 3, **changes})
        torch.manual_seed(trainer.args.seed)
        seen = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(3), strict=False)]
        for (weights, applied), batch in zip(recorder.steps, seen, strict=True):
            model = make_language_model().train()
            model.load_state_dict(weights, strict=False)
            yield model, batch, applied

    return run


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def hidden_of(output):
    return output if torch.is_tensor(output) else output[0]


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_co_training_follows_the_sum_of_both_losses(record, replay_dataset, make_args):
    replay = ReplayBatches(replay_dataset, torch.utils.data.default_collate, 4, seed=3)
    for number, (model, batch, applied) in enumerate(record(**METHODS["cotrain"])):
        loss = model(**batch).loss + 0.5 * model(**replay[number]).loss
        close(applied, gradients(model, loss))


def test_the_replayed_gradient_is_combined_with_the_tasks(record, replay_dataset):
    replay = ReplayBatches(replay_dataset, torch.utils.data.default_collate, 4, seed=3)
    conflicts = 0
    for number, (model, batch, applied) in enumerate(record(**METHODS["a_gem"], granularity="global")):
        task = gradients(model, model(**batch).loss)
        reference = gradients(model, model(**replay[number]).loss)
        dot = sum((task[n] * reference[n]).sum() for n in task)
        square = sum(reference[n].square().sum() for n in task)
        conflicts += int(dot < 0)
        close(applied, {n: task[n] - min(dot / square, dot * 0) * reference[n] for n in task})
    assert conflicts < 3, "the other case is tested with the combiners"


def test_weight_penalties_add_their_gradient_without_another_pass(record, make_language_model, replay_dataset):
    start = dict(make_language_model().named_parameters())
    fisher = {name: torch.zeros_like(p) for name, p in start.items()}
    singles = ReplayBatches(replay_dataset, torch.utils.data.default_collate, 1, seed=4)
    for number in range(5):
        model = make_language_model()
        for name, gradient in gradients(model, model(**singles[number]).loss).items():
            fisher[name] += gradient.square() / 5
    for method, factor in (("l2sp", dict.fromkeys(start, 2.0)), ("ewc", {n: 50.0 * f for n, f in fisher.items()})):
        for step, (model, batch, applied) in enumerate(record(**METHODS[method])):
            task = gradients(model, model(**batch).loss)
            weights = {name: p.detach() for name, p in model.named_parameters()}
            added = {n: factor[n] * (weights[n] - start[n].detach()) for n in task}
            assert step == 0 or any(value.abs().max() > 1e-5 for value in added.values())
            close(applied, {n: task[n] + added[n] for n in task})


def test_layer_penalties_add_their_autograd_gradient(record, make_language_model, make_anchor):
    teacher = make_language_model().eval()
    for step, (model, batch, applied) in enumerate(record(**METHODS["distillation"])):
        mask = batch["attention_mask"].bool()
        outputs = []
        for each in (model, teacher):
            hooked = []
            handles = [
                layer.register_forward_hook(
                    lambda *a, into=hooked: into.append(a[2] if torch.is_tensor(a[2]) else a[2][0])
                )
                for layer in each.model.layers
            ]
            outputs.append((each(**batch).loss, hooked))
            for handle in handles:
                handle.remove()
        (loss, mine), (_, theirs) = outputs
        distances = [(a[mask] - b[mask].detach()).square().mean() for a, b in zip(mine, theirs, strict=True)]
        assert step == 0 or sum(distances) > 0
        close(applied, gradients(model, loss + 3.0 * sum(distances) / len(distances)))


@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_not_stopping(train, tmp_path, method):
    changes = {**METHODS[method], "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = train(output_dir=str(tmp_path / "whole"), **changes)
    resumed = train(resume=str(tmp_path / "whole" / "checkpoint-3"), output_dir=str(tmp_path / "resumed"), **changes)
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name
    records = [
        [r for r in JSONLines(tmp_path / n / "metrics.jsonl").read() if "loss" in r] for n in ("whole", "resumed")
    ]
    assert records[0][3:] == records[1]


def test_accumulated_replay_equals_the_larger_batch(record, replay_dataset):
    """Of a sum of both losses, two micro-batches are one batch of both."""
    model, _, applied = next(record(**METHODS["cotrain"], gradient_accumulation_steps=2, max_steps=1))
    replay = ReplayBatches(replay_dataset, torch.utils.data.default_collate, 4, seed=3)
    added = (model(**replay[0]).loss + model(**replay[1]).loss) / 2
    task = {n: a - 0.5 * g for (n, a), g in zip(applied.items(), gradients(model, added).values(), strict=True)}
    # What is left is the gradient of a task loss that knows nothing of the replay: that of the run without.
    _, _, naive = next(record(preserve="none", gradient_accumulation_steps=2, max_steps=1))
    close(task, naive)


def test_the_figures_are_logged(train, tmp_path):
    expected = {
        "ewc": "ewc_penalty",
        "l2sp": "l2sp_penalty",
        "distillation": "distillation_loss",
        "transport": "transport_loss",
        "cotrain": "replay_loss",
        "a_gem": "replay_loss",
        "pcgrad": "throttle_rate",
    }
    for method, key in expected.items():
        train(output_dir=str(tmp_path / method), **METHODS[method])
        records = [r for r in JSONLines(tmp_path / method / "metrics.jsonl").read() if "loss" in r]
        assert all(r[key] >= 0 for r in records), (method, records[0])
        assert records[-1][key] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preserve": "none", "penalties": {"ewk": 1.0}}, "penalties: unknown key 'ewk'"),
        (
            {"preserve": "none", "penalties": {"ewc": -1.0}},
            "of 'ewc' must be a positive number, found -1.0",
        ),
        ({"preserve": "none", "penalties": {"ewc": True}}, "found True"),
        ({"preserve": "none", "reference": "replay"}, "reference='replay' has no effect with preserve=\"none\""),
        ({"preserve": "none", "combiner": "pcgrad"}, "combiner='pcgrad' has no effect"),
        ({"combiner": "pcgrad"}, "combiner='pcgrad' needs reference=\"replay\""),
        ({"penalties": {"replay": 1.0}}, '"replay" cannot be combined with the transport reference'),
        ({**REPLAYED, "neuron_cosine_steps": 5}, "neuron_cosine_steps needs"),
        ({"replay_batch_size": 0}, "replay_batch_size must be at least 1, found 0"),
        ({"fisher_samples": 0}, "fisher_samples must be positive, found 0"),
    ],
)
def test_wrong_compositions_are_refused(make_args, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_args(**changes)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cotrain", "penalties={'replay': 0.5} needs a replay_dataset"),
        ("ewc", "penalties={'ewc': 50.0} needs a replay_dataset"),
        ("a_gem", 'preserve="projection" with reference="replay" needs a replay_dataset'),
        ("transport", "penalties={'transport': 3.0} needs an anchor"),
    ],
)
def test_what_a_method_needs_is_asked_for(make_language_model, make_args, token_dataset, method, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AEGISTrainer(make_language_model(), make_args(**METHODS[method]), train_dataset=token_dataset)


def test_replayed_batches_are_functions_of_their_number(replay_dataset):
    batches = ReplayBatches(replay_dataset, list, 5, seed=1)
    forwards = [batches[number] for number in range(4)]
    again = ReplayBatches(replay_dataset, list, 5, seed=1)
    for number in (3, 0, 2, 1):
        for first, second in zip(forwards[number], again[number], strict=True):
            assert torch.equal(first["input_ids"], second["input_ids"])
    with pytest.raises(ValueError, match="replay_dataset has 12 samples, fewer than a batch of 13"):
        ReplayBatches(replay_dataset, list, 13, seed=1)


def test_fisher_samples_beyond_the_data_are_refused(make_language_model, make_args, token_dataset, replay_dataset):
    args = make_args(**METHODS["ewc"], fisher_samples=13)
    with pytest.raises(ValueError, match="fisher_samples=13, but replay_dataset has 12 samples"):
        AEGISTrainer(
            make_language_model(), args, train_dataset=token_dataset, replay_dataset=copy.copy(replay_dataset)
        )
