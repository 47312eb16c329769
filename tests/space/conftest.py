import asyncio
import importlib

import pytest


@pytest.fixture(scope="session")
def app():
    """The page's module. Outside of a loop, gradio makes loops of its own, which it never closes."""
    pytest.importorskip("gradio")

    async def load():
        return importlib.import_module("app")

    return asyncio.run(load())


@pytest.fixture(scope="session")
def intake(app):
    """The module that checks what visitors send; imported no sooner than gradio is needed."""
    return importlib.import_module("intake")
