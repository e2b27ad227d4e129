"""The table of predicted throughput is what the code gives for the inputs above it."""

from __future__ import annotations

import json

from scpl_ds.bench.predict import GPUS, Inputs, predict, render
from tests.docs.pages import BLOCKS, ROOT

PAGE = "docs/scaling.md"


def test_the_table_of_predicted_throughput_is_what_the_code_gives():
    text = (ROOT / PAGE).read_text()
    inputs = [b.code for b in BLOCKS if b.page == PAGE and b.language == "json"]
    assert len(inputs) == 1 and GPUS[-1] == 1024
    for given in inputs:
        table = render(predict(Inputs.from_mapping(json.loads(given))))
        assert f"{given}```\n\n{table}\n" in text
