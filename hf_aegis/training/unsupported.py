"""Ways of training in which what keeps the knowledge, or the training itself, would silently not be right."""

import os
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PI0ForConditionalGeneration, PreTrainedModel
from transformers.training_args import OptimizerNames, ParallelMode

from hf_aegis.anchors.decoder_layers import find_decoder_layers, unwrap_model
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.run_arguments import RunArguments


def refuse_unsupported(model: nn.Module, args: AEGISConfig) -> None:
    """
    Raises:
        ValueError: If the training, or what keeps the knowledge in it, would not be right with what is asked for.
    """
    what = f"penalties={args.penalties}" if args.penalties and not args.projects else f"preserve={args.preserve!r}"
    reasons = {
        "DeepSpeed, which takes gradients over inside its backward pass, before the Trainer can look at them; use "
        "fsdp=True, which shards parameters, gradients and optimiser, or torchrun alone (DistributedDataParallel)": (
            args.deepspeed is not None or getattr(args, "deepspeed_plugin", None) is not None
        ),
        "a model that was sharded when it was loaded; load it whole and use fsdp=True": any(
            isinstance(p, DTensor) for p in model.parameters()
        ),
    }
    if args.reference_share != 1:
        _refuse_what_splits_no_batch(model, args)
    if asks_for_fsdp(args):
        reasons |= _under_fsdp(model, args)
    # Held subspaces need nothing but the weights after each step.
    if args.projects or args.penalties:
        reasons |= _in_backward(model, args)
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{what} is not supported with {reason}")


def _refuse_what_splits_no_batch(model: nn.Module, args: AEGISConfig) -> None:
    """
    Raises:
        ValueError: If the model's layers cannot run on the parts of a batch one after the other.
    """
    base = unwrap_model(model)
    reasons = {
        f"{type(base).__name__}, whose layers hand their keys and values to the action expert by a cache": isinstance(
            base, PI0ForConditionalGeneration
        ),
        "routed experts, whose balance is that of a whole batch": hasattr(model, "get_auxiliary_loss"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"reference_share={args.reference_share} is not supported with {reason}")


def refuse_sharding(state: Any, args: AEGISConfig) -> None:
    """
    Args:
        state ([`~accelerate.state.AcceleratorState`]): What accelerate made of the arguments and the environment.
        args ([`AEGISConfig`]): The arguments.

    Raises:
        ValueError: If accelerate will not shard though it was asked to, or in a way that is not supported.
    """
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        if args.fsdp:
            raise ValueError(
                f"fsdp={args.fsdp!r}, but accelerate shards over accelerators alone, and this process is on "
                f"{args.device}: each process would train the whole model. Leave fsdp out for DistributedDataParallel"
            )
        return
    dtype = plugin.state_dict_type.name
    reasons = {
        f"version {plugin.fsdp_version}, which flattens the parameters; use version 2": plugin.fsdp_version != 2,
        f"state_dict_type={dtype}, whose checkpoints hold no weights that from_pretrained reads; use "
        "FULL_STATE_DICT": dtype != "FULL_STATE_DICT",
        "cpu_offload, which is not tested here": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
        "cpu_ram_efficient_loading, with which what is to be kept would be read from weights that are not there yet": (
            plugin.cpu_ram_efficient_loading
        ),
        "activation_checkpointing_offload, which is not tested here; use activation_checkpointing": (
            plugin.activation_checkpointing_offload
        ),
        "ignored_modules, whose gradients no process would reduce": bool(plugin.ignored_modules),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"FSDP is not supported with {reason}")


def refuse_after_sharding(run: RunArguments, args: AEGISConfig) -> None:
    """
    Raises:
        ValueError: If a run under FSDP asks for what is done to whole weights, before or after the training.
    """
    names = ("lora", "gse", "weight_interpolation", "keep_within", "settling_steps", "analysis_samples")
    for name in names:
        if asks_for_fsdp(args) and (value := getattr(run, name)):
            raise ValueError(
                f"{name}={value!r} needs whole weights, and is not supported with FSDP; run torchrun without fsdp "
                "(DistributedDataParallel)"
            )


def asks_for_fsdp(args: AEGISConfig) -> bool:
    """Whether the arguments, or `accelerate launch`, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _under_fsdp(model: nn.Module, args: AEGISConfig) -> dict[str, bool]:
    """What goes with DistributedDataParallel but not with sharded weights, and whether it is asked for."""
    optimizer = OptimizerNames(args.optim).value
    ddp = "use DistributedDataParallel (torchrun without fsdp)"
    return {
        f"FSDP and reference={args.reference!r}, whose gradients pass FSDP's reduction by; {ddp}": (
            args.projects and args.reference != "transport"
        ),
        f"FSDP and penalties={args.penalties}, which hold on to weights that FSDP replaces; {ddp}": (
            bool(args.penalties)
        ),
        f"FSDP and projection_target={args.projection_target!r}, projection_metric={args.projection_metric!r}; only "
        f"gradients are projected there, in the Euclidean metric, or {ddp}": (
            args.projection_target != "gradient" or args.projection_metric != "euclidean"
        ),
        'FSDP and projection_scope="rank", as FSDP gives no process a gradient of its own; use "global"': (
            args.projection_scope != "global"
        ),
        f"FSDP and reference_interval={args.reference_interval}, reference_share={args.reference_share}, which are of "
        f"the streaming form; there the reference is whole and of each step, or {ddp}": (
            args.projects and (args.reference_interval, args.reference_share) != (1, 1.0)
        ),
        f"FSDP and neuron_cosine_steps, as no process has all of a neuron's weights; {ddp}": (
            args.neuron_cosine_steps > 0
        ),
        f"FSDP and PEFT adapters, which need too little memory for it; {ddp}": isinstance(model, PeftModel),
        f"FSDP and a {type(model).__name__}, which is no PreTrainedModel whose checkpoints could be read back": (
            not isinstance(model, PreTrainedModel | PeftModel)
        ),
        f"FSDP and the optimiser {optimizer}, whose 8-bit states do not know sharded weights; use adamw_torch": any(
            name in optimizer for name in ("8bit", "bnb", "4bit")
        ),
        f"FSDP and π0, whose expert reads each layer's keys and values past FSDP's hooks; {ddp}": isinstance(
            unwrap_model(model), PI0ForConditionalGeneration
        ),
        'FSDP and activation_checkpointing_kwargs={"offload": True}, which is not tested here; leave it out': bool(
            args.activation_checkpointing and args.checkpointing_options.get("offload")
        ),
        "FSDP and torch.compile": args.torch_compile,
        "FSDP and auto_find_batch_size, which would shard the model again": args.auto_find_batch_size,
        "FSDP and a parallelism_config; weights are sharded over one dimension, that of all processes": (
            args.parallelism_config is not None
        ),
    }


def _in_backward(model: nn.Module, args: AEGISConfig) -> dict[str, bool]:
    """Ways of training with which gradients and losses cannot be taken hold of, and whether they are asked for."""
    optimizer = OptimizerNames(args.optim).value
    stepping_inside = any(name in optimizer for name in ("lomo", "layerwise"))
    narrow = args.fp16 or any(p.dtype == torch.float16 for p in model.parameters())
    split: Any = args.parallelism_config
    sizes = [getattr(split, name, 1) for name in ("tp_size", "cp_size", "sp_size")]
    offloaded = args.checkpointing_options.get("offload")
    streaming = args.projects and args.reference == "transport" and args.dual_backward == "streaming"
    # Whatever `dual_backward` says, that of FSDP is the two-pass form.
    streaming = streaming and not asks_for_fsdp(args)
    return {
        'activation_checkpointing_kwargs={"offload": True} in the streaming form, which keeps on the device what '
        'layers are recomputed from; use dual_backward="two_pass", or leave offload out': bool(
            args.activation_checkpointing and offloaded and streaming
        ),
        "tensor, context or sequence parallelism, whose processes do not each have samples of their own": any(
            size > 1 for size in sizes
        ),
        "DataParallel over several GPUs of one process; make one visible": args.parallel_mode
        == ParallelMode.NOT_DISTRIBUTED,
        "torch.compile": args.torch_compile,
        "ddp_static_graph, with which DistributedDataParallel would reduce the gradients itself": bool(
            args.ddp_static_graph
        ),
        f"the optimiser {optimizer}, which steps inside the backward pass": stepping_inside,
        "float16, in which the penalty's gradient would vanish; use bfloat16": narrow,
    }


def refuse_cut_gradient(model: nn.Module, args: AEGISConfig) -> None:
    """
    Raises:
        ValueError: If the model is a π0 whose vision-language model would get no gradient.
    """
    base = unwrap_model(model)
    if not isinstance(base, PI0ForConditionalGeneration):
        return
    if args.activation_checkpointing or args.gradient_checkpointing or base.is_activation_checkpointing:
        raise ValueError(
            f"activation_checkpointing is not supported for {type(base).__name__}: checkpointed layers do not write "
            "the cache through which its action expert reads the vision-language model, to which no gradient would "
            "come back"
        )


def refuse_other_layers(model: nn.Module, answering: nn.Module | None, layers: str | None) -> None:
    """
    Raises:
        ValueError: If the model that answers questions has not the decoder layers of the one that trains.
    """
    if answering is None:
        return
    trained = list(find_decoder_layers(model, layers))
    inside = {id(module) for module in answering.modules()}
    if any(id(layer) not in inside for layer in trained):
        raise ValueError(
            f"answering_model, a {type(unwrap_model(answering)).__name__}, does not have the decoder layers of the "
            f"{type(unwrap_model(model)).__name__} that is trained: it has to share them, or it will never change"
        )


def refuse_speechless(model: nn.Module) -> None:
    """
    Raises:
        ValueError: If the model that is to be asked questions cannot generate text.
    """
    base = unwrap_model(model)
    if not callable(getattr(base, "generate", None)):
        raise ValueError(
            f"vqa_holdout: a {type(base).__name__} does not answer questions; give the model that does as "
            "answering_model (of a π0, hf_aegis.models.pi0_vlm(model))"
        )
