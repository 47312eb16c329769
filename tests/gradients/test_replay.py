"""The replay shield against two plain backward passes and the combiners' formulas on flat NumPy vectors."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_aegis.gradients import ReplayShield


# PEFT asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
COMBINERS = pytest.mark.parametrize("combiner", ["one_sided", "pcgrad", "graddrop"])
EPS = 1e-12


@pytest.fixture
def make_pair(make_case, make_batch):
    """A case and a replay loss on another batch, whose gradients conflict in some groups and agree in others."""

    def make(kind="gemma2", dtype=torch.float64, **options):
        case = make_case(kind, dtype, **options)
        other = make_batch(kind, dtype, seed=5)
        return case, lambda: case.model(**other).loss.mean()

    return make


def plain_gradients(case, loss):
    """By one autograd call, `None` where a parameter is not used."""
    parameters = case.parameters()
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def combine(combiner, case, task, reference, granularity="layer", seed=0, step=0, drawn=torch.float64):
    """The oracle: flat vectors per unit, formulas in NumPy, GradDrop's numbers drawn in the order of the units."""
    units = {}
    for name, gradient in task.items():
        group = case.group_of(name) or ("other" if reference[name] is not None else None)
        used = gradient is not None or (combiner != "one_sided" and reference[name] is not None)
        if group is not None and used:
            units.setdefault({"layer": group, "global": "global", "tensor": name}[granularity], []).append(name)
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    expected, conflicts = dict(task), 0
    for unit in sorted(units, key=lambda u: (not u.startswith("layers."), u)):
        names = units[unit]
        like = [task[n] if task[n] is not None else reference[n] for n in names]
        g, r = (
            np.concatenate([(np.zeros(t.numel()) if grads[n] is None else grads[n].numpy().ravel())
                            for n, t in zip(names, like, strict=True)])
            for grads in (task, reference)
        )  # fmt: skip
        d = min(g @ r, 0.0)
        conflicts += d < 0
        if combiner == "one_sided":
            flat = g - d / (r @ r + EPS) * r
        elif combiner == "pcgrad":
            flat = g - d / (r @ r + EPS) * r + r - d / (g @ g + EPS) * g
        else:
            uniform = torch.cat([torch.rand(t.shape, generator=generator, dtype=drawn).flatten() for t in like])
            size = np.abs(g) + np.abs(r)
            purity = 0.5 * (1 + (g + r) / np.where(size == 0, 1, size))
            u = uniform.numpy()
            flat = sum(v * (((purity > u) & (v > 0)) | ((purity < u) & (v < 0))) for v in (g, r))
        for name, tensor, part in zip(
            names, like, np.split(flat, np.cumsum([t.numel() for t in like])[:-1]), strict=True
        ):
            expected[name] = torch.from_numpy(part).view_as(tensor)
    return expected, conflicts, len(units)


def run(case, replay_loss, **options):
    case.model.zero_grad()
    shield = ReplayShield(case.model, replay_loss, **options)
    with shield:
        case.loss().backward()
    return case.gradients(), shield.report


@COMBINERS
@pytest.mark.parametrize("kind", ["gemma2", "paligemma2"])
@pytest.mark.parametrize("granularity", ["layer", "global"])
def test_it_equals_the_oracle(combiner, kind, granularity, make_pair, assert_same):
    case, replay_loss = make_pair(kind)
    task = plain_gradients(case, case.loss)
    conflicts = {}
    for sign in (1.0, -1.0):  # what agrees with the one conflicts with the other
        expected, conflicts[sign], count = combine(
            combiner, case, task, plain_gradients(case, lambda sign=sign: sign * replay_loss()), granularity
        )
        found, report = run(case, lambda sign=sign: sign * replay_loss(), combiner=combiner, granularity=granularity)
        assert_same(found, expected, 1e-12)
        assert len(report.groups) == count
        assert report.summary()["throttle_rate"] == pytest.approx(conflicts[sign] / count)
    assert sum(conflicts.values()) == count


@COMBINERS
def test_checkpointed_lora_and_tied_embeddings(combiner, make_pair, assert_same):
    case, replay_loss = make_pair("gemma2")
    assert case.model.lm_head.weight is case.model.model.embed_tokens.weight
    case.model = get_peft_model(case.model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).double()
    case.model.get_input_embeddings().requires_grad_(True)
    for name, parameter in case.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    task = plain_gradients(case, case.loss)
    total = 0
    for sign in (1.0, -1.0):
        case.model.get_base_model().activation_checkpointing_disable()
        reference = plain_gradients(case, lambda sign=sign: sign * replay_loss())
        expected, conflicts, _ = combine(combiner, case, task, reference)
        case.model.get_base_model().activation_checkpointing_enable()
        found, _ = run(case, lambda sign=sign: sign * replay_loss(), combiner=combiner)
        assert_same(found, expected, 1e-10)
        total += conflicts
    assert total > 0


@COMBINERS
def test_bfloat16_gradients_are_combined_without_further_loss(combiner, make_pair, assert_same):
    """Up to one rounding, the result is that of float64 for the same bfloat16 gradients."""
    case, replay_loss = make_pair("gemma2", torch.bfloat16)
    task, turned = (
        {name: gradient.double() for name, gradient in plain_gradients(case, loss).items()}
        for loss in (case.loss, lambda: -replay_loss())
    )
    found, report = run(case, lambda: -replay_loss(), combiner=combiner)
    assert all(g.dtype == torch.bfloat16 for g in found.values())
    expected, conflicts, _ = combine(combiner, case, task, turned, drawn=torch.float32)
    assert conflicts
    assert_same(found, expected, 2**-8)
    case.model.double()
    assert report.summary()["replay_loss"] == pytest.approx(-replay_loss().item(), rel=0.05)


@COMBINERS
def test_accumulation(combiner, make_pair, make_batch, assert_same):
    """Two micro-batches, each combined on its own, with both losses divided by two."""
    case, replay_loss = make_pair("gemma2")
    batches = [case.batch, make_batch("gemma2", torch.float64, seed=9)]
    total = {}
    for step, batch in enumerate(batches):
        task = plain_gradients(case, lambda batch=batch: case.loss(batch) / 2)
        reference = plain_gradients(case, lambda: -replay_loss() / 2)
        expected, _, _ = combine(combiner, case, task, reference, seed=3, step=7 + step)
        total = {name: gradient + total.get(name, 0) for name, gradient in expected.items()}
    case.model.zero_grad()
    shield = ReplayShield(case.model, lambda: -replay_loss(), combiner=combiner, seed=3)
    shield.replay_scale, shield.step = 0.5, 7
    for batch in batches:
        with shield:
            (case.loss(batch) / 2).backward()
    assert shield.step == 9
    assert_same(case.gradients(), total, 1e-12)
    assert shield.report.summary()["replay_loss"] == pytest.approx(-replay_loss().item())


def test_a_gem_leaves_agreeing_groups_bit_for_bit(make_pair):
    case, replay_loss = make_pair("gemma2", torch.float32)
    task, reference = plain_gradients(case, case.loss), plain_gradients(case, replay_loss)
    found, report = run(case, replay_loss)
    agreeing = {group for group, dot in zip(report.groups, report.dot.tolist(), strict=True) if dot >= 0}
    assert agreeing
    for name, gradient in found.items():
        if case.group_of(name) in agreeing:
            assert torch.equal(gradient, task[name])
    for group in report.groups:
        names = [name for name in found if case.group_of(name) == group]
        left, scale = (
            sum(float((a[n].double() * b[n].double()).sum()) for n in names)
            for a, b in ((found, reference), (reference, reference))
        )
        assert left >= -1e-6 * scale


@COMBINERS
def test_what_only_one_of_the_losses_reaches(combiner, make_pair):
    """The expert of π0 has no replay gradient here; the head has no task gradient."""
    case, _ = make_pair("gemma2")
    head = torch.nn.Linear(16, 1, dtype=torch.float64)
    case.model.reader = head
    with torch.no_grad():
        hidden = case.model.model(**{k: v for k, v in case.batch.items() if k != "labels"}).last_hidden_state

    def task_loss():
        states = case.model.model(**{k: v for k, v in case.batch.items() if k != "labels"}).last_hidden_state
        return head(states).mean()

    case.loss = task_loss
    case.model.lm_head.weight = torch.nn.Parameter(case.model.lm_head.weight.detach().clone())
    reference = plain_gradients(case, lambda: -case.model(**case.batch).loss)
    found, report = run(case, lambda: -case.model(**case.batch).loss, combiner=combiner)
    assert torch.equal(found["reader.weight"], plain_gradients(case, task_loss)["reader.weight"])
    torch.testing.assert_close(found["reader.weight"][0], hidden.mean(dim=(0, 1)))
    if combiner == "one_sided":
        assert found["lm_head.weight"] is None
    elif combiner == "graddrop":
        torch.testing.assert_close(found["lm_head.weight"], reference["lm_head.weight"])
    else:
        (alpha,) = report.alpha[[report.groups.index("embeddings")]]
        torch.testing.assert_close(found["lm_head.weight"], (1 - alpha) * reference["lm_head.weight"])


@COMBINERS
def test_exceptions_leave_the_gradients_as_they_were(combiner, make_pair, monkeypatch):
    case, replay_loss = make_pair("llama", torch.float32)
    case.loss().backward()
    before = case.gradients()
    fail = False

    def may_fail():
        if fail:
            raise KeyError("no batch")
        return replay_loss()

    shield = ReplayShield(case.model, may_fail, combiner=combiner)

    def check():
        assert all(torch.equal(p.grad, before[n]) for n, p in case.parameters().items())

    with pytest.raises(ZeroDivisionError), shield:
        (case.loss().backward(), 1 / 0)
    check()
    fail = True
    with pytest.raises(KeyError), shield:
        pass
    check()
    fail = False
    with monkeypatch.context() as patch:
        patch.setattr(shield._combiner, "combine", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), shield:
            case.loss().backward()
    check()
    with shield:
        case.loss().detach()
    check()
    assert shield.report is None
    assert shield.step == 0
    with shield:
        case.loss().backward()
    assert shield.report is not None
    with pytest.raises(RuntimeError, match="does not nest"), shield, shield:
        pass


@COMBINERS
def test_nothing_that_is_not_finite_reaches_a_gradient(combiner, make_pair, caplog):
    case, replay_loss = make_pair("llama", torch.float32)
    task = plain_gradients(case, case.loss)
    found, report = run(case, lambda: replay_loss() * float("nan"), combiner=combiner)
    assert all(torch.equal(found[name], task[name]) for name in found)
    assert report.dropped == []
    poisoned = case.model.model.layers[1].mlp.up_proj.weight
    hook = poisoned.register_hook(lambda gradient: gradient * float("inf"))
    case.model.zero_grad()
    poisoned.grad = torch.ones_like(poisoned)
    shield = ReplayShield(case.model, replay_loss, combiner=combiner)
    with shield:
        case.loss().backward()
    hook.remove()
    assert shield.report.dropped == ["layers.1"]
    assert "layers.1: not finite" in caplog.text
    assert torch.equal(poisoned.grad, torch.ones_like(poisoned))
    assert case.model.model.layers[1].self_attn.q_proj.weight.grad is None
    assert case.model.model.layers[0].self_attn.q_proj.weight.grad is not None
    with ReplayShield(case.model, replay_loss, combiner=combiner, drop_non_finite=False):
        (case.loss() * float("nan")).backward()
    assert torch.isnan(poisoned.grad).all()


def test_an_expert_that_is_not_finite_is_dropped_alone(make_pair):
    case, replay_loss = make_pair("llama", torch.float32)
    case.model.expert = torch.nn.Linear(1, 1)
    shield = ReplayShield(case.model, replay_loss)
    with shield:
        (case.loss() + case.model.expert(torch.full((1, 1), float("inf"))).nan_to_num(posinf=0.0).sum()).backward()
    assert shield.report.dropped == ["unprotected"]
    assert case.model.expert.weight.grad is None
    assert all(p.grad is not None for p in case.model.model.parameters())


def test_graddrop_draws_by_seed_and_step(make_pair):
    case, replay_loss = make_pair("llama", torch.float32)
    state = copy.deepcopy(case.model.state_dict())

    def draw(seed, step):
        case.model.load_state_dict(state)
        case.model.zero_grad()
        shield = ReplayShield(case.model, lambda: -replay_loss(), combiner="graddrop", seed=seed)
        shield.step = step
        before = torch.get_rng_state()
        with shield:
            case.loss().backward()
        assert torch.equal(torch.get_rng_state(), before)
        return case.model.model.layers[0].mlp.up_proj.weight.grad.clone()

    first = draw(0, 4)
    assert torch.equal(first, draw(0, 4))
    assert not torch.equal(first, draw(0, 5))
    assert not torch.equal(first, draw(1, 4))


@COMBINERS
def test_the_report(combiner, make_pair):
    case, replay_loss = make_pair("gemma2")
    task = plain_gradients(case, case.loss)
    found, report = run(case, lambda: -replay_loss(), combiner=combiner)
    total, left = (sum(float(g.square().sum()) for g in gradients.values()) for gradients in (task, found))
    summary = report.summary()
    assert set(summary) == {
        "throttle_rate", "energy_shed", "cosine", "alpha", "vlm_grad_norm", "vlm_grad_norm_projected", "replay_loss",
    }  # fmt: skip
    assert summary["vlm_grad_norm"] == pytest.approx(total**0.5)
    assert summary["vlm_grad_norm_projected"] == pytest.approx(left**0.5)
    assert summary["energy_shed"] == pytest.approx(1 - left / total)
    assert summary["replay_loss"] == pytest.approx(-replay_loss().item())
    detail = report.per_group()
    assert detail["penalty_mean_term"] == detail["penalty_std_term"] == []
    assert len(detail["energy_shed"]) == len(report.groups) == 4


def test_refusals(make_pair):
    case, replay_loss = make_pair("llama", torch.float32)
    with pytest.raises(ValueError, match="granularity must be one of"):
        ReplayShield(case.model, replay_loss, granularity="layers")
    with pytest.raises(ValueError, match="combiner must be one of"):
        ReplayShield(case.model, replay_loss, combiner="agem")
    with pytest.raises(ValueError, match="seed must not be negative"):
        ReplayShield(case.model, replay_loss, seed=-1)
    for loss, message in (
        (lambda: 1.0, "differentiable scalar tensor, found float"),
        (lambda: torch.zeros(2, requires_grad=True), r"found shape \(2,\)"),
        (lambda: torch.zeros((), requires_grad=True), "reaches no trainable parameter of the LlamaForCausalLM"),
    ):
        with pytest.raises(ValueError, match=message), ReplayShield(case.model, loss):
            pass
    case.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="decoder layer 0 is checkpointed with use_reentrant=True"):
        ReplayShield(case.model, replay_loss).__enter__()
