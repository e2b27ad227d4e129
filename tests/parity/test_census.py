"""Every model type transformers knows: equal, refused with a reason, or listed. Run by hand
(slow)."""

from __future__ import annotations

import collections

import pytest

from tests.support.census import TASKS, census
from tests.support.models import CASES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_model_type_of_transformers_gives_a_different_result_in_stages() -> None:
    """Each type is equal to the whole model, refused, fails loudly, or could not be built small."""
    outcomes = census()
    status = {(o.model_type, o.task): o for o in outcomes}
    different = [o for o in outcomes if o.status == "different"]
    assert not different
    assert all(o.reason for o in outcomes if o.status != "equal")
    for task in TASKS:
        counts = collections.Counter(o.status for o in outcomes if o.task == task)
        assert counts["equal"] >= 70, counts
    refused = [(a.model_type, t) for a, t in CASES if status[a.model_type, t].status == "refused"]
    assert not refused
