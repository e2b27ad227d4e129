"""An export on the Hugging Face hub."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from scpl_ds.errors import HubError
from scpl_ds.partition._hf import one_line

log = logging.getLogger(__name__)
_OURS = ["model*.safetensors", "model.safetensors.index.json", "adapter_*", "scpl_heads.*"]
"""What an earlier export may have left in the repository, in other shards or another form."""
_DENIED = (401, 403)
_CLIENT: Any = importlib.import_module(HfHubHTTPError.__bases__[0].__module__)
"""What huggingface_hub talks with: ``httpx`` in 1.0, ``httpx2`` in 2.4. It lets its errors through,
and hf_xet, which sends large files, raises Python's own."""
_LATE = (_CLIENT.TimeoutException, TimeoutError)
_APART = (_CLIENT.TransportError, ConnectionError)


class Destination(NamedTuple):
    """Where an export goes."""

    repo_id: str
    """``owner/name``, or a name under the token's own account."""
    private: bool | None = None
    revision: str | None = None


def why_not(destination: Destination, token: str | None = None) -> str | None:
    """What is known to keep an upload from working, without asking the hub; None: nothing."""
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {destination.repo_id}; unset it"
        )
    if not (token or get_token()):
        return (
            f"there is no token of the hub to upload to {destination.repo_id} with; set HF_TOKEN, "
            "or run `hf auth login`"
        )
    return None


def push(folder: Path, destination: Destination, *, message: str, token: str | None = None) -> str:
    """Upload an export as one commit; the repository and the branch are made if need be.

    Weights of an earlier upload that the new one does not have are removed by that commit; other
    files of the repository stay. ``token`` goes before that of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        The commit's address.

    Raises:
        HubError: It could not be done; the folder is as it was.
    """
    if (reason := why_not(destination, token)) is not None:
        raise HubError(_told(folder, destination, reason))
    api, (name, private, revision) = HfApi(library_name="scpl_ds", token=token), destination
    try:
        repo = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=_OURS,
        )
    # Not narrower: huggingface_hub lets the errors of its HTTP client, of its upload library and
    # of the system through. An export that is whole must not be lost by any of them.
    except Exception as error:
        reason = _reason(error).replace(token or get_token() or "\0", "<token>")
        raise HubError(_told(folder, destination, reason)) from error
    return str(commit)


def _reason(error: Exception) -> str:
    for found in _causes(error):
        if (known := _known(found)) is not None:
            return known
    return f"it failed on this side ({type(error).__name__}: {one_line(error)})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """What was raised, and what it was raised from: some errors of the client come wrapped."""
    while error is not None:
        yield error
        error = error.__cause__


def _known(error: BaseException) -> str | None:
    text = one_line(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in _DENIED or isinstance(error, RepositoryNotFoundError):
            return (
                f"the hub refused ({text}); use a token with write access to that account or "
                "organisation (https://huggingface.co/settings/tokens), or another name"
            )
        return f"the hub answered {status} ({text})"
    if isinstance(error, LocalTokenNotFoundError):
        return f"{text}; set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{text}; unset HF_HUB_OFFLINE"
    named = f"({type(error).__name__}: {text})"
    if isinstance(error, _LATE):
        return f"{constants.ENDPOINT} did not answer in time {named}"
    if isinstance(error, _APART):
        return f"{constants.ENDPOINT} could not be reached {named}"
    return None


def _told(folder: Path, destination: Destination, reason: str) -> str:
    name, private, revision = destination
    more = " --private" * bool(private) + (f" --revision {revision}" if revision else "")
    return (
        f"{folder} was not uploaded to {name}: {reason}. The export is whole. To upload it later: "
        f"`hf upload {name} {folder} .{more}`"
    )
