"""
Two processes, each with half of a batch, against one that has all of it; run as a script, this file is one of the two.

The script imports once and runs many cases: most of what a process costs is its imports.
"""

import sys
import warnings

import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_aegis.gradients import GradientShield


def test_two_processes_equal_one(run_processes):
    run_processes(__file__)


# -- in each of the two processes -------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
HALF = 2


def share(batch, rank, images=1):
    """The half of a batch that a process has; pictures come in the order of the rows."""
    return {key: value[rank * len(value) // 2 : (rank + 1) * len(value) // 2] for key, value in batch.items()}


def task_loss(model, case, batch, whole):
    """The task's loss on `batch`, normalised over the tokens of the `whole` batch, for a mean over processes."""
    processes = len(whole["input_ids"]) / len(batch["input_ids"])
    output = model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    targets = batch["labels"][:, 1:].flatten()
    total = cross_entropy(output.logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    away = case.anchor.mean[-1].to(output.hidden_states[-1].dtype)
    count = (whole["labels"][:, 1:] != -100).sum()
    return processes * total / count + case.push * (output.hidden_states[-1] * away).mean()


def gradients(model):
    """By the names that the model has when it is not wrapped."""
    return {
        name.removeprefix("module."): None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def run(case, model, batches, alone=None, **options):
    """Gradients and reports of backward passes that accumulate, each in a block of its own."""
    case.model.zero_grad()
    shield = GradientShield(model, case.anchor, process_group=alone, **options)
    reports = []
    for batch, whole in batches:
        with shield:
            task_loss(model, case, batch, whole).backward()
        reports.append(shield.report.per_group())
    return gradients(model), reports


def check_ddp(rank, alone):
    for kind, dtype in (("gemma2", torch.float64), ("gemma2", torch.float32), ("paligemma2", torch.float64)):
        case = build_case(kind, dtype, size=2 * HALF, push=0.5 if kind == "gemma2" else 1.0)
        whole = [case.batch, make_batch(kind, dtype, seed=1, size=2 * HALF)]
        ddp = DistributedDataParallel(case.model)
        for checkpointing in (False, True):
            switch = "enable" if checkpointing else "disable"
            getattr(case.model, f"activation_checkpointing_{switch}")()
            for form in ("streaming", "two_pass"):
                for granularity in ("layer", "global", "tensor") if not checkpointing else ("layer",):
                    options = {"dual_backward": form, "granularity": granularity}
                    expected, reports = run(case, case.model, [(b, b) for b in whole], alone, **options)
                    found, shared = run(case, ddp, [(share(b, rank), b) for b in whole], **options)
                    check_same(found, expected, TOLERANCE[dtype])
                    compare_reports(shared, reports, dtype)


def compare_reports(found, expected, dtype):
    close = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 5e-3, "atol": 1e-5}
    everyone = [None, None]
    distributed.all_gather_object(everyone, found)
    assert everyone[0] == everyone[1], "the processes report different figures"
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["groups"] == theirs["groups"]
        assert any(alpha < 0 for alpha in mine["alpha"])
        for key in ("dot", "alpha", "task_norm", "reference_norm", "penalty_mean_term", "penalty_std_term"):
            torch.testing.assert_close(torch.tensor(mine[key]), torch.tensor(theirs[key]), **close, msg=key)


def main():
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    groups = [distributed.new_group([other]) for other in range(2)]
    check_ddp(rank, groups[rank])
    distributed.destroy_process_group()


if __name__ == "__main__":
    from conftest import _batch as make_batch
    from conftest import build_case, check_same

    warnings.simplefilter("error")
    sys.exit(main())
