"""The trainings whose memory is planned, and measured in a process of its own."""

from typing import Any

from hf_aegis.training import AEGISConfig
from hf_aegis.training.planning.recipe_workload import Sizes
from hf_aegis.training.run_arguments import RunArguments


EXPERT = {"expert_hidden_size": 128, "expert_num_layers": 3, "expert_num_heads": 4, "expert_intermediate_size": 512}
SIZES = Sizes(text_tokens=20)
SAMPLES = 8
CHECKPOINTED: dict[str, Any] = {"activation_checkpointing": True}
CONDITIONS: dict[str, dict[str, Any]] = {
    "naive": {"preserve": "none"},
    "naive, checkpointed": {"preserve": "none"} | CHECKPOINTED,
    "streaming": {},
    "streaming, checkpointed": CHECKPOINTED,
    "two-pass, checkpointed": {"dual_backward": "two_pass"} | CHECKPOINTED,
    "pairs": {"preserve": "subspace", "subspace_sensitivity": 0.9},
    "lora": {"preserve": "none"},
    "8-bit": {"preserve": "none", "optim": "adamw_bnb_8bit"},
    "bf16": {"preserve": "none", "bf16": True},
    "streaming, bf16, checkpointed": {"bf16": True} | CHECKPOINTED,
}


def arguments(name: str, output_dir: str, samples: int = SAMPLES) -> tuple[RunArguments, AEGISConfig]:
    """A condition's arguments."""
    run = RunArguments(
        expert=EXPERT,
        lora={"r": 16, "lora_alpha": 32} if name == "lora" else None,
        vqa_samples=0,
    )
    args = AEGISConfig(
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=samples,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **CONDITIONS[name],
    )
    return run, args
