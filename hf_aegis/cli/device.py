"""The torch device that a command runs on."""


def resolve_device(name: str) -> str:
    """
    `"auto"` as the GPU where there is one, else the CPU; any other name as it is.

    Raises:
        ValueError: if a GPU is asked for and torch finds none.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name.startswith("cuda") and not available:
        raise ValueError(f"device {name!r}: torch {torch.__version__} finds no GPU; use 'cpu' or 'auto'")
    return name
