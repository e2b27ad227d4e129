"""Words that ranks leave for each other without waiting, readable from any thread."""

from __future__ import annotations

import json
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store


def own_connection(store: Any) -> Any:
    """The rendezvous store over a connection of its own, where there are connections: a call that
    waits keeps all others out of the one it uses."""
    try:
        return store.clone()
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return store


class Board:
    """Plain JSON under names, in the rendezvous store: no collective, so a thread may use it while
    the main one trains."""

    def __init__(self, name: str) -> None:
        self._name, self._store = name, own_connection(_get_default_store())

    def _key(self, rank: int) -> str:
        return f"scpl/{self._name}/{rank}"

    def leave(self, rank: int, value: Any) -> None:
        """Leave this rank's word."""
        self._store.set(self._key(rank), json.dumps(value))

    def take(self, ranks: range) -> dict[int, Any] | None:
        """The words of ``ranks``, removed, once all are there; None before."""
        keys = [self._key(rank) for rank in ranks]
        if keys and not self._store.check(keys):
            return None
        words = {rank: json.loads(self._store.get(self._key(rank))) for rank in ranks}
        for key in keys:
            self._store.delete_key(key)
        return words
