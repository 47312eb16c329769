"""What a training says when it runs out of memory."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

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
    said = str(caught.value).splitlines()
    assert said[1].startswith(f"The planner cannot say by how much it would help: {error.__name__}: ")
    assert "no such shape" in said[1]
    assert said[2].startswith(
        "A smaller per_device_train_batch_size with more gradient_accumulation_steps, activation_"
    )


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
    # NumPy says it in Python's way.
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, dtype=np.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_pythons_own_error_gets_the_advice_too(make_language_model, token_dataset, make_args, workers):
    class Greedy(Dataset):
        def __len__(self):
            return len(token_dataset)

        def __getitem__(self, index):
            # In a process of its own that is the first batch.
            if workers or trainer.state.global_step == 1:
                np.empty(2**60, dtype=np.uint8)
            return token_dataset[index]

    loading = {"dataloader_num_workers": workers, "dataloader_pin_memory": False}
    trainer = AEGISTrainer(make_language_model(), make_args(preserve="none", **loading), train_dataset=Greedy())
    with pytest.raises(TrainingOutOfMemoryError, match=r"^Unable to allocate 1\.00 EiB for an array") as caught:
        trainer.train()
    said = str(caught.value).splitlines()
    assert "Traceback" not in str(caught.value)
    if workers:
        assert said[1].startswith(
            "It was before the first step: the model, what is kept beside it, and the first batch"
        )
    else:
        assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 2: " in str(caught.value)


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
