"""Both forms of the dual backward on the shipped PaliGemma 2, with the flow loss of shipped demonstrations."""

import pytest
import torch

from hf_aegis.gradients import GradientShield


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_streaming_two_pass_and_the_oracle_agree(dtype, tolerance, make_embedded_case, assert_same):
    case = make_embedded_case(dtype)
    task, reference, _ = case.differentiate()
    expected, scalars = case.project(task, reference)
    assert set(scalars) == {*(f"layers.{index}" for index in range(4)), "embeddings", "multi_modal_projector"}
    # Without a conflict that matters nothing would be tested.
    assert sum(s.dot < 0 for s in scalars.values()) >= 1
    assert 1 - sum(s.projected for s in scalars.values()) / sum(s.task for s in scalars.values()) > 1e-3
    protected = [name for name in expected if case.group_of(name) is not None]
    assert not any(name.startswith("action_expert") for name in protected)

    found = {}
    for checkpointing in (False, True):
        if checkpointing:
            case.model.activation_checkpointing_enable()
        for form in ("streaming", "two_pass"):
            case.model.zero_grad()
            shield = GradientShield(case.model, case.anchor, dual_backward=form)
            with shield:
                case.loss().backward()
            gradients = case.gradients()
            assert sorted(shield.report.groups) == sorted(scalars)
            assert_same(gradients, expected, tolerance)
            found[form, checkpointing] = {name: gradients[name] for name in protected}
            assert_same(found[form, checkpointing], {name: expected[name] for name in protected}, tolerance)
        assert_same(found["streaming", checkpointing], found["two_pass", checkpointing], tolerance)
    assert_same(found["streaming", True], found["streaming", False], tolerance)
