"""A held subspace against the projection of whole updates, under many optimisers, precisions and adapters."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_aegis.anchors import InputSubspace
from hf_aegis.anchors.linear_layers.names import find_linears
from hf_aegis.gradients import HeldSubspace, HeldWeight
from hf_aegis.gradients.linear_sites import find_linear_sites


class Layer(nn.Module):
    """A decoder layer as far as holding is concerned: two linears that share an input, one that does not, a norm."""

    def __init__(self, width, inner, bias=False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden):
        normed = self.norm(hidden)
        return hidden + self.down(torch.tanh(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    def __init__(self, width=16, inner=24, depth=2, bias=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, inner, bias) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


class Model(nn.Module):
    """Projector, decoder and a head that has nothing to do with the anchor."""

    def __init__(self, **options):
        super().__init__()
        width = options.get("width", 16)
        self.projector = nn.Sequential(nn.Linear(8, width))
        self.decoder = Decoder(**options)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))

    def get_decoder(self):
        return self.decoder

    def forward(self, inputs):
        return self.head(self.decoder(self.projector(inputs)))


def subspace(linears, width, rank, seed=0, dtype=torch.float64):
    """A random subspace whose energies fall by half."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))
    energies = 0.5 ** torch.arange(rank, dtype=torch.float64)
    return InputSubspace(tuple(linears), basis.to(dtype), energies, float(energies.sum()) * 1.25)


def subspaces(width=16, inner=24, depth=2, rank=5, **options):
    found = []
    for index in range(depth):
        names = [f"layers.{index}.{name}" for name in ("gate", "up", "down")]
        found.append(subspace(names[:2], width, rank, seed=2 * index, **options))
        found.append(subspace(names[2:], inner, rank, seed=2 * index + 1, **options))
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def train(model, optimizer, steps, after=lambda: None, seed=1):
    """Some regression that has gradients everywhere."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        inputs = torch.randn(6, 8, generator=generator).to(dtype)
        loss = (model(inputs) - inputs[:, :4].cos()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thousand_steps_leave_the_action_on_the_subspace(name):
    torch.manual_seed(0)
    sizes = {"width": 8, "inner": 12, "depth": 1}
    model = Model(**sizes)
    before = copy.deepcopy(model)
    groups = subspaces(**sizes, rank=3)
    held = HeldSubspace(model, groups)
    assert held.ranks["layers.0.down"] == 3 and len(held.weights) == 3
    assert held.held_shares == {"layers.0.gate": 3 / 8, "layers.0.up": 3 / 8, "layers.0.down": 3 / 12}
    train(model, OPTIMIZERS[name](trainable(model)), 1000, held)
    assert max(held.deviation().values()) < 1e-6
    for group in groups:
        inputs = torch.randn(50, 3, dtype=torch.float64) @ group.basis.T
        for linear in group.linears:
            now, then = (m.decoder.get_submodule(linear).weight.detach().double() for m in (model, before))
            assert (inputs @ now.T - inputs @ then.T).norm() < 1e-6 * (inputs @ then.T).norm()
            # Elsewhere it has been free to move, and did.
            assert (now - then).norm() > 0.1 * then.norm()


def test_unheld_training_does_leave(model):
    """What the test above would measure without the restoration."""
    held = HeldSubspace(model, subspaces())
    train(model, OPTIMIZERS["adamw"](trainable(model)), 20)
    assert min(held.deviation().values()) > 1e-2


def test_a_thousand_steps_of_eight_bit_adamw():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = Model(width=64, inner=96, depth=1)
    held = HeldSubspace(model, subspaces(width=64, inner=96, depth=1, rank=20))
    optimizer = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, 1000, held)
    assert optimizer.state[model.decoder.layers[0].up.weight]["state1"].dtype == torch.uint8
    assert max(held.deviation().values()) < 1e-6


def test_equals_the_projection_of_the_update():
    """Restoring the weight is projecting what the optimiser did on the subspace's complement, exactly in float64."""
    torch.manual_seed(0)
    model = Model().double()
    held = HeldSubspace(model, subspaces())
    oracle = copy.deepcopy(model)
    complements = {
        name: torch.eye(group.basis.shape[0]).double() - group.basis @ group.basis.T
        for group in subspaces()
        for name in group.linears
    }
    train(model, torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9), 30, held)
    optimizer = torch.optim.SGD(trainable(oracle), lr=0.1, momentum=0.9)
    last = copy.deepcopy(oracle)

    def project():
        with torch.no_grad():
            for name, complement in complements.items():
                weight, before = (m.decoder.get_submodule(name).weight for m in (oracle, last))
                weight.copy_(before + (weight - before) @ complement)
                before.copy_(weight)

    train(oracle, optimizer, 30, project)
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_soft_restoration_by_hand():
    linear = nn.Linear(4, 3, bias=False).double()
    wrapper = SimpleStack(linear)
    basis = torch.eye(4, dtype=torch.float64)[:, :2]
    group = InputSubspace(("layers.0.linear",), basis, torch.tensor([6.0, 1.0]), 8.0)
    start = linear.weight.detach().clone()
    held = HeldSubspace(wrapper, [group], softness=0.5)
    with torch.no_grad():
        linear.weight += 1.0
    held()
    # The mean energy is 8 / 4 = 2: shares 6 / (6 + 1) and 1 / (1 + 1) of the way.
    left = torch.tensor([1 / 7, 1 / 2, 1.0, 1.0]).double()
    torch.testing.assert_close(linear.weight.detach() - start, left.expand(3, 4))


def test_soft_limits(model):
    """No softness is the hard constraint, and with ever more of it nothing is held."""
    moved = {}
    for softness in (0.0, 1e-12, 1e12):
        student = copy.deepcopy(model).double()
        held = HeldSubspace(student, subspaces(), softness=softness)
        with torch.no_grad():
            for parameter in trainable(student):
                parameter += 0.1
        held()
        moved[softness] = student.decoder.layers[0].up.weight.detach()
    torch.testing.assert_close(moved[1e-12], moved[0.0], rtol=0, atol=1e-9)
    free = model.decoder.layers[0].up.weight.detach().double() + 0.1
    torch.testing.assert_close(moved[1e12], free, rtol=0, atol=1e-9)


class SimpleStack(nn.Module):
    def __init__(self, linear):
        super().__init__()
        layer = nn.Module()
        layer.linear = linear
        self.layers = nn.ModuleList([layer])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(dtype):
    torch.manual_seed(0)
    model = Model().to(dtype)
    start = model.decoder.layers[0].up.weight.detach().float()
    held = HeldSubspace(model, subspaces(dtype=torch.bfloat16))
    weight = held.weights["layers.0.up"]
    away = []

    def measure():
        held()
        values = weight.linear.weight.detach().float()
        away.append(float((values @ weight.basis - weight.target).norm() / values.norm()))

    train(model, torch.optim.SGD(trainable(model), lr=0.1), 300, measure)
    # Half a unit in the last place of each entry, and a little for float32's own rounding.
    assert max(away) <= torch.finfo(dtype).eps / 2 * 1.01
    assert max(away[-50:]) < 2 * max(away[:50])
    assert (model.decoder.layers[0].up.weight.detach().float() - start).norm() > 0.05 * start.norm()


def test_bases_in_bfloat16_hold_what_they_span(model):
    """Rounded columns are not orthonormal; the constraint holds all the same, and only on the leading ones."""
    groups = subspaces(dtype=torch.bfloat16)
    before = copy.deepcopy(model)
    held = HeldSubspace(model, groups, max_rank=3)
    train(model, OPTIMIZERS["adamw"](trainable(model)), 20, held)
    for group in groups:
        for name in group.linears:
            change = (model.decoder.get_submodule(name).weight - before.decoder.get_submodule(name).weight).detach()
            seen = change @ group.basis.float()
            assert seen[:, :3].norm() < 1e-5 * change.norm()
            assert seen[:, 3:].norm() > 1e-2 * change.norm()


def test_what_is_frozen(model):
    model.projector[0].requires_grad_(True)
    groups = [*subspaces(), subspace(["projector.0"], 8, 3)]
    held = HeldSubspace(model, groups)
    assert set(held.frozen) == {
        "projector.0.bias",
        *(f"decoder.layers.{i}.norm.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
        "decoder.norm.weight",
        "decoder.norm.bias",
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "projector.0.weight",
        *(f"decoder.layers.{i}.{name}.weight" for i in (0, 1) for name in ("gate", "up", "down")),
        *(f"head.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
    }
    assert "projector.0" in held.weights


def test_layers_in_a_list_of_their_own(model):
    """The layers may be given in a list that the model does not have."""
    model.projector.append(nn.Linear(16, 16))
    held = HeldSubspace(model, subspaces(), layers=nn.ModuleList(list(model.decoder.layers)))
    assert set(held.weights) == {name for group in subspaces() for name in group.linears}
    assert "decoder.norm.weight" in held.frozen


def test_names_do_not_tell_of_wrappers(model):
    plain = [(site.name, site.module) for site in find_linear_sites(model)]
    layers = model.decoder.layers
    layers[0].up = torch.compile(layers[0].up)
    layers[1] = checkpoint_wrapper(layers[1])
    assert [(site.name, site.module) for site in find_linear_sites(model)] == plain
    found = find_linears(model, layers, ("projector",))
    assert list(found) == [name for name, _ in plain if not name.startswith("head")]
    assert found["layers.0.up"] is layers[0].up  # the wrapper is what runs


def test_nothing_is_frozen_on_request(model):
    held = HeldSubspace(model, subspaces()[:2], freeze=False)
    assert held.frozen == () and all(p.requires_grad for p in model.parameters())
    assert set(held.weights) == {"layers.0.gate", "layers.0.up", "layers.0.down"}


def test_energy_by_pattern(model):
    # Energies 1, 1/2, ... of a total of 1.9375 · 1.25: 40 % are one direction, 60 % two.
    held = HeldSubspace(
        model, subspaces(), energy={"layers.0.up": 0.0, "layers.0.*": 0.4, "layers.1.[gu]*": 0.6}, max_rank=4
    )
    assert held.ranks == {
        "layers.0.gate": 1,
        "layers.0.up": 0,
        "layers.0.down": 1,
        "layers.1.gate": 2,
        "layers.1.up": 2,
        "layers.1.down": 4,
    }
    assert "layers.0.up" not in held.weights and model.decoder.layers[0].up.weight.requires_grad
    assert held.weights["layers.1.gate"].basis.data_ptr() == held.weights["layers.1.up"].basis.data_ptr()


def test_every_other_call(model):
    held = HeldSubspace(model, subspaces(), every=2)
    found = []
    for _ in range(4):
        with torch.no_grad():
            for parameter in trainable(model):
                parameter += 0.1
        held()
        found.append(max(held.deviation().values()) < 1e-5)
    assert found == [False, True, False, True]
    with torch.no_grad():
        model.decoder.layers[0].up.weight += 0.1
    held.restore()
    assert max(held.deviation().values()) < 1e-5


def test_frozen_linears_are_left_out_and_missed_when_they_train(model):
    model.decoder.layers[0].requires_grad_(False)
    held = HeldSubspace(model, subspaces())
    assert set(held.weights) == {"layers.1.gate", "layers.1.up", "layers.1.down"}
    held()
    model.decoder.layers[0].down.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"layers\.0\.down was frozen when .* and trains now"):
        held()


def test_restoration_is_not_autocast(model):
    held = HeldSubspace(model, subspaces())
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        held()
    assert max(held.deviation().values()) < 1e-6


def test_held_weight_needs_no_model():
    linear, basis = nn.Linear(6, 3), torch.eye(6)[:, :2]
    held = HeldWeight(linear, basis, target=torch.zeros(3, 2))
    assert held.deviation() > 0
    held.restore()
    assert linear.weight[:, :2].abs().max() < 1e-7 and held.deviation() < 1e-6


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"softness": -1.0}, "softness must be finite and not negative, found -1.0"),
            ({"every": 0}, "every must be at least 1, found 0"),
            ({"max_rank": 0}, "max_rank must be at least 1, found 0"),
            ({"energy": 1.5}, r"energy must be from 0 to 1, found 1.5"),
            ({"energy": {"layers.7.*": 0.5}}, r"the pattern 'layers.7.\*' fits none of the linears"),
            ({"energy": 0.0}, "nothing to hold"),
        ],
    )
    def test_arguments(self, model, options, message):
        with pytest.raises(ValueError, match=message):
            HeldSubspace(model, subspaces(), **options)

    def test_a_linear_without_subspace(self, model):
        with pytest.raises(ValueError, match=r"no subspace of their inputs: \['layers\.1\.down'\]"):
            HeldSubspace(model, subspaces()[:-1])
        model.decoder.layers[1].down.requires_grad_(False)
        assert "layers.1.down" not in HeldSubspace(model, subspaces()[:-1]).weights

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ([], "no subspaces were given"),
            ([subspace(["layers.0.other"], 16, 2)], r"Model has no linear 'layers\.0\.other'"),
            ([subspace(["layers.0.up"], 12, 2)], r"'layers\.0\.up' has inputs of width 16, but its subspace has 12"),
            ([subspace(["layers.0.up"], 16, 2)] * 2, r"two subspaces are for the linear 'layers\.0\.up'"),
            (
                [InputSubspace(("layers.0.up",), torch.ones(16, 2), torch.ones(2), 2.0)],
                r"the basis for 'layers\.0\.up' is not orthonormal",
            ),
            (
                [InputSubspace(("layers.0.up",), torch.eye(16)[:, :2] * torch.tensor([1, 0]), torch.ones(2), 2.0)],
                r"the basis for 'layers\.0\.up' is not orthonormal",
            ),
        ],
    )
    def test_subspaces(self, model, groups, message):
        with pytest.raises(ValueError, match=message):
            HeldSubspace(model, groups, freeze=False)

    def test_a_weight_that_is_no_matrix_of_numbers(self):
        linear = nn.Linear(6, 3)
        linear.weight = nn.Parameter(torch.zeros(18))
        with pytest.raises(ValueError, match=r"shape \(18,\) on cpu, expected floating-point rows of 6"):
            HeldWeight(linear, torch.eye(6)[:, :2])

    def test_a_weight_that_changed_its_shape(self, model):
        held = HeldSubspace(model, subspaces())
        model.decoder.layers[0].up.weight = nn.Parameter(torch.zeros(7, 16))
        with pytest.raises(RuntimeError, match="has 7 rows on cpu in this process, but had 24"):
            held()
