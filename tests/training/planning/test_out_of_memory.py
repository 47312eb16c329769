"""What a training says when it runs out of memory."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from hf_aegis.training import AEGISTrainer
from hf_aegis.training.out_of_memory import TrainingOutOfMemoryError, advice_for, is_out_of_memory


def failing(message, error=torch.OutOfMemoryError):
    def step(*args, **kwargs):
        raise error(message)

    return step


def make_trainer(make_language_model, make_anchor, token_dataset, make_args, **options):
    model = make_language_model()
    trainer = AEGISTrainer(model, make_args(**options), anchor=make_anchor(model), train_dataset=token_dataset)
    trainer.create_optimizer()
    return trainer


def test_the_error_says_what_would_help_and_by_how_much(make_language_model, make_anchor, token_dataset, make_args):
    trainer = make_trainer(
        make_language_model, make_anchor, token_dataset, make_args, dual_backward="two_pass", granularity="global"
    )
    weights = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer.step = failing("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(TrainingOutOfMemoryError) as caught:
        trainer.train()

    message = str(caught.value)
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB\n")
    assert "By the planner's estimate a step takes" in message
    assert "activations" in message
    assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 2: " in message
    assert "MiB less" in message
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert type(caught.value.__cause__) is torch.OutOfMemoryError
    # Planning touches neither arguments nor weights.
    assert trainer.args.per_device_train_batch_size == 4
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("error", [AssertionError, KeyError, IndexError, MemoryError])
def test_a_planner_that_fails_hides_nothing(
    make_language_model, make_anchor, token_dataset, make_args, monkeypatch, error
):
    trainer = make_trainer(make_language_model, make_anchor, token_dataset, make_args)
    trainer.optimizer.step = failing("CUDA out of memory")
    monkeypatch.setattr("hf_aegis.training.planning.rehearsal.rehearse", failing("no such shape", error))
    with pytest.raises(TrainingOutOfMemoryError, match=r"^CUDA out of memory\n") as caught:
        trainer.train()
    assert f"The planner cannot say what would help with this model: {error.__name__}: " in str(caught.value)
    assert "no such shape" in str(caught.value)


def test_nothing_is_planned_under_fsdp(make_language_model, make_anchor, token_dataset, make_args, monkeypatch):
    trainer = make_trainer(make_language_model, make_anchor, token_dataset, make_args)
    monkeypatch.setattr("hf_aegis.training.planning.rehearsal.rehearse", failing("planned", AssertionError))
    # accelerate shards over accelerators alone.
    trainer.is_fsdp_enabled = True
    assert advice_for(trainer).startswith("The planner does not know what a process takes under FSDP.")


def test_the_hosts_allocator_counts_too():
    # More than any machine has.
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(MemoryError())


def test_other_errors_stay_what_they_are(make_language_model, make_anchor, token_dataset, make_args):
    trainer = make_trainer(make_language_model, make_anchor, token_dataset, make_args)
    trainer.optimizer.step = failing("something else", RuntimeError)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trainer.train()


# As much as a machine has left for a training: less than one step takes.
SHORT_OF_MEMORY = """
    import resource, sys
    import hf_aegis.training.run
    from hf_aegis.cli import main

    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (3 << 30),) * 2)
    sys.exit(main(["train", "--config", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
def test_a_command_that_runs_out_of_memory_tells_what_would_help(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {"output_dir": str(tmp_path / "run"), "preserve": "none", "max_steps": 1, "use_cpu": True}
    values |= {"per_device_train_batch_size": 1024, "chunk_size": 4, "vqa_samples": 0, "vqa_final_samples": 0}
    values |= {"expert": {"expert_hidden_size": 64, "expert_num_layers": 1, "expert_intermediate_size": 64}}
    # JSON is YAML.
    recipe.write_text(json.dumps(values))
    command = [sys.executable, "-c", textwrap.dedent(SHORT_OF_MEMORY), str(recipe)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 1, ended.stderr
    said = ended.stderr[ended.stderr.index("hf-aegis train: ") :]
    assert "can't allocate memory" in said
    assert "By the planner's estimate a step takes" in said
    assert "per_device_train_batch_size: 512, gradient_accumulation_steps: 2: " in said
    assert "Traceback" not in ended.stderr
