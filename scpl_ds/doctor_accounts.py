"""Weights & Biases and the Hugging Face hub, as ``scpl-ds doctor`` finds them. No key is shown."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from scpl_ds.doctor_findings import Finding, ok, warning

_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")


def check_wandb() -> Iterator[Finding]:
    """Mode, and whether there is a key; neither asks the server."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode and mode not in _MODES:
        yield warning(
            "wandb", f"WANDB_MODE is {mode!r}", f"set it to one of {', '.join(_MODES)}, or unset it"
        )
    if importlib.util.find_spec("wandb") is None:
        yield ok("wandb", "not installed (pip install 'scpl-ds[wandb]')")
        return
    where = _wandb_key()
    words = f"mode {mode or 'online, unless the recipe says otherwise'}"
    if where is not None:
        yield ok("wandb", f"{words}; a key is there ({where})")
    elif mode in ("online", "run", "shared"):
        yield warning(
            "wandb", f"{words}, but there is no key: runs are written offline", "wandb login"
        )
    else:
        yield ok("wandb", f"{words}; no key: runs are written offline until `wandb login`")
    yield from _readable_by_others("wandb", _netrc_file(), "the key of Weights & Biases")


def _wandb_key() -> str | None:
    """Where the key is."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        found = netrc.netrc(_netrc_file()).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return str(_netrc_file()) if found is not None and found[2] else None


def _netrc_file() -> Path:
    own = os.environ.get("NETRC")
    return Path(own).expanduser() if own else Path.home() / ".netrc"


def check_hub() -> Iterator[Finding]:
    """Whether there is a token, and whether the hub may be asked."""
    from huggingface_hub import constants, get_token

    token = "a token is there" if get_token() else "no token: public models and data only"
    offline = "; HF_HUB_OFFLINE: only what is in the cache" if constants.HF_HUB_OFFLINE else ""
    yield ok("hugging face", f"{token}{offline}; cache {constants.HF_HUB_CACHE}")
    path = Path(constants.HF_TOKEN_PATH)
    yield from _readable_by_others("hugging face", path, "the token")


def _readable_by_others(check: str, path: Path, what: str) -> Iterator[Finding]:
    try:
        open_to_all = path.is_file() and path.stat().st_mode & 0o044
    except OSError:
        return
    if open_to_all:
        yield warning(check, f"others may read {what}: {path}", f"chmod 600 {path}")
