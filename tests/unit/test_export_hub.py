"""Uploads to the hub: what is asked of it, and what is said when it cannot be done.

The network is the one thing that is not real here: ``HfApi`` is replaced by a recorder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

from scpl_ds import export_hub
from scpl_ds.errors import HubError
from scpl_ds.export_hub import _CLIENT, Destination, push, why_not

TOKEN = "hf_" + "x" * 30


class Hub:
    """Records what is asked; fails with ``error`` at ``create_repo``."""

    error: Exception | None = None

    def __init__(self, **options: Any) -> None:
        self.token = options.get("token")
        self.asked: list[tuple[str, Any]] = []
        Hub.last = self

    last: Hub

    def create_repo(self, name: str, **options: Any) -> Any:
        self.asked.append(("repo", (name, options)))
        if self.error is not None:
            raise self.error
        owner = name if "/" in name else f"me/{name}"
        return type("Url", (), {"repo_id": owner})

    def create_branch(self, name: str, **options: Any) -> None:
        self.asked.append(("branch", (name, options)))

    def upload_folder(self, **options: Any) -> str:
        files = {path.name for path in options["folder_path"].iterdir()}
        self.asked.append(("upload", {**options, "files": files}))
        return f"https://huggingface.co/{options['repo_id']}/commit/1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(export_hub, "HfApi", Hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(Hub, "error", None)
    return Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("card")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "export"


def answered(status: int) -> HfHubHTTPError:
    request = _CLIENT.Request("POST", "https://huggingface.co/api/repos/create")
    text = f"{status} Client Error: no"
    return HfHubHTTPError(text, response=_CLIENT.Response(status, request=request))


def wrapped(error: Exception) -> Exception:
    """As huggingface_hub does with what a thread of an upload raised."""
    outer = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    outer.__cause__ = error
    return outer


def test_one_commit_of_the_whole_folder_to_the_branch_that_was_asked_for(hub: Any, folder: Path):
    url = push(folder, Destination("team/model", True, "v2"), message="step 8")
    assert url == "https://huggingface.co/team/model/commit/1"
    (repo, branch, upload) = hub.last.asked
    assert repo == ("repo", ("team/model", {"private": True, "exist_ok": True}))
    assert branch == ("branch", ("team/model", {"branch": "v2", "exist_ok": True}))
    assert upload[1]["files"] == {"README.md", "model.safetensors"}
    assert (upload[1]["revision"], upload[1]["commit_message"]) == ("v2", "step 8")


def test_a_name_without_an_owner_is_under_the_tokens_account(hub: Any, folder: Path):
    assert "/me/model/" in push(folder, Destination("model"), message="")
    assert [what for what, _ in hub.last.asked] == ["repo", "upload"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (answered(401), "use a token with write access"),
        (answered(403), "use a token with write access"),
        (answered(500), "the hub answered 500"),
        (wrapped(answered(500)), "the hub answered 500"),
        (_CLIENT.ConnectError("[Errno 111] Connection refused"), "could not be reached .Connect"),
        (wrapped(_CLIENT.ReadTimeout("timed out")), "did not answer in time .ReadTimeout: timed"),
        (_CLIENT.ProxyError("503 from the proxy"), "could not be reached .ProxyError"),
        (ConnectionError("of hf_xet"), "could not be reached .ConnectionError: of hf_xet"),
        (TimeoutError("of hf_xet"), "did not answer in time .TimeoutError"),
        (OSError(28, "No space left"), "failed on this side .OSError: .Errno 28. No space left"),
        (ValueError(f"illegal header Bearer {TOKEN}"), "on this side .*illegal header Bearer <tok"),
    ],
)
def test_what_goes_wrong_is_named_with_what_to_do_and_the_export_stays(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
):
    monkeypatch.setattr(hub, "error", error)
    with pytest.raises(HubError, match=told) as caught:
        push(folder, Destination("team/model", True, "v2"), message="")
    message = str(caught.value)
    assert f"`hf upload team/model {folder} . --private --revision v2`" in message
    assert TOKEN not in message
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_token_that_is_given_is_the_one_that_is_used(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    push(folder, Destination("team/model"), message="", token="hf_given")
    assert hub.last.token == "hf_given"


def test_offline_mode_and_a_missing_token_are_known_before_anything_is_asked(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    where = Destination("team/model")
    assert why_not(where) is None
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in str(why_not(where))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(why_not(where))
    hub.last = None
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(folder, where, message="")
    assert hub.last is None


def test_what_an_earlier_upload_left_is_removed_and_other_files_are_not(hub: Any, folder: Path):
    push(folder, Destination("team/model"), message="")
    patterns = hub.last.asked[-1][1]["delete_patterns"]
    ours = {"model-00001-of-00002.safetensors", "model.safetensors.index.json",
            "adapter_config.json", "scpl_heads.json"}  # fmt: skip
    others = {"README.md", "config.json", "notes.txt", "plot.png"}
    # As HfApi.upload_folder chooses.
    assert set(filter_repo_objects(ours | others, allow_patterns=patterns)) == ours
