"""Holding pairs of an output and an input direction: which they are, and that they and nothing else are held."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_aegis.anchors import ActivationAnchor, InputSubspace
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.gradients import HeldSubspace, HeldWeight
from hf_aegis.gradients.held_pairs import sensitivity_threshold


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 24, bias=False)
        self.up = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.gate(hidden)) * self.up(hidden))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, hidden):
        return self.layers[0](hidden)


def orthonormal(width, rank, generator):
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]


def anchor_of(decoder, groups, output_rank, dtype=torch.float64):
    """An anchor with random sensitivities, which range over orders of magnitude, for its subspaces."""
    generator = torch.Generator().manual_seed(5)
    anchor = object.__new__(ActivationAnchor)
    anchor.subspaces = {group.linears[0]: group for group in groups}
    anchor.sensitivities = {
        name: PairSensitivity(
            name,
            orthonormal(decoder.get_submodule(name).out_features, output_rank, generator).to(dtype),
            torch.randn(output_rank, group.rank, generator=generator).mul(2).exp(),
        )
        for group in groups
        for name in group.linears
    }
    return anchor


def subspaces(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return [
        InputSubspace(
            tuple(f"layers.0.{n}" for n in names), orthonormal(width, 5, generator).to(dtype), torch.ones(5), 8.0
        )
        for names, width in ((("gate", "up"), 16), (("down",), 24))
    ]


def train(model, held, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(8, 16, generator=generator)
        (model(inputs) - inputs.cos()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        held()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def anchor(model):
    return anchor_of(model, subspaces(), output_rank=6)


def pairs_of(weight, anchor, name):
    """Vᵀ W U."""
    basis = next(group.basis for group in anchor.subspaces.values() if name in group.linears)
    return anchor.sensitivities[name].output_basis.T.double() @ weight.detach().double() @ basis.double()


def masks(anchor, share, columns=None):
    """Of each linear, by putting the pairs in one list and taking from its front."""
    pairs = [
        (float(value), name, i, j)
        for name, found in anchor.sensitivities.items()
        for i, row in enumerate(found.sensitivities[:, :columns])
        for j, value in enumerate(row)
    ]
    total, taken = sum(pair[0] for pair in pairs), 0.0
    chosen = {name: torch.zeros(found.sensitivities.shape).bool() for name, found in anchor.sensitivities.items()}
    for value, name, i, j in sorted(pairs, reverse=True):
        if taken >= share * total:
            break
        taken += value
        chosen[name][i, j] = True
    return {name: mask[:, :columns] for name, mask in chosen.items()}


def test_a_threshold_by_hand():
    values = [torch.tensor([[4.0, 3.0], [2.0, 1.0]]), torch.tensor([[10.0]])]
    found = [sensitivity_threshold(values, share) for share in (0.01, 0.5, 0.51, 0.7, 0.71, 0.99, 1.0)]
    assert found == [10.0, 10.0, 4.0, 4.0, 3.0, 1.0, 0.0]
    assert sensitivity_threshold([], 0.5) == 0.0


def test_restoring_is_the_nearest_weight_that_has_the_pairs():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(7, 5, bias=False).double()
    outputs, inputs = orthonormal(5, 3, generator), orthonormal(7, 4, generator)
    mask = torch.rand(3, 4, generator=generator) < 0.5
    start = linear.weight.detach().clone()
    held = HeldWeight(linear, inputs, share=mask, output_basis=outputs)
    assert held.deviation() == 0.0
    change = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        linear.weight += change
    away = held.deviation()
    # Pair by pair: the outer products are an orthonormal set of matrices.
    expected, moved, whole = change.clone(), 0.0, 0.0
    for i, j in mask.nonzero().tolist():
        pair = torch.outer(outputs[:, i], inputs[:, j])
        expected -= (pair * change).sum() * pair
        moved += float((pair * change).sum() ** 2)
        whole += float((pair * start).sum() ** 2)
    assert away == pytest.approx((moved / whole) ** 0.5)
    held.restore()
    torch.testing.assert_close(linear.weight.detach() - start, expected)
    assert held.deviation() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pairs_stay_and_others_move(model, dtype):
    anchor = anchor_of(model, subspaces(dtype), output_rank=6, dtype=dtype)
    before = copy.deepcopy(model)
    held = HeldSubspace(model, anchor, sensitivity=0.9)
    train(model, held, steps=100)
    assert max(held.deviation().values()) < 1e-6
    expected = masks(anchor, 0.9)
    for name, mask in expected.items():
        assert torch.equal(held.pairs[name].mask, mask) and 0 < mask.sum() < mask.numel()
        weight, start = (m.get_submodule(name).weight for m in (model, before))
        change = (pairs_of(weight, anchor, name) - pairs_of(start, anchor, name)).abs()
        # Columns rounded to bfloat16 are not quite those that are held.
        assert change[mask].max() < (1e-5 if dtype == torch.float64 else 0.02) and change[~mask].median() > 1e-2
        assert held.held_shares[name] == int(mask.sum()) / weight.numel()


def test_all_pairs_of_all_outputs_are_whole_directions(model):
    name = "layers.0.down"
    anchor = anchor_of(model, subspaces()[1:], output_rank=16)
    other = copy.deepcopy(model)
    pairs, whole = (
        HeldSubspace(m, anchor, freeze=False, **options) for m, options in ((model, {"sensitivity": 1.0}), (other, {}))
    )
    assert pairs.held_shares == whole.held_shares == {name: 5 / 24} and pairs.ranks == whole.ranks
    assert pairs.weights[name].share is None
    change = torch.randn(16, 24)
    for held in (pairs, whole):
        with torch.no_grad():
            held.weights[name].linear.weight += change
        held()
    torch.testing.assert_close(model.get_submodule(name).weight, other.get_submodule(name).weight)


def test_energy_goes_first(model, anchor):
    held = HeldSubspace(model, anchor, max_rank=2, sensitivity=0.5)
    for name, mask in masks(anchor, 0.5, columns=2).items():
        assert torch.equal(held.pairs[name].mask, mask)
    assert set(held.ranks.values()) == {2}
    held = HeldSubspace(model, anchor, energy={"*.up": 0.0}, sensitivity=0.5)
    assert "layers.0.up" not in held.weights and held.held_shares["layers.0.up"] == 0.0


def test_directions_without_pairs_are_dropped(model, anchor):
    values = anchor.sensitivities["layers.0.up"].sensitivities
    values[:, [0, 3]] = values[2] = 0.0
    for name in ("layers.0.gate", "layers.0.down"):
        anchor.sensitivities[name].sensitivities.zero_()
    held = HeldSubspace(model, anchor, sensitivity=1.0)
    assert set(held.weights) == {"layers.0.up"}
    assert held.held_shares == {"layers.0.gate": 0, "layers.0.up": 15 / (16 * 24), "layers.0.down": 0}
    weight = held.weights["layers.0.up"]
    assert (weight.output_basis.shape, weight.basis.shape, weight.target.shape) == ((24, 5), (16, 3), (5, 3))
    assert weight.share is None


def test_frozen_linears_do_not_count(model, anchor):
    anchor.sensitivities["layers.0.down"].sensitivities.fill_(1e6)
    model.layers[0].down.requires_grad_(False)
    held = HeldSubspace(model, anchor, sensitivity=0.9)
    del anchor.sensitivities["layers.0.down"]
    expected = masks(anchor, 0.9)
    assert set(held.pairs) == set(expected) == set(held.held_shares)
    assert all(torch.equal(held.pairs[name].mask, mask) for name, mask in expected.items())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sensitivity": 0.0}, "sensitivity must be above 0 and at most 1, found 0.0"),
            ({"sensitivity": 1.1}, "sensitivity must be above 0 and at most 1, found 1.1"),
            ({"sensitivity": 0.5, "softness": 1.0}, "softness is for whole input directions"),
        ],
    )
    def test_arguments(self, model, anchor, options, message):
        with pytest.raises(ValueError, match=message):
            HeldSubspace(model, anchor, **options)

    def test_no_sensitivities(self, model, anchor):
        with pytest.raises(ValueError, match="needs an anchor with sensitivities"):
            HeldSubspace(model, subspaces(), sensitivity=0.5)
        del anchor.sensitivities["layers.0.up"]
        with pytest.raises(ValueError, match=r"no sensitivities for the linear 'layers\.0\.up'"):
            HeldSubspace(model, anchor, sensitivity=0.5)

    def test_sensitivities_that_are_all_zero(self, model, anchor):
        for name in ("layers.0.gate", "layers.0.up"):
            anchor.sensitivities[name].sensitivities.zero_()
        model.layers[0].down.requires_grad_(False)
        with pytest.raises(ValueError, match="all 60 pairs of the 2 linears that train have a sensitivity of zero"):
            HeldSubspace(model, anchor, sensitivity=0.5)

    def test_sensitivities_of_other_shapes(self, model, anchor):
        anchor.sensitivities["layers.0.up"] = anchor.sensitivities["layers.0.down"]
        message = r"'layers\.0\.up' has outputs of width 24 .* 5 input directions, .* are for 16 and 5"
        with pytest.raises(ValueError, match=message):
            HeldSubspace(model, anchor, sensitivity=0.5)

    def test_output_directions_that_are_not_orthonormal(self, model, anchor):
        anchor.sensitivities["layers.0.up"].output_basis.fill_(1.0)
        with pytest.raises(ValueError, match=r"basis for outputs of 'layers\.0\.up' is not orthonormal"):
            HeldSubspace(model, anchor, sensitivity=0.5)

    def test_adapters(self, model, anchor):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up"]))
        with pytest.raises(ValueError, match=r"layers\.0\.up has adapters, of which pairs .* cannot be held"):
            HeldSubspace(adapted, anchor, sensitivity=0.5)
