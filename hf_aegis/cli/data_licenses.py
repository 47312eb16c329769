"""Licences of data that comes with a package, for the cards of what was made of it."""

_LICENSES = {"easy-vqa": "mit", "demonstrations": "apache-2.0"}


def known_license(dataset_id: str | None) -> str | None:
    """
    The licence of a data set, by the Hub's name for it, where it is known.

    Args:
        dataset_id (`str`, *optional*): As in an anchor's fingerprint: its name, and after a colon the split.
    """
    return _LICENSES.get((dataset_id or "").partition(":")[0])
