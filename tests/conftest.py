"""Order of the suite: what forks comes first (tests/support/distributed.py says why), also in each
of several workers (``-n 2 --dist loadgroup --no-loadscope-reorder``). They get the tests of a file
together; with pytest 9.2 xdist does not see the groups (its issue 1386), so that is left out."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _forks(item))  # stable
    for item in items:
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{_forks(item)}"))


def _forks(item: pytest.Item) -> bool:
    return item.get_closest_marker("forks") is not None
