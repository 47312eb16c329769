"""How many clients a server has room for, counted from the first moment of a connection."""

import asyncio
from typing import Any

from websockets.asyncio.server import ServerConnection


MAX_OPENING = 32
"""Connections beyond the clients' own: of those that did not say yet what they want, or only ask for the health."""


class Places:
    """
    The places of a server.

    Args:
        max_clients (`int`): Clients at a time.

    Raises:
        ValueError: If it is below 1.
    """

    def __init__(self, max_clients: int):
        if max_clients < 1:
            raise ValueError(f"max_clients must be at least 1; found {max_clients}")
        self.max_clients = max_clients
        self._connections: set[ServerConnection] = set()
        self._clients: set[ServerConnection] = set()

    def connect(self, connection: ServerConnection) -> bool:
        """Takes note of a connection; whether it may speak."""
        self._connections.add(connection)
        return len(self._connections) <= self.max_clients + MAX_OPENING

    def take(self, connection: ServerConnection) -> bool:
        """Gives a client a place; whether there was one."""
        if len(self._clients) >= self.max_clients:
            return False
        self._clients.add(connection)
        return True

    def leave(self, connection: ServerConnection) -> None:
        """Frees the place of a connection that is no more."""
        self._connections.discard(connection)
        self._clients.discard(connection)


class CountedConnection(ServerConnection):
    """A connection that counts before websockets has read a word of it, and until it is lost."""

    def __init__(self, places: Places, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._places = places

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._places.connect(self):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._places.leave(self)
        super().connection_lost(exc)
