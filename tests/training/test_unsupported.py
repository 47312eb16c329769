"""What is refused when a trainer is built that would shard its model over processes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model

from hf_aegis.training import AEGISTrainer
from hf_aegis.training.run import RunArguments, run_training
from hf_aegis.training.unsupported import refuse_sharding


def test_deepspeed_is_refused_without_a_projection_too(make_language_model, make_args, token_dataset):
    args = make_args(preserve="none")
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="preserve='none' is not supported with DeepSpeed"):
        AEGISTrainer(make_language_model(), args, train_dataset=token_dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "replay"}, "reference='replay', whose gradients pass FSDP's reduction by"),
        ({"penalties": {"l2sp": 1.0}}, r"penalties=\{'l2sp': 1.0\}"),
        ({"projection_target": "update"}, "projection_target='update'"),
        ({"projection_metric": "adam"}, "projection_target='gradient', projection_metric='adam'"),
        ({"projection_scope": "rank"}, 'projection_scope="rank"'),
        ({"reference_interval": 4}, "reference_interval=4, reference_share=1.0, which are of the"),
        ({"reference_share": 0.5}, "reference_interval=1, reference_share=0.5, which are of the"),
        ({"neuron_cosine_steps": 5}, "neuron_cosine_steps"),
        ({"optim": "adamw_bnb_8bit"}, "the optimiser adamw_bnb_8bit"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
            r'activation_checkpointing_kwargs=\{"offload": True\}, which is not tested here',
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"torch_compile": True}, "torch.compile"),
    ],
)
def test_what_does_not_go_with_fsdp_is_refused(
    make_language_model, make_anchor, make_args, token_dataset, changes, message
):
    model, args = make_language_model(), make_args(**changes)
    args.fsdp = True
    with pytest.raises(ValueError, match=f"is not supported with FSDP and {message}"):
        AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset, replay_dataset=token_dataset)


def test_certificates_are_refused_with_fsdp(make_language_model, make_anchor, make_args, token_dataset):
    model, args = make_language_model(), make_args()
    args.fsdp = True
    with pytest.raises(ValueError, match="certificate_batches are not supported with FSDP"):
        AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset, certificate_batches=[])


# PEFT asks the model by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_models_that_fsdp_does_not_shard_are_refused(make_language_model, make_args, token_dataset, monkeypatch):
    # As `accelerate launch` asks for it.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = make_args(preserve="none")
    with pytest.raises(ValueError, match="FSDP and PEFT adapters"):
        AEGISTrainer(get_peft_model(make_language_model(), LoraConfig()), args, train_dataset=token_dataset)
    with pytest.raises(ValueError, match="FSDP and a Linear, which is no PreTrainedModel"):
        AEGISTrainer(torch.nn.Linear(2, 2), args, train_dataset=token_dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, "version 1, which flattens the parameters; use version 2"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "state_dict_type=SHARDED_STATE_DICT"),
        ({"cpu_offload": True}, "cpu_offload"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading"),
        ({"activation_checkpointing": True, "activation_checkpointing_offload": True}, "checkpointing_offload"),
        ({"ignored_modules": "lm_head"}, "ignored_modules"),
    ],
)
# Of the first version, among others that it is old.
@pytest.mark.filterwarnings("ignore")
def test_forms_of_fsdp_that_are_not_supported_are_refused(make_args, monkeypatch, changes, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    right = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    refuse_sharding(SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**right)), make_args())
    plugin = FullyShardedDataParallelPlugin(**{**right, **changes})
    with pytest.raises(ValueError, match=f"FSDP is not supported with .*{message}"):
        refuse_sharding(SimpleNamespace(fsdp_plugin=plugin), make_args())


def test_fsdp_that_would_not_shard_is_refused(make_args):
    args = make_args()
    args.fsdp = True
    with pytest.raises(ValueError, match="shards over accelerators alone, and this process is on cpu"):
        refuse_sharding(SimpleNamespace(), args)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora", {"r": 4}),
        ("gse", {"r": 16}),
        ("weight_interpolation", 0.5),
        ("keep_within", 0.1),
        ("analysis_samples", 2),
    ],
)
def test_runs_that_need_whole_weights_are_refused(make_args, tmp_path, name, value):
    args = make_args(preserve="none")
    args.fsdp = True
    with pytest.raises(ValueError, match=f"{name}=.* needs whole weights, and is not supported with FSDP"):
        run_training(RunArguments(demonstrations=["unread"], **{name: value}), args)
    assert not list((tmp_path / "out").glob("*.yaml"))
