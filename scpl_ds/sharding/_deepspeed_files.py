"""DeepSpeed's own checkpoint of a stage, for tools that read those, ``zero_to_fp32`` above all.

Nothing here or elsewhere in the package reads them again: they are pickles.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def write_deepspeed_files(
    engine: Any, folder: Path, tag: str, names: Mapping[str, str]
) -> list[Path]:
    """``engine.save_checkpoint`` into ``folder`` (a collective of the stage).

    Args:
        engine: The stage's DeepSpeed engine.
        folder: Gets ``latest``, ``zero_to_fp32.py`` and, in ``tag``, the ranks' files.
        names: The module's names -> those of a checkpoint, which the files bear.

    Returns:
        The files that this rank wrote.

    Raises:
        OSError: One could not be written; after this rank has done all that others wait for.
    """
    kept = {name for name, _ in engine.module.named_parameters()} <= names.keys()
    files = _Files(names)
    # It says on stdout and in its log what it writes, and why it need not worry.
    with _writing_through(engine, files), contextlib.redirect_stdout(io.StringIO()):
        engine.save_checkpoint(
            str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=not kept
        )
    if engine.global_rank == 0:
        files.attempt(lambda: (folder / "latest").write_text(tag), [folder / "latest"])
    if files.failure is not None:
        raise files.failure
    return files.written


class _Files:
    """Writes files, and keeps what goes wrong: DeepSpeed's ranks meet again after each of them."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self.written: list[Path] = []
        self.failure: OSError | None = None

    def attempt(self, write: Callable[[], Any], paths: Iterable[Path] = ()) -> None:
        if self.failure is not None:
            return
        try:
            write()
        except (OSError, RuntimeError) as error:  # torch.save has both for a full disk
            self.failure = error if isinstance(error, OSError) else OSError(str(error))
        else:
            self.written.extend(paths)

    def renamed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What DeepSpeed saves of a module, under the names of a checkpoint; of anything else
        nothing bears names that ``zero_to_fp32`` looks at."""
        if "module" not in state:
            return dict(state)

        def new(name: str) -> str:
            return self._names.get(name, name)

        def keys(named: Mapping[str, Any] | None) -> dict[str, Any] | None:
            return None if named is None else {new(name): value for name, value in named.items()}

        shared, groups = state["shared_params"], state["param_shapes"]
        return {
            **state,
            "module": keys(state["module"]),
            "buffer_names": [new(name) for name in state["buffer_names"]],
            "param_shapes": None if groups is None else [keys(group) for group in groups],
            "frozen_param_shapes": keys(state["frozen_param_shapes"]),
            "frozen_param_fragments": keys(state["frozen_param_fragments"]),
            "shared_params": shared and {new(one): new(other) for one, other in shared.items()},
        }


@contextlib.contextmanager
def _writing_through(engine: Any, files: _Files) -> Iterator[None]:
    """Let an engine write with ``files``."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Kept(TorchCheckpointEngine):
        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            files.attempt(lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

        def save(self, state_dict: Any, path: str) -> None:
            whole = files.renamed(state_dict)
            files.attempt(lambda: super(Kept, self).save(whole, path), [Path(path)])

    theirs, copy = engine.checkpoint_engine, engine._copy_recovery_script

    def copy_script(folder: str) -> None:
        before = set(Path(folder).glob("*.py"))
        files.attempt(lambda: copy(folder))
        files.written.extend(sorted(set(Path(folder).glob("*.py")) - before))

    engine.checkpoint_engine = Kept(engine._config)
    engine._copy_recovery_script = copy_script
    try:
        yield
    finally:
        engine.checkpoint_engine = theirs
        del engine._copy_recovery_script
