import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.training import AEGISConfig


VOCABULARY = 61
TOKENS = 10
# Sizes of the embedded model's action expert in these tests.
FLOW = {
    "chunk_size": 4,
    "expert_hidden_size": 16,
    "expert_num_layers": 1,
    "expert_num_heads": 2,
    "expert_intermediate_size": 32,
}


class TokenDataset(Dataset):
    """Random token sequences of varying length, as a causal language model takes them."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (size, TOKENS), generator=generator)
        self.lengths = torch.randint(4, TOKENS + 1, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(TOKENS) < self.lengths[index]).long()
        return {
            "input_ids": self.ids[index],
            "attention_mask": mask,
            "labels": self.ids[index].masked_fill(mask == 0, -100),
        }


@pytest.fixture
def token_dataset() -> TokenDataset:
    return TokenDataset(24)


@pytest.fixture
def make_language_model() -> Callable[[], Gemma2ForCausalLM]:
    """A tiny Gemma2 decoder, the same at every call."""

    def make() -> Gemma2ForCausalLM:
        torch.manual_seed(0)
        config = Gemma2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=VOCABULARY,
            attn_implementation="eager",
            use_cache=False,
            initializer_range=0.2,
        )
        return Gemma2ForCausalLM(config)

    return make


@pytest.fixture
def make_anchor() -> Callable[[PreTrainedModel], ActivationAnchor]:
    """An anchor of other sequences than those of `token_dataset`."""

    def make(model: PreTrainedModel) -> ActivationAnchor:
        other = TokenDataset(16, seed=7)
        rows = [other[index] for index in range(len(other))]
        batches = [
            {
                key: torch.stack([row[key] for row in rows[start : start + 8]])
                for key in ("input_ids", "attention_mask")
            }
            for start in (0, 8)
        ]
        return ActivationAnchor.collect(model, batches, progress=False)

    return make


@pytest.fixture
def make_args(tmp_path) -> Callable[..., AEGISConfig]:
    """Arguments of a short run; keywords win."""

    def make(**changes: Any) -> AEGISConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        }
        return AEGISConfig(**{**defaults, **changes})

    return make


class SmallDisk:
    """
    A file system of 4 MiB.

    Args:
        folder (`Path`): Where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, left: int = 0) -> None:
        """Takes all but so many bytes."""
        with self._filler.open("wb") as file:
            file.write(bytes(shutil.disk_usage(self.folder).free - left))

    def empty(self) -> None:
        """Gives them back."""
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[SmallDisk]:
    """Mounted where no other process sees it but by this path, and gone afterwards; no root is needed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = 'mount -t tmpfs -o size=4m none "$1" && cd "$1" && echo mounted && exec cat'
    for namespaces in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        try:
            holder = subprocess.Popen(
                ["unshare", *namespaces, "sh", "-c", mount, "sh", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            break
        with holder:
            if holder.stdout.readline() == b"mounted\n":
                yield SmallDisk(Path(f"/proc/{holder.pid}/cwd"))
                return
    pytest.skip("the system lets nobody mount a file system here")


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory) -> str:
    """A folder of two LIBERO tasks with three short demonstrations each, noise for pictures and smooth actions."""
    folder = tmp_path_factory.mktemp("demonstrations")
    convention = {
        "format_version": 1,
        "observation": "before_action",
        "image_origin": "top_left",
        "image_size": 64,
        "frames": "raw",
    }
    for task, instruction in enumerate(("pick up the red circle", "pick up the blue triangle")):
        random = np.random.default_rng(task)
        with h5py.File(folder / f"task_{task}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["env_name"] = "Libero_Floor_Manipulation"
            data.attrs["env_args"] = json.dumps({"env_name": "Libero_Floor_Manipulation"})
            data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
            data.attrs["bddl_file_name"] = f"bddl_files/libero_object/task_{task}.bddl"
            data.attrs["hf_aegis_convention"] = json.dumps(convention)
            rendered = {"image_size": 64, "supersampling": 2, "rendering": "fast"}
            data.attrs["hf_aegis_recording"] = json.dumps({"settings": rendered})
            lengths = (6, 7, 8)
            data.attrs["num_demos"] = len(lengths)
            data.attrs["total"] = sum(lengths)
            for index, length in enumerate(lengths):
                demo = data.create_group(f"demo_{index}")
                demo.attrs["num_samples"] = length
                demo["actions"] = np.cumsum(random.normal(0, 0.1, (length, 7)), axis=0).clip(-1, 1)
                for key, width in (("joint_states", 7), ("gripper_states", 2), ("ee_states", 6)):
                    demo[f"obs/{key}"] = random.normal(0, 0.5, (length, width))
                for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                    demo[f"obs/{camera}"] = random.integers(0, 256, (length, 64, 64, 3), dtype=np.uint8)
    return str(folder)


@pytest.fixture(scope="session")
def make_libero(demonstrations) -> Callable[..., Dataset]:
    def make(split: str = "train", **options: Any) -> Dataset:
        from hf_aegis.data import LiberoDataset

        return LiberoDataset(demonstrations, chunk_size=FLOW["chunk_size"], split=split, **options)

    return make


@pytest.fixture(scope="session")
def make_flow_model() -> Callable[..., PreTrainedModel]:
    """The embedded model with a tiny action expert, the same at every call."""

    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        from hf_aegis.assets import EMBEDDED_VLM
        from hf_aegis.models import PaliGemmaFlowForAction

        torch.manual_seed(0)
        return PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, dtype=dtype, **{**FLOW, **changes})

    return make


@pytest.fixture(scope="session")
def vqa_holdout() -> Any:
    from transformers import AutoProcessor

    from hf_aegis.assets import EMBEDDED_VLM
    from hf_aegis.data.vqa import load_easy_vqa
    from hf_aegis.evaluation.vqa import VQAHoldout

    return VQAHoldout(load_easy_vqa("test", 6, seed=0), AutoProcessor.from_pretrained(EMBEDDED_VLM))


@pytest.fixture(scope="session")
def flow_anchor(make_flow_model) -> ActivationAnchor:
    """The embedded model's anchor on a few of easy-VQA's training questions."""
    from transformers import AutoProcessor

    from hf_aegis.assets import EMBEDDED_VLM
    from hf_aegis.data.vqa import VQACollator, load_easy_vqa

    collator = VQACollator(AutoProcessor.from_pretrained(EMBEDDED_VLM))
    samples = load_easy_vqa("train", 16, seed=0)
    batches = [collator(samples[:8]), collator(samples[8:])]
    return ActivationAnchor.collect(make_flow_model(), batches, dataset_id="easy-vqa", progress=False)
