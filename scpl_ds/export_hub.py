"""An export on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

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


class Destination(NamedTuple):
    """Where an export goes."""

    repo_id: str
    """``owner/name``, or a name under the token's own account."""
    private: bool | None = None
    revision: str | None = None


def why_not(destination: Destination) -> str | None:
    """What is known to keep an upload from working, without asking the hub; None: nothing."""
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {destination.repo_id}; unset it"
        )
    if not get_token():
        return (
            f"there is no token of the hub to upload to {destination.repo_id} with; set HF_TOKEN, "
            "or run `hf auth login`"
        )
    return None


def push(folder: Path, destination: Destination, *, message: str) -> str:
    """Upload an export as one commit; the repository and the branch are made if need be.

    Weights of an earlier upload that the new one does not have are removed by that commit; other
    files of the repository stay.

    Returns:
        The commit's address.

    Raises:
        HubError: It could not be done; the folder is as it was.
    """
    if (reason := why_not(destination)) is not None:
        raise HubError(_told(folder, destination, reason))
    api, (name, private, revision) = HfApi(library_name="scpl_ds"), destination
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
        raise HubError(_told(folder, destination, _reason(error))) from error
    return str(commit)


def _reason(error: Exception) -> str:
    text = one_line(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError):
        return f"{text}; set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{text}; unset HF_HUB_OFFLINE"
    if status in _DENIED or isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub refused ({text}); use a token with write access to that account or "
            "organisation (https://huggingface.co/settings/tokens), or another name"
        )
    if status is not None:
        return f"the hub answered {status} ({text})"
    return f"{constants.ENDPOINT} could not be reached ({type(error).__name__}: {text})"


def _told(folder: Path, destination: Destination, reason: str) -> str:
    name, private, revision = destination
    more = " --private" * bool(private) + (f" --revision {revision}" if revision else "")
    return (
        f"{folder} was not uploaded to {name}: {reason}. The export is whole. To upload it later: "
        f"`hf upload {name} {folder} .{more}`"
    )
