"""Holding weights that are sharded over processes; run as a script, this file is one of those processes."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_aegis.gradients import HeldSubspace, HeldWeight, freeze_unheld


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_rows_are_restored_in_place(mesh, placement):
    linear, basis = nn.Linear(6, 4, bias=False), torch.eye(6)[:, :2]
    start = linear.weight.detach().clone()
    linear.weight = nn.Parameter(distribute_tensor(start.clone(), mesh, [placement]))
    held = HeldWeight(linear, basis)
    with torch.no_grad():
        linear.weight += 1.0
    held.restore()
    expected = start + torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(linear.weight.full_tensor().detach(), expected)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_weight_may_be_sharded_after_it_is_held(mesh, placement, pairs):
    torch.manual_seed(0)
    linear, basis = nn.Linear(6, 4, bias=False), torch.eye(6)[:, :2]
    start = linear.weight.detach().clone()
    held = HeldWeight(linear, basis, output_basis=torch.eye(4)[:, 1:] if pairs else None)
    linear.weight = nn.Parameter(distribute_tensor(start.clone(), mesh, [placement]))
    with torch.no_grad():
        linear.weight += 1.0
    held.restore()
    expected = start + 1.0
    expected[1 if pairs else 0 :, :2] -= 1.0
    torch.testing.assert_close(linear.weight.full_tensor().detach(), expected)
    assert held.deviation() < 1e-6


def test_columns_are_refused(mesh):
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"placed as \(Shard\(dim=1\),\); only .*sharded by rows"):
        HeldWeight(linear, torch.eye(6)[:, :2])


@pytest.mark.slow
def test_two_processes_equal_one(run_processes):
    run_processes(__file__, timeout=600)


def _shard(model):
    for layer in model.decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(model.decoder.layers[0].up.weight, DTensor)


def _train_in_three_ways():
    """
    Plain, sharded by FSDP2 (before and after it is held) and under DDP, on the same batches in each process: the same
    weights come out, whether whole directions are held or pairs.
    """
    from test_held_pairs import anchor_of
    from test_held_subspace import Model, subspaces, train, trainable

    torch.manual_seed(0)
    start = Model(inner=23)  # leaves a shard with a row less
    anchor = anchor_of(start.decoder, subspaces(inner=23), output_rank=7)
    for options in ({}, {"sensitivity": 0.9}):
        plain, sharded, later, parallel = (copy.deepcopy(start) for _ in range(4))
        held = HeldSubspace(plain, anchor, **options)
        train(plain, torch.optim.AdamW(trainable(plain), lr=1e-2), 20, held)
        assert max(held.deviation().values()) < 1e-5

        _shard(sharded)
        held = HeldSubspace(sharded, anchor, **options)
        weight = held.weights["layers.0.up"]
        assert (weight.output_basis if options else weight.target).shape[0] in (11, 12)
        train(sharded, torch.optim.AdamW(trainable(sharded), lr=1e-2), 20, held)
        assert max(held.deviation().values()) < 1e-5

        held = HeldSubspace(later, anchor, **options)
        _shard(later)
        train(later, torch.optim.AdamW(trainable(later), lr=1e-2), 20, held)
        weight = held.weights["layers.0.up"]
        assert (weight.output_basis if options else weight.target).shape[0] in (11, 12)

        # DDP waits for the gradients of whatever trains when it is made.
        freeze_unheld(parallel, anchor)
        wrapped = DistributedDataParallel(parallel)
        train(wrapped, torch.optim.AdamW(trainable(parallel), lr=1e-2), 20, HeldSubspace(wrapped, anchor, **options))

        for name, expected in plain.named_parameters():
            for kind, model in {"FSDP2": sharded, "FSDP2 later": later, "DDP": parallel}.items():
                found = model.get_parameter(name)
                found = found.full_tensor() if isinstance(found, DTensor) else found
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=f"{kind}, {options}: {name}")


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    _train_in_three_ways()
    distributed.destroy_process_group()
