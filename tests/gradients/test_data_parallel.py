"""
Two processes, each with half of a batch, against one that has all of it; run as a script, this file is one of the two.

The script imports once and runs many cases: most of what a process costs is its imports.
"""

import contextlib
import copy
import math
import sys
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.gradients import (
    DistillationLoss,
    GradientShield,
    ReplayShield,
    ShardedGradientShield,
    TransportLoss,
    reduction,
)


def test_two_processes_equal_one(run_processes):
    run_processes(__file__, timeout=900)


# -- in each of the two processes -------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
# Seeds and strengths of the push as where one process is tested, so that some groups conflict and others do not.
CASES = (("gemma2", torch.float64, 0.5), ("gemma2", torch.float32, 0.5), ("paligemma2", torch.float64, 1.0))
SEEDS = {"pi0": 8}
WAYS = ((False, "layer"), (True, "layer"), (False, "global"), (False, "tensor"))


def share(batch, rank):
    """The half of a batch that a process has; pictures come in the order of the rows."""
    return {key: value[rank * len(value) // 2 : (rank + 1) * len(value) // 2] for key, value in batch.items()}


def task_loss(model, case, batch, whole):
    """The task's loss on `batch`, normalised over the tokens of the `whole` batch, for a mean over processes."""
    if case.kind == "pi0":
        return model(**batch).loss.mean()  # of as many numbers in each process
    processes = len(whole["input_ids"]) / len(batch["input_ids"])
    output = model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    targets = batch["labels"][:, 1:].flatten()
    total = cross_entropy(output.logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    away = case.anchor.mean[-1].to(output.hidden_states[-1].dtype)
    count = (whole["labels"][:, 1:] != -100).sum()
    return processes * total / count + case.push * (output.hidden_states[-1] * away).mean()


def whole_tensor(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    """Whole ones, by the names that the model has when it is not wrapped."""
    return {
        name.removeprefix("module."): None if p.grad is None else whole_tensor(p.grad).clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def accumulate(case, model, batches, shield):
    """Gradients and reports of backward passes that accumulate, each in a block of its own."""
    model.zero_grad()
    reports = []
    for batch, whole in batches:
        with shield:
            task_loss(model, case, batch, whole).backward()
        reports.append(shield.report.per_group())
    return gradients(model), reports


def make_two(kind, dtype, push):
    """A case, and two batches of four rows with the more padding the later they come."""
    case = build_case(kind, dtype, seed=SEEDS.get(kind, 0), size=4, push=push)
    return case, [case.batch, make_batch(kind, dtype, seed=1, size=4)]


def compare(found, expected, reports, expected_reports, dtype):
    check_same(found, expected, TOLERANCE[dtype])
    close = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 5e-3, "atol": 1e-5}
    everyone = [None, None]
    distributed.all_gather_object(everyone, reports)
    assert everyone[0] == everyone[1], "the processes report different figures"
    for mine, theirs in zip(reports, expected_reports, strict=True):
        assert mine["groups"] == theirs["groups"]
        assert any(alpha < 0 for alpha in mine["alpha"])
        for key in ("dot", "alpha", "task_norm", "reference_norm", "penalty_mean_term", "penalty_std_term"):
            torch.testing.assert_close(torch.tensor(mine[key]), torch.tensor(theirs[key]), **close, msg=key)


def check_ddp(rank, alone):
    for kind, dtype, push in (*CASES, ("pi0", torch.float64, 0.0)):
        case, whole = make_two(kind, dtype, push)
        ddp = DistributedDataParallel(case.model)
        for checkpointing, granularity in WAYS if dtype == torch.float64 and kind != "pi0" else WAYS[:1]:
            if kind != "pi0":  # refuses it
                set_checkpointing(case.model, checkpointing)
            for form in ("streaming", "two_pass"):
                options = {"dual_backward": form, "granularity": granularity}
                shield = GradientShield(case.model, case.anchor, process_group=alone, **options)
                expected, expected_reports = accumulate(case, case.model, [(b, b) for b in whole], shield)
                shield = GradientShield(ddp, case.anchor, **options)
                found, reports = accumulate(case, ddp, [(share(b, rank), b) for b in whole], shield)
                compare(found, expected, reports, expected_reports, dtype)


def check_approximate_references(rank, alone):
    """Kept references are those of all processes; a share is of each process's rows."""
    case, whole = make_two("gemma2", torch.float64, 0.5)
    # So that the rows that the two processes begin with are those that one process begins with.
    first = [{key: value[[0, 2, 1, 3]] for key, value in batch.items()} for batch in whole]
    ddp = DistributedDataParallel(case.model)
    for options in ({"reference_interval": 2}, {"reference_share": 0.5}):
        shield = GradientShield(case.model, case.anchor, process_group=alone, **options)
        expected, expected_reports = accumulate(case, case.model, [(b, b) for b in first], shield)
        shield = GradientShield(ddp, case.anchor, **options)
        found, reports = accumulate(case, ddp, [(share(b, rank), b) for b in whole], shield)
        compare(found, expected, reports, expected_reports, torch.float64)


def set_checkpointing(model, on):
    getattr(model, f"activation_checkpointing_{'enable' if on else 'disable'}")()


def shard(model):
    sharded = copy.deepcopy(model)
    for layer in find_decoder_layers(sharded):
        fully_shard(layer)
    return fully_shard(sharded)


def check_fsdp(rank, alone):
    for kind, dtype, push in CASES:
        case, whole = make_two(kind, dtype, push)
        sharded = shard(case.model)
        for checkpointing, granularity in WAYS if dtype == torch.float64 else WAYS[:1]:
            set_checkpointing(case.model, checkpointing)
            set_checkpointing(sharded, checkpointing)
            shield = GradientShield(case.model, case.anchor, process_group=alone, granularity=granularity)
            expected, expected_reports = accumulate(case, case.model, [(b, b) for b in whole], shield)
            shield = ShardedGradientShield(sharded, case.anchor, granularity=granularity)
            sharded.zero_grad()
            with torch.no_grad():
                sharded(**share(whole[1], rank))  # leaves FSDP with whole weights of the outermost modules
            found, reports = accumulate(case, sharded, [(share(b, rank), b) for b in whole], shield)
            compare(found, expected, reports, expected_reports, dtype)


def check_single_processes_projected(rank, alone):
    """With the other scope, the mean of what each process would have done by itself; sent when it is wanted."""
    case, whole = make_two("gemma2", torch.float64, 0.5)
    ddp = DistributedDataParallel(case.model)
    for granularity in ("layer", "global"):
        alone_shield = GradientShield(case.model, case.anchor, process_group=alone, granularity=granularity)
        each = [accumulate(case, case.model, [(share(b, r), b) for b in whole], alone_shield)[0] for r in range(2)]
        expected = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
        shield = GradientShield(ddp, case.anchor, granularity=granularity, projection_scope="rank")
        ddp.zero_grad()
        for batch, following in zip(whole, (True, False), strict=True):
            with ddp.no_sync() if following else contextlib.nullcontext(), shield:
                task_loss(ddp, case, share(batch, rank), batch).backward()
            if following:
                check_same(gradients(ddp), accumulate_one(case, batch, rank, alone_shield, ddp), 1e-9)
        check_same(gradients(ddp), expected, 1e-6)


def accumulate_one(case, batch, rank, shield, ddp):
    """What one process's own shield makes of its share; what had been accumulated stays."""
    kept = {p: p.grad for p in ddp.parameters()}
    found, _ = accumulate(case, case.model, [(share(batch, rank), batch)], shield)
    for parameter, gradient in kept.items():
        parameter.grad = gradient
    return found


def check_replay(rank, alone):
    case, whole = make_two("gemma2", torch.float64, 0.5)
    ddp = DistributedDataParallel(case.model)
    replayed = make_batch("gemma2", torch.float64, seed=5, size=4)
    for combiner in ("one_sided", "graddrop"):
        shield = ReplayShield(
            case.model, lambda: task_loss(case.model, case, replayed, replayed), combiner=combiner, process_group=alone
        )
        expected, expected_reports = accumulate(case, case.model, [(b, b) for b in whole], shield)
        shield = ReplayShield(ddp, lambda: task_loss(ddp, case, share(replayed, rank), replayed), combiner=combiner)
        found, reports = accumulate(case, ddp, [(share(b, rank), b) for b in whole], shield)
        check_same(found, expected, 1e-6)
        assert [r["dot"] for r in reports] == [pytest.approx(r["dot"], rel=1e-6) for r in expected_reports]


def check_single_processes_combined(rank, alone):
    """With the other scope, the mean of what each process makes of its own two batches."""
    case, (whole, replayed) = make_two("gemma2", torch.float64, 0.5)
    ddp = DistributedDataParallel(case.model)
    each = []
    for r in range(2):
        shield = ReplayShield(
            case.model, lambda r=r: task_loss(case.model, case, share(replayed, r), replayed), process_group=alone
        )
        each.append(accumulate(case, case.model, [(share(whole, r), whole)], shield)[0])
    shield = ReplayShield(ddp, lambda: task_loss(ddp, case, share(replayed, rank), replayed), projection_scope="rank")
    found, _ = accumulate(case, ddp, [(share(whole, rank), whole)], shield)
    check_same(found, {name: (each[0][name] + each[1][name]) / 2 for name in found}, 1e-6)


def check_added_losses(rank, alone):
    case, (whole, _) = make_two("gemma2", torch.float64, 0.5)
    ddp = DistributedDataParallel(case.model)
    for make in (
        lambda model, **options: TransportLoss(model, case.anchor, **options),
        lambda model, **options: DistillationLoss(model, **options),
    ):
        losses = make(case.model, process_group=alone), make(ddp)
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.mul_(1.1)
        found, values = [], []
        for loss, model, batch in zip(losses, (case.model, ddp), (whole, share(whole, rank)), strict=True):
            model.zero_grad()
            with loss.recording():
                task = task_loss(model, case, batch, whole)
            value = loss.value()
            (task + 3 * value).backward()
            found.append(gradients(model))
            values.append(value.detach())
        check_same(found[1], found[0], 1e-6)
        distributed.all_reduce(values[1])
        assert float(values[1] / 2) == pytest.approx(float(values[0]), rel=1e-6)
        assert float(values[0]) > 1e-3


def check_what_is_not_finite(rank, alone):
    """What one process cannot use, none of them uses."""
    case, (whole, _) = make_two("gemma2", torch.float64, 0.5)
    ddp = DistributedDataParallel(case.model)
    sharded = shard(case.model)
    for model, shield in (
        (ddp, GradientShield(ddp, case.anchor)),
        (ddp, GradientShield(ddp, case.anchor, projection_scope="rank")),
        (sharded, ShardedGradientShield(sharded, case.anchor)),
    ):
        model.zero_grad()
        with shield:
            (task_loss(model, case, share(whole, rank), whole) * (math.nan if rank == 1 else 1.0)).backward()
        assert sorted(shield.report.dropped) == sorted(shield.report.groups)
        assert all(p.grad is None for p in model.parameters())


def check_refusals(rank, alone):
    case, (whole, _) = make_two("paligemma2", torch.float64, 1.0)
    ddp = DistributedDataParallel(case.model, find_unused_parameters=True)
    batch = share(whole, rank)
    shield = GradientShield(case.model, case.anchor)
    with pytest.raises(RuntimeError, match="make the shield for the DistributedDataParallel itself"), shield:
        task_loss(ddp, case, batch, whole)
    # As the trainer does it, whose model is wrapped later than the shield is made.
    shield.wrapper = ddp
    accumulate(case, ddp, [(batch, whole)], shield)
    if rank == 1:
        text = make_batch("gemma2", torch.float64, size=2)
        batch = text | {"token_type_ids": torch.zeros_like(text["input_ids"])}
    ddp.zero_grad()
    with pytest.raises(RuntimeError, match="backward passes use different parameters"), shield:
        task_loss(ddp, case, batch, whole).backward()
    assert all(p.grad is None for p in ddp.parameters())
    each = GradientShield(ddp, case.anchor, projection_scope="rank")
    with pytest.raises(RuntimeError, match="backward passes use different parameters"), each:
        task_loss(ddp, case, batch, whole).backward()
    static = DistributedDataParallel(case.model, static_graph=True)
    with pytest.raises(ValueError, match=r"leave static_graph out"), GradientShield(static, case.anchor):
        pass
    with pytest.raises(ValueError, match="itself has not been given to fully_shard"):
        ShardedGradientShield(case.model, case.anchor)
    sharded = shard(case.model)
    with pytest.raises(ValueError, match="use ShardedGradientShield"), GradientShield(sharded, case.anchor):
        pass
    sharded.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="FSDP was told not to reduce"):
        accumulate(case, sharded, [(share(whole, rank), whole)], ShardedGradientShield(sharded, case.anchor))


def main():
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    groups = [distributed.new_group([other]) for other in range(2)]
    init_device_mesh("cpu", (2,))
    # So that these small models' gradients go in several buckets.
    reduction.BUCKET_SIZE = 500
    for check in (
        check_ddp,
        check_approximate_references,
        check_fsdp,
        check_single_processes_projected,
        check_replay,
        check_single_processes_combined,
        check_added_losses,
        check_what_is_not_finite,
        check_refusals,
    ):
        check(rank, groups[rank])
    distributed.destroy_process_group()


if __name__ == "__main__":
    from conftest import _batch as make_batch
    from conftest import build_case, check_same

    warnings.simplefilter("error")
    # Of transformers' models, whose logits are a slice.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    sys.exit(main())
