"""Ranks that would not train the same thing are refused before they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from scpl_ds import setup
from scpl_ds.data.prepared import Facts
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import DataError, RecipeError
from scpl_ds.recipe import recipe_from_mapping
from tests.support import tiny
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"torch": "1.0"}, True),
        ({"scpl_ds_commit": "abc"}, True),
        ({"scpl_ds_commit": None}, False),  # git is not there, or was too slow
        ({"wandb": "1.0"}, False),
    ],
)
def test_a_rank_with_other_versions_is_refused_by_all(
    changed: dict[str, str | None], refused: bool
) -> None:
    installed = {"torch": "2.0", "scpl_ds_commit": "def"}

    def body() -> None:
        mine = {**installed, **(changed if dist.get_rank() == 1 else {})}
        setup.versions = lambda: {name: text for name, text in mine.items() if text}
        mesh = Mesh(2, 1, "cpu", timeout_s=20)
        if not refused:
            return setup._refuse_other_versions(mesh)
        with pytest.raises(RecipeError, match=r"rank 1 on .* have other versions"):
            setup._refuse_other_versions(mesh)

    run_ranks(2, body)


@pytest.mark.parametrize("same", [True, False])
def test_a_rank_that_reads_other_training_data_is_refused_by_all(
    tmp_path: Path, same: bool
) -> None:
    """As many samples, in another order: as of a copy that somebody has sorted."""
    mapping = tiny.make(tmp_path)
    train = Path(mapping["data"]["train_file"])
    head, *rows = train.read_text().splitlines(keepends=True)
    other = train.with_name("other.csv")
    other.write_text("".join([head, *(rows if same else rows[::-1])]))

    def body() -> None:
        mesh = Mesh(1, 2, "cpu", timeout_s=20)
        files = {"data.train_file": str(other)} if dist.get_rank() == 1 else {}
        recipe = recipe_from_mapping(tiny.put(mapping, files))
        if same:
            assert isinstance(setup.load_data(recipe, mesh).facts, Facts)
            return
        with pytest.raises(DataError, match=r"Rank 1 on .* reads other training data than rank 0"):
            setup.load_data(recipe, mesh)

    run_ranks(2, body)
