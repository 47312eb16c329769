"""The related methods under the same trainer: what each adds to, or makes of, the task's gradient."""

import copy
import re

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_aegis.training import AEGISTrainer, preservation
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
    "replayed_transport": {"preserve": "projection", "reference": "replayed_transport"},
    "update": {"preserve": "projection", "projection_target": "update"},
    "adam": {"preserve": "projection", "projection_metric": "adam", "restoring": 0.1},
    "pcgrad": {**REPLAYED, "combiner": "pcgrad", "granularity": "global"},
    "graddrop": {**REPLAYED, "combiner": "graddrop", "granularity": "tensor"},
    "both": {"preserve": "projection", "penalties": {"l2sp": 2.0, "transport": 1.0}},
}


ACCUMULATION = pytest.mark.parametrize("accumulation", [1, 2])


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
    """Some of its gradients conflict with those of the task, and some agree."""
    return type(token_dataset)(12, seed=11)


@pytest.fixture
def train(make_language_model, make_anchor, make_args, token_dataset, replay_dataset):
    def run(resume=None, recorder=None, model=None, prepare=None, options=None, **changes):
        model = model or make_language_model()
        args = make_args(fisher_samples=5, **changes)
        trainer = AEGISTrainer(
            model,
            args,
            anchor=make_anchor(model) if args.needs_anchor else None,
            replay_dataset=replay_dataset if args.needs_replay else None,
            train_dataset=token_dataset,
            callbacks=[recorder] if recorder else None,
            **(options or {}),
        )
        if prepare:
            prepare(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture
def record(train, make_language_model):
    """Steps of a run as a model at each step's weights, the micro-batches it saw, and the gradients applied to it."""

    def run(**changes):
        recorder = GradientRecorder()
        trainer = train(recorder=recorder, **{**SGD, "max_steps": 3, **changes})
        torch.manual_seed(trainer.args.seed)
        each = trainer.args.gradient_accumulation_steps
        steps = len(recorder.steps)
        seen = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(steps * each), strict=False)]
        for number, (weights, applied) in enumerate(recorder.steps):
            model = make_language_model().train()
            model.load_state_dict(weights, strict=False)
            yield model, seen[number * each : (number + 1) * each], applied

    return run


@pytest.fixture
def replayed(replay_dataset):
    """The batches that a run replays, by number."""
    return ReplayBatches(replay_dataset, torch.utils.data.default_collate, 4, seed=3)


def gradients(model, loss):
    # A penalty on the layers does not reach the final norm.
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def token_losses(model, batch):
    """Cross-entropy of each token that is predicted, from the logits."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")


def task_losses(model, micro_batches):
    """What each micro-batch adds to the mean over all tokens of the step."""
    tokens = [token_losses(model, batch) for batch in micro_batches]
    return [losses.sum() / sum(map(len, tokens)) for losses in tokens]


def decoder_group(name):
    """The oracle's own idea of the groups: layers, and what else the decoder has."""
    return name.split(".")[2] if name.startswith("model.layers.") else "rest"


def combined(combiner, task, reference, granularity="global", draw=0):
    """The update of two gradients by the published formulas in float64, and how many of its vectors conflict."""
    vectors = {}
    for name in task:
        vectors.setdefault("all" if granularity == "global" else decoder_group(name), []).append(name)
    state = np.random.SeedSequence([3, draw]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    update, conflicts = {}, 0
    for names in vectors.values():
        g, r = (torch.cat([gradient[n].flatten() for n in names]).double() for gradient in (task, reference))
        dot = g @ r
        conflicts += int(dot < 0)
        if combiner == "graddrop":
            uniform = torch.cat([torch.rand(task[n].shape, generator=generator).flatten() for n in names])
            purity = 0.5 * (1 + (g + r) / (g.abs() + r.abs()).clamp(min=1e-300))
            flat = sum(v * torch.where(purity > uniform, v > 0, v < 0) for v in (g, r))
        elif combiner == "pcgrad":
            flat = g + r if dot >= 0 else (g - dot / (r @ r) * r) + (r - dot / (g @ g) * g)
        else:
            flat = g - dot.clamp(max=0) / (r @ r) * r
        parts = flat.float().split([task[n].numel() for n in names])
        update |= {name: part.view_as(task[name]) for name, part in zip(names, parts, strict=True)}
    return update, conflicts, len(vectors)


def add(first, second, factor=1.0):
    return {name: value + factor * second[name] for name, value in first.items()}


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@ACCUMULATION
def test_co_training_follows_the_sum_of_both_losses(record, replayed, accumulation):
    for step, (model, batches, applied) in enumerate(
        record(**METHODS["cotrain"], gradient_accumulation_steps=accumulation)
    ):
        numbers = range(step * accumulation, (step + 1) * accumulation)
        added = sum(token_losses(model, replayed[number]).mean() for number in numbers) / accumulation
        close(applied, gradients(model, sum(task_losses(model, batches)) + 0.5 * added))


@pytest.mark.parametrize(
    ("method", "accumulation", "granularity"),
    [
        ("a_gem", 1, "layer"),
        ("a_gem", 1, "global"),
        ("replayed_transport", 1, "layer"),
        ("replayed_transport", 2, "layer"),
        ("pcgrad", 1, "global"),
        ("pcgrad", 2, "layer"),
        ("graddrop", 1, "global"),
        ("graddrop", 2, "global"),
    ],
)
def test_the_replayed_gradient_is_combined_with_the_tasks(
    record, replayed, make_language_model, make_anchor, method, accumulation, granularity
):
    """Micro-batch by micro-batch, each loss with its share of the step."""
    anchor = make_anchor(make_language_model()) if method == "replayed_transport" else None
    changes = {**METHODS[method], "granularity": granularity, "gradient_accumulation_steps": accumulation}
    conflicts = count = 0
    for step, (model, batches, applied) in enumerate(record(**changes)):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for number, loss in enumerate(task_losses(model, batches), start=step * accumulation):
            task = gradients(model, loss)
            batch = replayed[number]
            kept = token_losses(model, batch).mean() if anchor is None else transport(model, batch, anchor)
            reference = gradients(model, kept / accumulation)
            update, found, vectors = combined(
                changes.get("combiner", "one_sided"), task, reference, granularity, draw=number
            )
            total = add(total, update)
            conflicts, count = conflicts + found, count + vectors
        close(applied, total)
    assert 0 < conflicts < count


@ACCUMULATION
def test_weight_penalties_add_their_gradient_without_another_pass(
    record, make_language_model, replay_dataset, accumulation
):
    start = dict(make_language_model().named_parameters())
    fisher = {name: torch.zeros_like(p) for name, p in start.items()}
    singles = ReplayBatches(replay_dataset, torch.utils.data.default_collate, 1, seed=4)
    for number in range(5):
        model = make_language_model()
        for name, gradient in gradients(model, model(**singles[number]).loss).items():
            fisher[name] += gradient.square() / 5
    for method, factor in (("l2sp", dict.fromkeys(start, 2.0)), ("ewc", {n: 50.0 * f for n, f in fisher.items()})):
        for step, (model, batches, applied) in enumerate(
            record(**METHODS[method], gradient_accumulation_steps=accumulation)
        ):
            task = gradients(model, sum(task_losses(model, batches)))
            weights = {name: p.detach() for name, p in model.named_parameters()}
            added = {n: factor[n] * (weights[n] - start[n].detach()) for n in task}
            assert step == 0 or any(value.abs().max() > 1e-5 for value in added.values())
            close(applied, add(task, added))


def layer_outputs(model, batch):
    """By hooks of the test's own."""
    found = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: found.append(out if torch.is_tensor(out) else out[0]))
        for layer in model.model.layers
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    return [hidden[mask] for hidden in found]


def distillation(model, batch, teacher):
    pairs = list(zip(layer_outputs(model, batch), layer_outputs(teacher, batch), strict=True))
    return sum((mine - theirs.detach()).square().mean() for mine, theirs in pairs) / len(pairs)


def transport(model, batch, anchor):
    total = 0.0
    for hidden, mean, variance in zip(layer_outputs(model, batch), anchor.mean, anchor.variance, strict=True):
        spread = (hidden.var(dim=0, unbiased=False) + 1e-6).sqrt() - (variance + 1e-6).sqrt()
        total = total + (hidden.mean(dim=0) - mean).square().mean() + spread.square().mean()
    return total


@ACCUMULATION
@pytest.mark.parametrize("method", ["distillation", "transport"])
def test_layer_penalties_add_their_autograd_gradient(record, make_language_model, make_anchor, method, accumulation):
    start = make_language_model().eval()
    anchor = make_anchor(start)
    for step, (model, batches, applied) in enumerate(
        record(**METHODS[method], gradient_accumulation_steps=accumulation)
    ):
        distances = [
            distillation(model, batch, start) if method == "distillation" else transport(model, batch, anchor)
            for batch in batches
        ]
        assert step == 0 or sum(distances) > 0
        close(applied, gradients(model, sum(task_losses(model, batches)) + 3.0 * sum(distances) / accumulation))


@pytest.mark.parametrize("whole", [None, True, False])
def test_penalties_have_their_share_of_a_loss_of_ones_own(record, replayed, whole):
    """`compute_loss_func` counts as normalised over the step, unless `loss_is_scaled_for_ga` says otherwise."""

    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    def prepare(trainer):
        trainer.loss_is_scaled_for_ga = whole
        # Else the model's own rule would say the same as that of `compute_loss_func`.
        trainer.model_accepts_loss_kwargs = False

    changes = {**METHODS["cotrain"], "gradient_accumulation_steps": 2, "max_steps": 1}
    model, batches, applied = next(record(**changes, prepare=prepare, options={"compute_loss_func": own_loss}))
    task = sum(own_loss(model(**batch), None) for batch in batches) / (2 if whole is False else 1)
    added = sum(token_losses(model, replayed[number]).mean() for number in range(2)) / 2
    close(applied, gradients(model, task + 0.5 * added))


def test_a_replayed_batch_is_one_of_training(make_language_model, train, tmp_path):
    """With dropout a resumed run, whose model was not yet in training mode, shows whether it was replayed with it."""
    changes = {**METHODS["a_gem"], "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trained = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-1"))):
        model = make_language_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        modes = []
        model.register_forward_pre_hook(lambda module, _, modes=modes: modes.append(module.training))
        trained.append(train(model=model.eval(), resume=resume, output_dir=str(tmp_path / name), **changes).model)
        assert modes == [True] * (4 if resume is None else 2)
    for (name, first), second in zip(trained[0].named_parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(first, second), name


def test_the_fisher_information_has_the_precision_of_training(
    make_language_model, make_args, token_dataset, replay_dataset, monkeypatch
):
    found = {}

    def noted(*arguments, **options):
        found.update(fisher_diagonal(*arguments, **options))
        return found

    fisher_diagonal = preservation.fisher_diagonal
    monkeypatch.setattr(preservation, "fisher_diagonal", noted)
    args = make_args(**METHODS["ewc"], fisher_samples=3, bf16=True)
    AEGISTrainer(make_language_model(), args, train_dataset=token_dataset, replay_dataset=replay_dataset)
    model = make_language_model().eval()
    singles = ReplayBatches(replay_dataset, torch.utils.data.default_collate, 1, seed=4)
    by_precision = []
    for enabled in (True, False):
        expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for number in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(**singles[number]).loss
            expected = {n: f + gradients_n.square() / 3 for (n, f), gradients_n in
                        zip(expected.items(), gradients(model, loss).values(), strict=True)}  # fmt: skip
        by_precision.append(expected)
    for name, value in by_precision[0].items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-9, msg=name)
    assert any(not torch.allclose(found[n], value, rtol=1e-3) for n, value in by_precision[1].items())


def test_a_replayed_gradient_that_is_not_finite_is_counted(train, tmp_path, caplog):
    """The method is off in such a step, which must not go unseen; a resumed run goes on counting."""

    def prepare(trainer):
        replay_loss = trainer.preservation._replay_loss

        def poisoned(batch):
            return replay_loss(batch) * (float("nan") if trainer.state.global_step in (1, 2, 4) else 1.0)

        trainer.preservation._replay_loss = poisoned

    changes = {**METHODS["a_gem"], "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = train(prepare=prepare, **changes)
    assert (whole.unprotected_steps, whole.non_finite_guard.skipped_steps) == (3, 0)
    logged = [r.get("unprotected_steps") for r in whole.state.log_history if "loss" in r]
    assert logged == [None, 1, 2, 2, 3, 3]
    messages = [r.getMessage() for r in caplog.records if "unprotected_steps" in r.getMessage()]
    assert len(messages) == 1
    assert "step 2 is not finite" in messages[0]
    resumed = train(resume=str(tmp_path / "out" / "checkpoint-3"), prepare=prepare, **changes)
    assert resumed.unprotected_steps == 3


def test_a_failed_training_leaves_nothing_to_the_next(train, make_language_model):
    """Not even the number of its micro-batch, by which batches are replayed."""

    class Fail(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    def prepare(trainer):
        trainer.add_callback(fail := Fail())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(fail)
        trainer.model.zero_grad()

    changes = {**METHODS["cotrain"], "gradient_accumulation_steps": 2, "max_steps": 2}
    first, second = train(**changes), train(prepare=prepare, **changes)
    for (name, one), other in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    losses = [[r["replay_loss"] for r in t.state.log_history if "loss" in r] for t in (first, second)]
    assert losses[0] == losses[1]


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
        assert any(r[key] > 0 for r in records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection_target": "weights"}, "projection_target must be one of"),
        ({"projection_metric": "sgd"}, "projection_metric must be one of"),
        ({"reference_interval": 0}, "reference_interval must be at least 1, found 0"),
        ({"reference_share": 0.0}, "reference_share must lie in (0, 1], found 0.0"),
        ({"reference_share": 0.5, "dual_backward": "two_pass"}, "reference_share=0.5 needs dual_backward"),
        ({"reference_share": 0.5, "per_device_train_batch_size": 1}, "has no effect with per_device_train_batch_size"),
        ({"reference_share": 0.9, "per_device_train_batch_size": 2}, "has no effect with per_device_train_batch_size"),
        ({"preserve": "none", "reference_interval": 2}, "reference_interval=2 has no effect with"),
        ({**REPLAYED, "reference_share": 0.5}, "reference_share=0.5 has no effect with reference"),
        ({"restoring": -1.0}, "restoring must be finite and not negative"),
        ({"preserve": "none", "restoring": 1.0}, "restoring=1.0 has no effect with"),
        ({**REPLAYED, "projection_target": "update"}, "projection_target='update' has no effect with reference"),
        ({**METHODS["replayed_transport"], "projection_metric": "adam"}, "projection_metric='adam' has no effect"),
        ({"projection_target": "update", "projection_metric": "adam"}, "projection_metric='adam' has no effect with"),
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
        ({**REPLAYED, "penalties": {"replay": 1.0}}, '"replay" cannot be combined with reference="replay"'),
        ({"preserve": "none", "granularity": "global"}, "granularity='global' has no effect with preserve=\"none\""),
        ({"preserve": "none", "penalty_scale": 2.0}, "penalty_scale=2.0 has no effect"),
        ({"preserve": "none", "projection_eps": 1e-3}, "projection_eps=0.001 has no effect"),
        ({"preserve": "none", "dual_backward": "two_pass"}, "dual_backward='two_pass' has no effect"),
        ({**REPLAYED, "penalty_scale": 2.0}, 'penalty_scale=2.0 has no effect with reference="replay"'),
        ({**REPLAYED, "dual_backward": "two_pass"}, "dual_backward='two_pass' has no effect with reference"),
        (
            {**REPLAYED, "combiner": "graddrop", "projection_eps": 1e-3},
            'projection_eps=0.001 has no effect with combiner="graddrop"',
        ),
        ({**METHODS["replayed_transport"], "combiner": "pcgrad"}, "combiner='pcgrad' needs reference=\"replay\""),
        ({**METHODS["replayed_transport"], "penalty_scale": 2.0}, "penalty_scale=2.0 has no effect with reference"),
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
        ("replayed_transport", 'preserve="projection" with reference="replayed_transport" needs an anchor'),
    ],
)
def test_what_a_method_needs_is_asked_for(make_language_model, make_args, token_dataset, method, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AEGISTrainer(make_language_model(), make_args(**METHODS[method]), train_dataset=token_dataset)


def test_a_policys_questions_need_a_processor(make_flow_model, make_args, token_dataset, replay_dataset):
    with pytest.raises(ValueError, match="give processing_class or replay_collator"):
        AEGISTrainer(
            make_flow_model(),
            make_args(**METHODS["a_gem"]),
            data_collator=list,
            train_dataset=token_dataset,
            replay_dataset=replay_dataset,
        )


def test_replayed_batches_are_functions_of_their_number():
    batches = ReplayBatches(range(12), list, 5, seed=1)
    forwards = [batches[number] for number in range(8)]
    again = ReplayBatches(range(12), list, 5, seed=1)
    for number in (3, 0, 2, 1, 7):
        assert forwards[number] == again[number]
    passes = [forwards[number] + forwards[number + 1] for number in (0, 2, 4, 6)]
    for one in passes:
        assert len(set(one)) == 10, "no sample comes twice in one pass"
    assert len({tuple(one) for one in passes}) == 4, "each pass has its own order"
    assert forwards[0] != ReplayBatches(range(12), list, 5, seed=2)[0]
    with pytest.raises(ValueError, match="replay_dataset has 12 samples, fewer than a batch of 13"):
        ReplayBatches(range(12), list, 13, seed=1)


def test_fisher_samples_beyond_the_data_are_refused(make_language_model, make_args, token_dataset, replay_dataset):
    args = make_args(**METHODS["ewc"], fisher_samples=13)
    with pytest.raises(ValueError, match="fisher_samples=13, but replay_dataset has 12 samples"):
        AEGISTrainer(
            make_language_model(), args, train_dataset=token_dataset, replay_dataset=copy.copy(replay_dataset)
        )
