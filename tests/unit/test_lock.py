"""Two runs in one folder at once."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from scpl_ds.errors import RecipeError, SaveError
from scpl_ds.lock import NAME, RunLock

pytestmark = pytest.mark.forks

BEAT_S = 0.05  # of locks of other machines here: what they are waited for is three times that


def left_by(folder: Path, **changes: object) -> Path:
    """A lock of another process, as that process would have left it."""
    pid = os.fork()
    if pid == 0:
        RunLock(folder).take()
        os._exit(0)
    os.waitpid(pid, 0)
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def token_of(lock: RunLock) -> str:
    return str(lock._owner["token"])


def test_a_folder_in_use_is_refused_and_the_process_named(tmp_path: Path):
    first = RunLock(tmp_path)
    first.take()
    for attempt in (RunLock(tmp_path).check, RunLock(tmp_path).take):
        with pytest.raises(RecipeError, match=f"in use by another run: process {os.getpid()} on "):
            attempt()
    first.release()


def test_a_released_folder_is_free(tmp_path: Path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    first.release()
    second.take()
    first.release()  # not its own any more
    assert (tmp_path / NAME).exists()
    second.release()
    assert not (tmp_path / NAME).exists()


def test_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path: Path):
    left_by(tmp_path)
    lock = RunLock(tmp_path)
    lock.take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_process_number_that_came_again_is_not_the_owner(tmp_path: Path):
    left_by(tmp_path, pid=os.getppid())
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_a_lock_cut_off_while_it_was_written_is_nobodys(tmp_path: Path):
    (tmp_path / NAME).write_text('{"host": "he')
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


ELSEWHERE = [{"host": "elsewhere"}, {"pids": "pid:[1]"}, {"boot": "another"}]


@pytest.mark.parametrize("place", ELSEWHERE, ids=["machine", "container", "machine of that name"])
def test_the_lock_of_another_place_holds_as_long_as_it_is_touched(
    tmp_path: Path, place: dict[str, str]
):
    """In another container of this host there was no such process: its lock was taken at once."""
    path = left_by(tmp_path, **place)
    gone = threading.Event()

    def touch() -> None:
        while not gone.wait(BEAT_S / 10):
            os.utime(path)

    owner = threading.Thread(target=touch)
    owner.start()
    lock = RunLock(tmp_path, beat_s=BEAT_S)
    try:
        with pytest.raises(RecipeError, match="in use by another run: process "):
            lock.take()
    finally:
        gone.set()
        owner.join()
    lock.take()
    lock.release()


def test_an_owner_that_another_run_took_over_from_saves_no_more(tmp_path: Path):
    """It was suspended for longer than the other waited, and went on saving."""
    mine, other = RunLock(tmp_path), RunLock(tmp_path)
    mine.require()  # a rank that takes none
    mine.take()
    mine.require()
    path = tmp_path / NAME
    path.write_text(path.read_text().replace(token_of(mine), token_of(other)))
    with pytest.raises(SaveError, match=r"of another run by now: process .* took over"):
        mine.require()
    mine.release()
    assert path.exists()


def test_an_owner_whose_lock_was_removed_by_hand_writes_it_again(tmp_path: Path):
    lock = RunLock(tmp_path)
    lock.take()
    (tmp_path / NAME).unlink()
    lock.require()
    with pytest.raises(RecipeError, match="in use by another run"):
        RunLock(tmp_path).check()
    lock.release()
    assert not (tmp_path / NAME).exists()


def test_an_owner_touches_its_lock(tmp_path: Path):
    """What the test above does by hand."""
    mine = RunLock(tmp_path, beat_s=BEAT_S)
    mine.take()
    path = tmp_path / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))
    with pytest.raises(RecipeError, match="on elsewhere"):
        RunLock(tmp_path, beat_s=5 * BEAT_S).check()
    mine.release()
    assert not path.exists()
