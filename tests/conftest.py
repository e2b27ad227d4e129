"""Order of the suite: what forks comes first (tests/support/distributed.py says why)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)  # stable
