"""Holding LoRA adapters, and modules that PEFT copied, on the subspaces of their inputs."""

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from hf_aegis.anchors import InputSubspace
from hf_aegis.gradients import HeldSubspace
from hf_aegis.gradients.linear_sites import find_linear_sites


RANK, WIDTH = 5, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + self.second(torch.tanh(self.first(hidden)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, inputs):
        hidden = self.projector(inputs)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


NAMES = [f"layers.{index}.{name}" for index in (0, 1) for name in ("first", "second")]


def basis_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))[0]


def groups(names=NAMES):
    return [InputSubspace((name,), basis_of(seed), torch.ones(RANK), 8.0) for seed, name in enumerate(names)]


def adapted(config=None, **options):
    torch.manual_seed(0)
    network = Network()
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(network, config)


def train(model, held, steps=50):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        inputs = torch.randn(8, WIDTH)
        (model(inputs) - inputs.cos()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        held()


def test_adapters_leave_the_subspace_alone():
    model = adapted()
    base = copy.deepcopy(model.get_base_model())
    inputs = torch.randn(8, WIDTH)
    before = model(inputs)
    held = HeldSubspace(model, groups())
    assert set(held.weights) == {f"{name}.lora_A.default" for name in NAMES}
    # While B is zero A is brought on the constraint, and nothing is changed by that.
    assert max(held.deviation().values()) < 1e-6
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=0)
    train(model, held)
    assert max(held.deviation().values()) < 1e-6
    for seed, name in enumerate(NAMES):
        inside = torch.randn(20, RANK) @ basis_of(seed).T
        now, then = (m.get_submodule(name) for m in (model.get_base_model(), base))
        torch.testing.assert_close(now(inside), then.base_layer(inside), rtol=1e-4, atol=1e-5)
        assert (now(torch.eye(WIDTH)) - then.base_layer(torch.eye(WIDTH))).norm() > 0.01


def test_an_adapter_is_taken_up_again_only_where_it_is_on_the_constraint():
    model = adapted()
    train(model, HeldSubspace(model, groups()), steps=5)
    HeldSubspace(model, groups())
    with torch.no_grad():
        model.get_base_model().layers[1].second.lora_A["default"].weight += 0.1
    with pytest.raises(ValueError, match=r"layers\.1\.second\.lora_A\.default already changes .*merge the adapter"):
        HeldSubspace(model, groups())
    # Softly it need not be there.
    HeldSubspace(model, groups(), softness=1.0)


def test_a_frozen_matrix_a_is_brought_on_the_constraint_for_its_b():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    base = copy.deepcopy(model.get_base_model())
    train(model, HeldSubspace(model, groups()))
    inside = torch.randn(20, RANK) @ basis_of(0).T
    now, then = (m.get_submodule(NAMES[0]) for m in (model.get_base_model(), base))
    torch.testing.assert_close(now(inside), then(inside), rtol=1e-4, atol=1e-5)
    assert (now(torch.eye(WIDTH)) - then(torch.eye(WIDTH))).norm() > 0.01


def test_copies_that_peft_trains_are_held():
    model = adapted(modules_to_save=["projector"])
    held = HeldSubspace(model, groups([*NAMES, "projector.0"]))
    wrapper = model.get_base_model().projector
    assert held.weights["projector.0"].linear is wrapper.modules_to_save["default"][0]
    assert "projector.modules_to_save.default.0.bias" in held.frozen
    start = wrapper.original_module[0].weight.detach().clone()
    train(model, held)
    change = wrapper.modules_to_save["default"][0].weight.detach() - start
    assert (change @ basis_of(len(NAMES))).norm() < 1e-4 * change.norm()


def test_the_copy_that_runs_comes_first():
    model = adapted(modules_to_save=["projector"])
    model.add_adapter("other", model.peft_config["default"])
    copies = model.get_base_model().projector.modules_to_save
    for running, idle in (("default", "other"), ("other", "default")):
        model.set_adapter(running)
        found = [site.module for site in find_linear_sites(model) if site.name == "projector.0"]
        assert [id(module) for module in found] == [id(copies[running][0]), id(copies[idle][0])]


def test_adapters_without_subspace_are_refused():
    with pytest.raises(ValueError, match=r"no subspace of their inputs: \['layers\.1\.second'\]"):
        HeldSubspace(adapted(), groups(NAMES[:-1]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=4, target_modules=["first", "second"], use_dora=True), "variants of LoRA such as DoRA"),
        (
            IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
            r"layers\.0\.first: cannot hold a Linear, only LoRA adapters",
        ),
    ],
)
def test_other_adapters_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        HeldSubspace(adapted(config), groups())
