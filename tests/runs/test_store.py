"""Records are written atomically and checked; a commit is this checkout's only."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from lora_or_full.runs import provenance, store


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    store.write_json(file, {"f1": 1.0})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        store.write_json(file, {"f1": 2.0})
    assert json.loads(file.read_text()) == {"f1": 1.0}


def test_what_is_not_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        store.write_json(tmp_path / "results.json", {"folder": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_lines_keep_unicode_and_order(tmp_path: Path) -> None:
    rows = [{"id": "2", "text": "Łódź – €5"}, {"id": "1", "text": "\u2028"}]
    store.write_lines(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert "Łódź" in lines[0]


def test_a_lone_surrogate_is_written_as_jsons_escape(tmp_path: Path) -> None:
    store.write_json(tmp_path / "results.json", {"path": "a\udcff é"})
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == {"path": "a\udcff é"}


def test_the_environment_names_versions_and_device() -> None:
    facts = provenance.environment("cpu", "abc")
    assert (facts["device"], facts["commit"]) == ("cpu", "abc")
    assert set(facts["packages"]) == set(provenance.PACKAGES)


def test_the_commit_is_that_of_this_checkout_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    git("init", f"--separate-git-dir={tmp_path / 'elsewhere'}", "checkout")
    checkout = tmp_path / "checkout"
    (checkout / "file").write_text("1")
    for words in (["add", "file"], ["commit", "-m", "x"]):
        git("-C", "checkout", *words)
    monkeypatch.setattr(provenance, "PROJECT", checkout)
    commit = provenance.commit()
    assert commit
    assert re.fullmatch("[0-9a-f]{40}", commit)
    before = provenance.code()
    (checkout / "file").write_text("2")
    assert provenance.commit() == f"{commit}+changes"
    assert provenance.code() != before
    installed = checkout / "venv" / "lib"  # as of a wheel in another project's environment
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "PROJECT", installed)
    assert provenance.commit() is provenance.code() is None


def test_a_failed_write_names_its_file_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space") as raised:
        store.write_json(tmp_path / "new" / "results.json", {})
    assert raised.value.filename == str(tmp_path / "new" / "results.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / f"last.ckpt.1{store.PARTIAL}"
    half.parent.mkdir()
    half.touch()
    (tmp_path / "predictions.partial.jsonl").touch()
    store.remove_partial_files(tmp_path)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["predictions.partial.jsonl"]


def test_checksums_find_damaged_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    files = {name: tmp_path / name for name in ("a", "b", "model/c d")}
    for name, file in files.items():
        file.write_text(name)
    assert not store.is_intact(tmp_path)
    assert store.damaged_files(tmp_path) == []
    store.write_checksums(tmp_path, files)
    assert store.is_intact(tmp_path)
    checked = subprocess.run(
        ["sha256sum", "-c", store.CHECKSUMS], cwd=tmp_path, capture_output=True
    )
    assert checked.returncode == 0
    files["a"].write_text("A")
    files["model/c d"].unlink()
    assert store.damaged_files(tmp_path) == ["a", "model/c d"]
    assert store.damaged_files(tmp_path, among=("a", "b")) == ["a"]
    assert not store.is_intact(tmp_path)


@pytest.mark.parametrize("text", ["", "cut off", f"{'0' * 64}  a\n{'0' * 60}", "\x00\n"])
def test_damaged_checksums_are_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / store.CHECKSUMS).write_text(text)
    assert store.damaged_files(tmp_path) == [store.CHECKSUMS]


def test_a_run_is_finished_if_its_results_and_files_are_intact(tmp_path: Path) -> None:
    answers = tmp_path / "predictions.jsonl"
    answers.write_text("{}\n")
    assert not store.is_finished(tmp_path)
    store.write_results(tmp_path, {"f1": 1.0}, [answers])
    assert store.is_finished(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == {"f1": 1.0}
    answers.write_text("{ }\n")
    assert not store.is_finished(tmp_path)
    assert store.damaged_files(tmp_path) == ["predictions.jsonl"]
