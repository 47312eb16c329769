"""The dual backward with routed experts, whose balance loss leaves each decoder layer by a side way."""

import warnings

import pytest
import torch
from peft import get_peft_model

from hf_aegis import GSEConfig
from hf_aegis.anchors import InputSubspace
from hf_aegis.gradients import GradientShield, HeldSubspace
from hf_aegis.gradients.linear_sites import find_linear_sites


OPTIONS = {"r": 4, "num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.5}


def with_experts(case):
    torch.manual_seed(0)
    # Not the layers of a vision tower.
    targets = r"(?!.*vision_tower).*layers\.\d+\..*_proj"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        config = GSEConfig(target_modules=targets, **OPTIONS)
        case.model = get_peft_model(case.model, config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in case.parameters().values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    task = case.loss

    def loss():
        return task() + case.model.get_auxiliary_loss()

    case.loss = loss
    return case


@pytest.mark.parametrize(("kind", "seed", "push"), [("gemma2", 0, 0.5), ("paligemma2", 3, 1.0)])
def test_both_forms_equal_the_oracle_on_experts(kind, seed, push, make_case, assert_same):
    case = with_experts(make_case(kind, torch.float64, seed=seed, push=push))
    task, reference, _ = case.differentiate()
    expected, scalars = case.project(task, reference, "layer")
    conflicts = [unit for unit, s in scalars.items() if s.dot < 0]
    assert conflicts
    routers = [name for name in expected if "gse_router" in name]
    assert len(routers) == 3 * 7 and all(expected[name].norm() > 0 for name in routers)
    for form in ("streaming", "two_pass"):
        for checkpointing in (False, True):
            if checkpointing:
                case.model.activation_checkpointing_enable()
            else:
                case.model.activation_checkpointing_disable()
            case.model.zero_grad()
            shield = GradientShield(case.model, case.anchor, dual_backward=form)
            with shield:
                case.loss().backward()
            assert_same(case.gradients(), expected, 1e-8)
            assert sorted(shield.report.groups) == sorted(scalars)


def test_held_subspaces_do_not_know_experts(make_case):
    case = with_experts(make_case("gemma2", torch.float32))
    subspaces = [
        InputSubspace((site.name,), torch.eye(site.linear.in_features)[:, :2], torch.ones(2), 4.0)
        for site in find_linear_sites(case.model)
    ]
    with pytest.raises(ValueError, match="cannot hold a Linear, only LoRA adapters on a linear"):
        HeldSubspace(case.model, subspaces)
