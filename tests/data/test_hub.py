"""From a name to a folder, without a network."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_or_full.data import hub
from lora_or_full.errors import UserError


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda: True)


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert hub.folder_of(str(tmp_path), "model", tmp_path / "cache") == tmp_path


def test_a_whole_download_is_not_asked_for_again(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"]))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    for _ in range(2):
        assert hub.folder_of("gpt2", "model", tmp_path / "cache") == tmp_path / "snapshot"
    assert asked == [("gpt2", "model")] * 2  # its configuration, its weights
    hub.folder_of("gpt2", "dataset", tmp_path / "cache")
    assert asked[2:] == [("gpt2", "dataset")]


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (None, ["*.safetensors"]),
        ("{", ["*.safetensors"]),
        (
            '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors",'
            ' "c": "model-1.safetensors"}}',
            ["model-1.safetensors", "model-2.safetensors"],
        ),
    ],
)
def test_of_a_models_weights_only_the_files_of_its_index_are_fetched(
    index: str | None, expected: list[str], online: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fetched: list[list[str]] = []

    def download(name: str, **options: Any) -> str:
        fetched.append(options["allow_patterns"])
        assert options["ignore_patterns"] == ["*/*"]
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        if index is not None:
            (tmp_path / "snapshot" / hub.INDEX).write_text(index)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub.folder_of("large", "model", tmp_path / "cache")
    first, second = fetched
    assert not any("safetensors" in pattern for pattern in first)
    assert second == expected


@pytest.mark.parametrize("text", ["", "{", "[]", '{"folder": 3}', '{"folder": "nowhere"}'])
def test_a_damaged_note_of_a_download_is_made_anew(
    text: str, online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(tmp_path))
    hub.folder_of("gpt2", "model", tmp_path / "cache")
    [note] = (tmp_path / "cache" / "hub").iterdir()
    whole = note.read_text()
    note.write_text(text)
    assert hub.folder_of("gpt2", "model", tmp_path / "cache") == tmp_path
    assert note.read_text() == whole


def test_an_interrupted_download_is_asked_for_again(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append(name)
        if len(calls) == 1:
            raise OSError("connection reset")
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match="could not be fetched.*connection reset"):
        hub.folder_of("gpt2", "model", tmp_path / "cache")
    assert hub.folder_of("gpt2", "model", tmp_path / "cache") == tmp_path / "snapshot"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, r"model\.name=gtp2: neither a local folder nor a model on"),
        (GatedRepoError, r"model\.name=gtp2 asks for consent: accept its terms"),
    ],
)
def test_a_name_that_is_unknown_or_needs_consent_is_refused(
    error: type[Exception], message: str, online: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def download(name: str, **options: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match=message):
        hub.folder_of("gtp2", "model", tmp_path)


def test_offline_the_hubs_own_cache_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)

    def cached(name: str, local_files_only: bool = False, **options: Any) -> str:
        assert local_files_only
        if name == "gpt2":
            return str(tmp_path)
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(hub, "snapshot_download", cached)
    assert hub.folder_of("gpt2", "model", tmp_path / "cache") == tmp_path
    with pytest.raises(UserError, match=r"data\.path=squad.*local files in SQuAD's format.*demo"):
        hub.folder_of("squad", "dataset", tmp_path / "cache")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c"])
def test_what_can_only_be_a_path_never_asks_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        hub.folder_of(name, "model", tmp_path)
