from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The stand-ins for the simulator, here and in the processes that are started from here."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
