"""
What ships inside the package: the embedded vision-language model, a small set of demonstrations, the policies that
`hf-aegis demo` trained from both, and one that was trained to act.
"""

from pathlib import Path


_FOLDER = Path(__file__).parent

EMBEDDED_VLM = _FOLDER / "paligemma2-easy-vqa"
"""Folder of a 1.3 M-parameter PaliGemma2 trained on easy-VQA; loads with `from_pretrained`."""

DEMONSTRATIONS = _FOLDER / "libero_demonstrations.hdf5"
"""Scripted demonstrations recorded in the LIBERO simulator, LIBERO format."""

DEMO_CHECKPOINTS = {name: _FOLDER / "demo" / name for name in ("naive", "aegis", "held_pairs")}
"""Condition of `hf-aegis demo` -> folder of its policy, in bfloat16; written by `recipes/demo_checkpoints.py`."""

ACTING_POLICY = _FOLDER / "acting"
"""Folder of a policy that acts in the LIBERO simulator, in bfloat16; written by `recipes/acting_checkpoint.py`."""
