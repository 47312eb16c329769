"""Holding weights that are sharded over processes; run as a script, this file is one of those processes."""

import copy
import os
import subprocess
import sys

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


def test_columns_are_refused(mesh):
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"placed as \(Shard\(dim=1\),\); only .*sharded by rows"):
        HeldWeight(linear, torch.eye(6)[:, :2])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    commands = [[sys.executable, __file__, str(rank), str(tmp_path / "store")] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def _train_in_three_ways():
    """Plain, sharded by FSDP2 and under DDP, on the same batches in each process: the same weights come out."""
    from test_held_subspace import Model, subspaces, train, trainable

    torch.manual_seed(0)
    plain = Model(inner=23)  # leaves a shard with a row less
    sharded, parallel = copy.deepcopy(plain), copy.deepcopy(plain)
    held = HeldSubspace(plain, subspaces(inner=23))
    train(plain, torch.optim.AdamW(trainable(plain), lr=1e-2), 20, held)

    for layer in sharded.decoder.layers:
        fully_shard(layer)
    fully_shard(sharded)
    assert isinstance(sharded.decoder.layers[0].up.weight, DTensor)
    held = HeldSubspace(sharded, subspaces(inner=23))
    assert held.weights["layers.0.up"].target.shape[0] in (11, 12)
    train(sharded, torch.optim.AdamW(trainable(sharded), lr=1e-2), 20, held)
    assert max(held.deviation().values()) < 1e-5

    # DDP waits for the gradients of whatever trains when it is made.
    freeze_unheld(parallel, subspaces(inner=23))
    wrapped = DistributedDataParallel(parallel)
    train(wrapped, torch.optim.AdamW(trainable(parallel), lr=1e-2), 20, HeldSubspace(wrapped, subspaces(inner=23)))

    for (name, expected), whole, other in zip(
        plain.named_parameters(), sharded.parameters(), parallel.parameters(), strict=True
    ):
        torch.testing.assert_close(whole.full_tensor(), expected, rtol=1e-4, atol=1e-5, msg=f"FSDP2: {name}")
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5, msg=f"DDP: {name}")


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
    init_device_mesh("cpu", (2,))
    _train_in_three_ways()
    distributed.destroy_process_group()
