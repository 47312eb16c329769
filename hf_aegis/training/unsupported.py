"""Ways of training in which what keeps the knowledge, or the training itself, would silently not be right."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PI0ForConditionalGeneration
from transformers.training_args import OptimizerNames, ParallelMode

from hf_aegis.anchors.decoder_layers import find_decoder_layers, unwrap_model
from hf_aegis.training.aegis_config import AEGISConfig


def refuse_unsupported(model: nn.Module, args: AEGISConfig) -> None:
    """
    Raises:
        ValueError: If what keeps the knowledge would not be right with the way of training that is asked for.
    """
    if args.projects or args.penalties:
        what = f"preserve={args.preserve!r}" if args.projects else f"penalties={args.penalties}"
    elif args.holds_subspaces:
        what = f"preserve={args.preserve!r}"
    else:
        return
    sharded = {
        "DeepSpeed, which takes gradients over inside its backward pass; train with torchrun alone "
        "(DistributedDataParallel), or see FSDP": args.deepspeed is not None,
        "FSDP in the Trainer; shard the model with torch's fully_shard and train it in a loop of your own, with "
        "ShardedGradientShield or HeldSubspace": bool(args.fsdp),
    }
    if args.reference_share != 1:
        _refuse_what_splits_no_batch(model, args)
    # Held subspaces need nothing but the weights after each step.
    reasons = sharded | (_in_backward(model, args) if args.projects or args.penalties else {})
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


def _in_backward(model: nn.Module, args: AEGISConfig) -> dict[str, bool]:
    """Ways of training with which gradients and losses cannot be taken hold of, and whether they are asked for."""
    optimizer = OptimizerNames(args.optim).value
    stepping_inside = any(name in optimizer for name in ("lomo", "layerwise"))
    narrow = args.fp16 or any(p.dtype == torch.float16 for p in model.parameters())
    split: Any = args.parallelism_config
    sizes = [getattr(split, name, 1) for name in ("tp_size", "cp_size", "sp_size")]
    offloaded = args.checkpointing_options.get("offload")
    streaming = args.projects and args.reference == "transport" and args.dual_backward == "streaming"
    return {
        'activation_checkpointing_kwargs={"offload": True} in the streaming form, which keeps on the device what '
        'layers are recomputed from; use dual_backward="two_pass", or leave offload out': bool(
            args.activation_checkpointing and offloaded and streaming
        ),
        "tensor, context or sequence parallelism, whose processes do not each have samples of their own": any(
            size > 1 for size in sizes
        )
        or any(isinstance(p, DTensor) for p in model.parameters()),
        "DataParallel over several GPUs of one process; make one visible": args.parallel_mode
        == ParallelMode.NOT_DISTRIBUTED,
        "torch.compile": args.torch_compile,
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
