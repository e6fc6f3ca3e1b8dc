"""Writing a record: whole or not at all."""

import json
from pathlib import Path

import pytest

from study import record


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    record.write_json(file, {"f1": 1.0})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        record.write_json(file, {"f1": 2.0})
    assert json.loads(file.read_text()) == {"f1": 1.0}


def test_what_is_not_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        record.write_json(tmp_path / "results.json", {"folder": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_lines_keep_unicode_and_order(tmp_path: Path) -> None:
    rows = [{"id": "2", "text": "Łódź – €5"}, {"id": "1", "text": "\u2028"}]
    record.write_lines(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert "Łódź" in lines[0]


def test_half_a_character_is_written_as_json_spells_it(tmp_path: Path) -> None:
    record.write_json(tmp_path / "results.json", {"path": "a\udcff é"})
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == {"path": "a\udcff é"}


def test_the_environment_names_versions_and_device() -> None:
    facts = record.environment("cpu", "abc")
    assert (facts["device"], facts["commit"]) == ("cpu", "abc")
    assert set(facts["packages"]) == set(record.PACKAGES)
