"""The approximate reference directions: kept for several backward passes, or of a share of the batch."""

import copy

import pytest
import torch

from hf_aegis.gradients import GradientShield


KINDS = ("gemma2", "llama", "qwen2", "paligemma2")
SEEDS = {"gemma2": (0, 0.5), "llama": (0, 2.0), "qwen2": (3, 2.0), "paligemma2": (2, 1.0)}


def step(case, shield, batch=None):
    """The gradients of one backward pass alone."""
    case.model.zero_grad()
    with shield:
        case.loss(batch).backward()
    return case.gradients()


def with_batch(case, batch):
    """The same model and anchor, and an oracle for another batch."""
    other = copy.copy(case)
    other.batch = batch
    return other


def first_rows(batch, rows):
    """The batch's first samples; there may be several pictures to one."""
    size = len(batch["input_ids"])
    return {name: value[: rows * len(value) // size] for name, value in batch.items()}


# -- kept for several backward passes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "granularity", "checkpointing"),
    [
        ("streaming", "layer", True),
        ("streaming", "global", False),
        ("two_pass", "tensor", True),
        ("two_pass", "layer", False),
    ],
)
def test_every_third_backward_pass_computes_the_reference(
    form, granularity, checkpointing, make_case, make_batch, assert_same
):
    case = make_case("gemma2", checkpointing=checkpointing, push=0.5)
    cases = [with_batch(case, make_batch("gemma2", torch.float64, seed=seed)) for seed in range(4)]
    oracle = [each.differentiate()[:2] for each in cases]
    shield = GradientShield(case.model, case.anchor, dual_backward=form, granularity=granularity, reference_interval=3)
    shed = 0.0
    for index, each in enumerate(cases):
        task, reference = oracle[index][0], oracle[index - index % 3][1]
        expected, scalars = each.project(task, reference, granularity)
        assert_same(step(each, shield), expected, 1e-8)
        found = dict(zip(shield.report.groups, shield.report.alpha.tolist(), strict=True))
        assert found == pytest.approx({unit: s.alpha for unit, s in scalars.items()}, rel=1e-6, abs=1e-9)
        if index % 3:
            shed = max(shed, *(abs(s.alpha) for s in scalars.values()))
            exact, _ = each.project(*oracle[index], granularity)
            with pytest.raises(AssertionError, match="relative difference"):
                assert_same(expected, exact, 1e-6)
        # The penalty that is reported is that of the batch at hand.
        terms = each.differentiate()[2]
        assert shield.report.mean_term.tolist() == pytest.approx([float(m.detach()) for m, _ in terms], rel=1e-6)
    assert shed > 0


def test_recomputation_is_not_shared_where_there_is_one_product(make_case):
    case = make_case("llama", torch.float32, checkpointing=True)
    shield = GradientShield(case.model, case.anchor, reference_interval=2)
    products = []
    for _ in range(4):
        calls = []
        handle = case.model.model.layers[1].mlp.down_proj.weight.register_hook(lambda _, calls=calls: calls.append(1))
        step(case, shield)
        handle.remove()
        products.append(len(calls))
    # A hook on a weight is called for each gradient of it, those of the reference among them.
    assert products == [2, 1, 2, 1]


def test_what_is_kept_is_not_of_a_failed_or_non_finite_pass(make_case, make_batch, assert_same):
    case = make_case("gemma2", push=0.5)
    other = with_batch(case, make_batch("gemma2", torch.float64, seed=5))
    expected, _ = other.project(*other.differentiate()[:2])
    shield = GradientShield(case.model, case.anchor, reference_interval=3)

    def explode(*_):
        raise ZeroDivisionError

    handle = case.model.model.layers[0].mlp.up_proj.weight.register_hook(explode)
    with pytest.raises(ZeroDivisionError):
        step(case, shield)
    handle.remove()
    assert_same(step(other, shield), expected, 1e-8)

    shield = GradientShield(case.model, case.anchor, reference_interval=3)
    weight = case.model.model.layers[1].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    step(case, shield)
    assert shield.report.dropped
    with torch.no_grad():
        weight.copy_(before)
    assert_same(step(other, shield), expected, 1e-8)


def test_another_set_of_trained_parameters_begins_anew(make_case, make_batch, assert_same):
    case = make_case("gemma2", push=0.5)
    shield = GradientShield(case.model, case.anchor, reference_interval=10)
    step(case, shield)
    case.model.model.layers[2].requires_grad_(False)
    other = with_batch(case, make_batch("gemma2", torch.float64, seed=5))
    expected, _ = other.project(*other.differentiate()[:2])
    assert_same(step(other, shield), expected, 1e-8)


# -- of a share of the batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_rows_gives_their_reference(kind, checkpointing, make_case, assert_same):
    seed, push = SEEDS[kind]
    case = make_case(kind, seed=seed, push=push, size=5, checkpointing=checkpointing)
    part = with_batch(case, first_rows(case.batch, 2))
    task, (_, reference, terms) = case.differentiate()[0], part.differentiate()
    for granularity in ("layer", "global"):
        expected, scalars = case.project(task, reference, granularity)
        # (This Qwen2 has no conflict over all groups together.)
        assert any(s.dot < 0 for s in scalars.values()) or (kind, granularity) == ("qwen2", "global")
        shield = GradientShield(case.model, case.anchor, granularity=granularity, reference_share=0.3)
        # The norms within transformers' layers are in float32.
        assert_same(step(case, shield), expected, 1e-6)
        assert shield.report.mean_term.tolist() == pytest.approx([float(m.detach()) for m, _ in terms], rel=1e-5)
        assert shield.report.std_term.tolist() == pytest.approx([float(s.detach()) for _, s in terms], rel=1e-5)


def test_the_two_passes_of_a_reduced_batch_give_the_same_reference(make_case):
    """What the shield shows to an observer, against the two-pass form on the first rows alone."""
    case = make_case("llama", size=4)
    seen = []
    for batch, options in (
        (case.batch, {"reference_share": 0.5}),
        (first_rows(case.batch, 2), {"dual_backward": "two_pass"}),
    ):
        references = {}
        shield = GradientShield(case.model, case.anchor, **options)
        shield.on_reference = lambda _, name, reference, references=references: references.update({name: reference})
        step(case, shield, batch)
        seen.append(references)
    # What only reads the last layer's output has no reference.
    assert seen[0].keys() == seen[1].keys() == case.parameters().keys() - {"lm_head.weight", "model.norm.weight"}
    for name, reference in seen[0].items():
        torch.testing.assert_close(reference, seen[1][name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("size", "share"), [(3, 1.0), (3, 0.99), (1, 0.5)])
def test_all_rows_are_the_default_bit_for_bit(size, share, make_case):
    case = make_case("gemma2", torch.float32, size=size, checkpointing=True)
    expected = step(case, GradientShield(case.model, case.anchor))
    found = step(case, GradientShield(case.model, case.anchor, reference_share=share))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_each_part_is_recomputed_once(make_case):
    case = make_case("llama", torch.float32, size=4, checkpointing=True)
    rows = []
    case.model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    step(case, GradientShield(case.model, case.anchor, reference_share=0.25))
    assert sorted(rows) == [1, 1, 3, 3]


def test_share_and_interval_together(make_case, make_batch, assert_same):
    case = make_case("llama", size=4)
    shield = GradientShield(case.model, case.anchor, reference_share=0.5, reference_interval=2)
    part = with_batch(case, first_rows(case.batch, 2))
    reference = part.differentiate()[1]
    step(case, shield)
    other = with_batch(case, make_batch("llama", torch.float64, seed=4, size=4))
    expected, _ = other.project(other.differentiate()[0], reference)
    assert_same(step(other, shield), expected, 1e-6)


def test_layers_get_their_own_forward_back(make_case):
    case = make_case("llama", size=4)
    shield = GradientShield(case.model, case.anchor, reference_share=0.5)
    layers = list(shield.layers)
    own = layers[1].forward
    layers[1].forward = own
    with shield:
        assert all("forward" in vars(layer) for layer in layers)
        with torch.no_grad():
            case.loss()
    assert ["forward" in vars(layer) for layer in layers] == [False, True, False]
    assert layers[1].forward is own


@pytest.mark.parametrize("kind", ["llama", "paligemma2"])
def test_a_decoders_cache_is_off_within_the_block(kind, make_case):
    """As it is on in configurations by default, and the Trainer turns off that of the outermost alone."""
    case = make_case(kind, torch.float32, size=4)
    expected = step(case, GradientShield(case.model, case.anchor, reference_share=0.5))
    config = case.model.config.get_text_config()
    config.use_cache = True
    found = step(case, GradientShield(case.model, case.anchor, reference_share=0.5))
    assert config.use_cache is True
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_cannot_be_split_is_refused(make_case):
    case = make_case("llama", size=4)
    with (
        pytest.raises(ValueError, match=r"called with a DynamicCache, .*use_cache=False"),
        GradientShield(case.model, case.anchor, reference_share=0.5),
    ):
        case.model(**case.batch, use_cache=True)
    for options, message in (
        ({"reference_share": 0.5, "dual_backward": "two_pass"}, 'reference_share=0.5 needs dual_backward="streaming"'),
        ({"reference_share": 0.0}, r"reference_share must lie in \(0, 1\], found 0.0"),
        ({"reference_share": 1.5}, r"reference_share must lie in \(0, 1\], found 1.5"),
        ({"reference_interval": 0}, "reference_interval must be at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientShield(case.model, case.anchor, **options)
