"""The drawing in the documents shows the mask that the code makes."""

from pathlib import Path

import draw_mask
import pytest

from lora_or_full.modeling import prefix_packing

DRAWING = Path(__file__).parents[2] / "docs" / "packing_mask.svg"


@pytest.mark.parametrize("multiple", [1, 16])
def test_the_script_draws_what_is_committed_on_any_processor(
    multiple: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_packing, "PAD_MULTIPLE", multiple)
    file = tmp_path / "mask.svg"
    monkeypatch.setattr("sys.argv", ["draw_mask.py", "--output", str(file)])
    draw_mask.main()
    assert file.read_text(encoding="utf-8") == DRAWING.read_text(encoding="utf-8")
