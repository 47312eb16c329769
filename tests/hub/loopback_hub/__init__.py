"""
A Hugging Face Hub on the loopback interface, for tests: what huggingface_hub, transformers and datasets call, kept in
memory. `store` holds the repositories, `routes` answers requests on them, `faults` makes requests fail, `server`
speaks HTTP, and `fixture` points the clients to it.
"""

from loopback_hub.faults import Faults
from loopback_hub.server import LoopbackServer
from loopback_hub.store import Repository, Store


__all__ = ["Faults", "LoopbackServer", "Repository", "Store"]
