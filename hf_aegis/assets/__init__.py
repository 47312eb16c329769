"""What ships inside the package: the embedded vision-language model and a small set of demonstrations."""

from pathlib import Path


_FOLDER = Path(__file__).parent

EMBEDDED_VLM = _FOLDER / "paligemma2-easy-vqa"
"""Folder of a 1.3 M-parameter PaliGemma2 trained on easy-VQA; loads with `from_pretrained`."""

DEMONSTRATIONS = _FOLDER / "libero_demonstrations.hdf5"
"""Scripted demonstrations recorded in the LIBERO simulator, LIBERO format."""
