"""A step gone through with shapes alone, against trainings that were measured, and against published sizes."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planned_conditions import CONDITIONS, EXPERT, SIZES, arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Gemma2ForCausalLM, PaliGemmaForConditionalGeneration, Trainer
from transformers import initialization as init

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.models import PaliGemmaFlowForAction
from hf_aegis.training.planning.assumed_values import AssumedValues
from hf_aegis.training.planning.flop_log import FlopLog
from hf_aegis.training.planning.largest_batch import largest_batch, telling_batches
from hf_aegis.training.planning.optimizer_shapes import make_optimizer
from hf_aegis.training.planning.recipe_workload import RecipeWorkload
from hf_aegis.training.planning.rehearsal import Rehearsal, rehearse
from hf_aegis.training.planning.report import GIB, ConditionPlan, itemised
from hf_aegis.training.planning.shapes_of_model import without_values
from hf_aegis.training.planning.storage_log import Peak, StorageLog
from hf_aegis.training.planning.vlm_shapes import paligemma2_3b, vlm_config
from hf_aegis.training.resources import PHASES, PhaseMemory, peak_memory_mb, reset_peak_memory


QUICK = ("naive", "streaming, checkpointed", "pairs")
SLOW = tuple(name for name in CONDITIONS if name not in QUICK)


@pytest.fixture(scope="module")
def anchor_folder(tmp_path_factory) -> Path:
    """An anchor of the embedded model on random inputs, with pairs of directions."""
    model = PaliGemmaFlowForAction.from_vlm(str(EMBEDDED_VLM), dtype=torch.float32, **EXPERT)
    run, args = arguments("naive", "unused")
    workload = RecipeWorkload(run, args, vlm_config(None), SIZES)
    batch = {name: torch.zeros_like(value) for name, value in workload.replayed(4).items() if name != "labels"}
    batch["input_ids"][:, : -SIZES.text_tokens] = workload.config.image_token_id
    batch["input_ids"][:, -SIZES.text_tokens :] = torch.randint(5, 500, (4, SIZES.text_tokens))
    batch["attention_mask"][:] = 1
    batch["pixel_values"].normal_()
    folder = tmp_path_factory.mktemp("anchor")
    options = SubspaceOptions(energy=1.0, sensitivity=True)
    ActivationAnchor.collect(model, [batch], subspaces=options, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def measured(request, anchor_folder) -> dict[str, float]:
    """What conditions took, in bytes; see `planned_memory.py`."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory's peak can be measured on Linux alone")
    script = Path(__file__).with_name("planned_memory.py")
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    call = [sys.executable, str(script), str(anchor_folder), *request.param]
    done = subprocess.run(call, env=os.environ | limits, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_planned_peaks_are_within_a_tenth_of_the_measured_ones(measured, anchor_folder, tmp_path):
    planned = {}
    for name in measured:
        run, args = arguments(name, str(tmp_path))
        run.anchor = str(anchor_folder)
        peak = rehearse(RecipeWorkload(run, args, vlm_config(None), SIZES), "cpu", evaluates=False).peak
        assert sum(peak.items.values()) == peak.bytes
        planned[name] = peak.bytes

    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("fake", [False, True])
def test_storage_log_knows_what_was_held_and_what_it_was(fake):
    with FakeTensorMode() if fake else contextlib.nullcontext(), StorageLog() as log:
        weight = torch.zeros(1000, 1000, requires_grad=True)
        log.tag([weight], "parameters")
        with log.phase("forward"):
            inputs = torch.zeros(100, 1000)
            # The product is kept for no one, its activation for the backward pass; a view is no memory of its own.
            loss = (inputs @ weight).relu().view(-1).sum()
            log.tag_live("activations", "forward")
        with log.phase("backward"):
            loss.backward()
            log.tag([weight.grad], "gradients")

    forward, backward = log.peak("forward"), log.peak("backward")
    assert forward.items == {"parameters": 4_000_000, "activations": 800_000, "temporary": 400_000}
    assert forward.bytes == 5_200_000
    # The gradient of the activation is expanded from a scalar, that of the product is a matrix.
    assert backward.items["gradients"] == 4_000_000
    assert log.peak() == backward
    assert log.peak("evaluation") is None


def test_storage_log_rounds_like_an_allocator():
    with StorageLog(granule=512) as log:
        kept = torch.zeros(129)
        assert log.peak().bytes == 1024
        assert kept.untyped_storage().nbytes() == 516


def test_operations_are_those_of_pytorchs_counter(make_language_model):
    model = make_language_model()
    ids = torch.zeros(2, 10, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    with FlopLog() as log:
        log.phase = "forward"
        loss = model(input_ids=ids, labels=ids).loss
        log.phase = "backward"
        loss.backward()

    assert sum(log.flops.values()) == counter.get_total_flops() > 0
    # A product for the inputs and one for the weights, but for the embeddings, which are looked up.
    assert log.flops["backward"] == pytest.approx(2 * log.flops["forward"], rel=0.02)


def test_known_shapes_have_the_published_number_of_parameters():
    with torch.device("meta"), init.no_init_weights():
        model = PaliGemmaForConditionalGeneration(paligemma2_3b())
    model.tie_weights()
    # KerasHub's count for pali_gemma2_mix_3b_224, whose vocabulary has not the 64 rows that the conversion adds.
    assert sum(p.numel() for p in model.parameters()) == 3_032_094_960 + 64 * 2304


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit", "sgd", "adafactor"])
def test_optimisers_state_is_that_of_the_trainer(optimizer, make_args):
    config = Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config.head_dim, config.vocab_size = 32, 128
    model = Gemma2ForCausalLM(config)
    args = make_args(optim=optimizer, preserve="none")
    with FakeTensorMode(), AssumedValues(0):
        shapes = without_values(model)
        planned = make_optimizer(shapes, args, "cpu")
        for parameter in shapes.parameters():
            parameter.grad = torch.zeros_like(parameter)
        planned.step()
    real = Trainer(model, args).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()

    def state(found):
        tensors = [v for values in found.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        return sorted((str(t.dtype), tuple(t.shape)) for t in tensors)

    assert state(planned) == state(real)


def test_an_optimiser_of_unknown_memory_is_refused(make_args, make_language_model):
    with pytest.raises(ValueError, match="optim: the memory of 'galore_adamw' is not known, expected one of"):
        make_optimizer(make_language_model(), make_args(optim="galore_adamw", optim_target_modules=["q_proj"]), "cpu")


def test_largest_batch_by_hand():
    def plans(**phases):
        return {
            size: {name: np.array([f(size) for f in moments]) for name, moments in phases.items()} for size in (2, 8)
        }

    # 10 and 2 a sample.
    growing = lambda size: 10 + 2 * size  # noqa: E731
    found = plans(backward=[growing])
    assert [largest_batch(found, available) for available in (11, 12, 17.9, 50)] == [0, 1, 3, 20]
    # Where a phase that does not depend on the batch takes more, the others say how much larger it may be.
    flat = lambda size: 30  # noqa: E731
    found = plans(backward=[growing], optimizer=[flat])
    assert [largest_batch(found, available) for available in (29, 30, 50)] == [0, 10, 20]
    # A moment that is not the highest in either plan is, further on.
    found = plans(backward=[flat, lambda size: 4 * size - 4])
    assert [largest_batch(found, available) for available in (30, 96)] == [8, 25]
    assert largest_batch(plans(optimizer=[flat]), 40) is None
    assert largest_batch(plans(optimizer=[flat]), 29) == 0


def test_batches_that_tell_the_largest_have_more_than_one_row():
    assert [telling_batches(batch) for batch in (1, 2, 8)] == [(2, 8), (2, 8), (8, 32)]
    assert [telling_batches(batch, 0.25) for batch in (1, 8, 10)] == [(8, 32), (8, 32), (10, 40)]


def test_plans_that_do_not_say_how_memory_grows_are_refused():
    one, other = {"backward": np.zeros(3)}, {"backward": np.zeros(4)}
    with pytest.raises(ValueError, match=r"plans of two batches say how memory grows, found \[8\]"):
        largest_batch({8: one}, 1)
    with pytest.raises(
        ValueError, match="steps of 2 and of 8 samples differ: 3 and 4 moments in the phase 'backward'"
    ):
        largest_batch({2: one, 8: other}, 1)


def test_the_largest_batch_is_the_one_whose_own_plan_fits(tmp_path):
    run, args = arguments("naive", str(tmp_path), samples=2)
    config = vlm_config(None)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    workload = RecipeWorkload(run, args, config, SIZES)
    plans = {
        size: rehearse(workload.changed({"per_device_train_batch_size": size}), "cpu", evaluates=False)
        for size in (2, 8, 30)
    }
    available = plans.pop(30).peak.bytes
    held = {size: plan.held for size, plan in plans.items()}
    assert [largest_batch(held, available), largest_batch(held, available - 1)] == [30, 29]


def test_a_verdict_agrees_with_the_plan_of_its_own_batch():
    def verdict(batch, peaks):
        def rehearsal(taken):
            peak = Peak("optimizer", taken)
            return Rehearsal(peak, {"optimizer": peak}, {}, 1, 1, {"optimizer": np.array([taken])})

        plan = ConditionPlan("naive", "a model", batch, {size: rehearsal(taken) for size, taken in peaks.items()})
        return next(line for line in itemised(plan, [41]).splitlines() if line.startswith("41 GiB"))

    assert verdict(8, {8: 30 * GIB, 32: 30 * GIB}) == "41 GiB: fits, whatever the batch"
    assert verdict(8, {8: 26 * GIB, 32: 74 * GIB}) == "41 GiB: fits; largest batch per device 15"
    assert verdict(32, {32: 74 * GIB, 128: 266 * GIB}) == "41 GiB: does not fit; largest batch per device 15"
    assert verdict(8, {8: 60 * GIB, 32: 240 * GIB}) == "41 GiB: does not fit; largest batch per device 5"
    assert verdict(1, {1: 50 * GIB, 2: 40 * GIB, 8: 46 * GIB}) == "41 GiB: does not fit"


def test_what_is_not_gone_through_is_counted(tmp_path):
    run, args = arguments("streaming", str(tmp_path), samples=1)
    config = vlm_config(None)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    workload = RecipeWorkload(run, args, config, SIZES)
    one = rehearse(workload, "cpu", evaluates=False)
    rarely = rehearse(workload.changed({"reference_interval": 10**6}), "cpu", evaluates=False)
    assert rarely.step_flops < one.step_flops

    for accumulated, interval in ((5, 1), (1, 3), (3, 3)):
        changes = {"gradient_accumulation_steps": accumulated, "reference_interval": interval}
        found = rehearse(workload.changed(changes), "cpu", evaluates=False)

        # One backward pass in `interval` has the reference direction's operations.
        share = (one.step_flops + (interval - 1) * rarely.step_flops) / interval
        assert found.step_flops == pytest.approx(accumulated * share, rel=1e-5)
        assert found.peak.bytes >= one.peak.bytes


def test_a_phase_does_not_hide_the_peak_of_what_it_is_a_part_of():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory's peak can be measured on Linux alone")
    memory = PhaseMemory()
    reset_peak_memory()
    with memory.during("forward"):
        block = torch.ones(64 * 2**20 // 4)
        del block
    with memory.during("backward"):
        pass

    assert memory.peaks_mb["forward"] > memory.peaks_mb["backward"] + 50
    assert peak_memory_mb() == pytest.approx(memory.peaks_mb["forward"], abs=1)
    assert list(memory.figures()) == ["peak_memory_mb_forward", "peak_memory_mb_backward"]
    assert set(memory.peaks_mb) < set(PHASES)
