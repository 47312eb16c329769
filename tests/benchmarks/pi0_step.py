"""
What fine-tuning transformers' π0 at its published shapes takes under conditions of `recipes/pi0_libero.yaml`:
parameters, peak memory and floating-point operations of a step, as `hf-aegis plan` counts them, from shapes alone; it
reads recipes of `train` and `compare`, and this one is its own script's. `training_step.py` times steps,
with `--size pi0-slice`, or with `--size pi0` on a GPU.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import yaml
from subjects import PI0_LAYERS, make_pi0, pi0_batch
from torch import Tensor, nn
from transformers import PI0Config

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.anchors.fingerprint import AnchorFingerprint
from hf_aegis.training import AEGISConfig
from hf_aegis.training.planning.held_shapes import HeldDirections
from hf_aegis.training.planning.rehearsal import rehearse
from hf_aegis.training.planning.workload import ChangeableWorkload, tensors_like


RECIPE = Path(__file__).parents[2] / "recipes" / "pi0_libero.yaml"
CONDITIONS = ("naive", "aegis_two_pass", "aegis")


class PI0Workload(ChangeableWorkload):
    """
    A [`Workload`] of stock π0, with neither questions nor anything held.

    Args:
        args ([`AEGISConfig`]): Of the training.
        cameras, words (`int`): Pictures of a sample, and tokens of its instruction.
    """

    goes_back = False
    selected = 0

    def __init__(self, args: AEGISConfig, cameras: int, words: int) -> None:
        self.args, self.cameras, self.words = args, cameras, words
        self.config = PI0Config()
        shape = (PI0_LAYERS, self.config.vlm_config.text_config.hidden_size)
        self._anchor = ActivationAnchor(
            torch.zeros(shape), torch.ones(shape), AnchorFingerprint(*shape, "", "batch", 1, 1, 1)
        )

    def model(self) -> nn.Module:
        with torch.device("meta"):
            return make_pi0(PI0_LAYERS, self.config.vlm_config.text_config.vocab_size)

    def anchor(self) -> ActivationAnchor:
        return self._anchor

    def anchor_tensors(self) -> list[Tensor]:
        return tensors_like(self._anchor) if self.args.needs_anchor else []

    def directions(self, model: nn.Module) -> list[HeldDirections]:
        raise ValueError("what is held of π0 is not planned here: it depends on its anchor")

    def batch(self, size: int) -> dict[str, Tensor]:
        return pi0_batch(self.config, size, self.cameras, self.words)

    def replayed(self, size: int) -> dict[str, Tensor]:
        raise ValueError("replayed questions are not planned here")

    def ask(self, model: nn.Module) -> None:
        """Questions are not asked."""


def main() -> None:
    """Counts, and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, help=f"default: {' '.join(CONDITIONS)}")
    parser.add_argument("--batch", type=int, help="default: the recipe's")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--words", type=int, default=32)
    arguments = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    shared = recipe["training"] | {"use_cpu": not torch.cuda.is_available()}
    if arguments.batch:
        shared["per_device_train_batch_size"] = arguments.batch
    print("| condition | parameters | trained | peak, GiB | TFLOP of a micro-batch | × the first |")
    print("|---|---|---|---|---|---|")
    first = None
    for name in arguments.conditions:
        with tempfile.TemporaryDirectory() as folder:
            args = AEGISConfig(output_dir=folder, **(shared | recipe["conditions"][name]))
        plan = rehearse(PI0Workload(args, arguments.cameras, arguments.words), "cuda")
        operations = plan.step_flops / args.gradient_accumulation_steps / 1e12
        first = first or operations
        print(
            f"| {name} | {plan.parameters:,} | {plan.trainable_parameters:,} | {plan.peak.bytes / 2**30:.2f} | "
            f"{operations:.2f} | {operations / first:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
