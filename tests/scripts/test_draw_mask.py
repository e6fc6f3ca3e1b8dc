"""The drawing in the documents is of the mask that the code makes now."""

from pathlib import Path

import draw_mask
import pytest

DRAWING = Path(__file__).parents[2] / "docs" / "packing_mask.svg"


def test_the_script_draws_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mask.svg"
    monkeypatch.setattr("sys.argv", ["draw_mask.py", "--output", str(file)])
    draw_mask.main()
    assert file.read_text(encoding="utf-8") == DRAWING.read_text(encoding="utf-8")
