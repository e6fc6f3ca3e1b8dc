"""Spans of an answer in its context."""

import pytest

from lora_or_full.evaluation.spans import spans


@pytest.mark.parametrize(
    ("text", "context", "expected"),
    [
        ("10", "In 1910 there were 10 of them, then 10.", ["10", "10"]),
        ("10", "In 1910 there were many.", []),
        ("the Mill", "THE  MILL and the\nmill", ["THE  MILL", "the\nmill"]),
        ("Mill", "the mill of Mill", ["Mill"]),
        ("", "anything", []),
        (" ", "anything", []),
        ("(a+b)", "so (a+b) it is", ["(a+b)"]),
        ("東京", "首都は東京です。", ["東京"]),
        ("القاهرة", "تقع في والقاهرة الكبرى", ["القاهرة"]),
        ("Łódź", "from Łódź.", ["Łódź"]),
        ("Ada", "Adam and Ada-Marie", ["Ada"]),
    ],
)
def test_spans(text: str, context: str, expected: list[str]) -> None:
    assert [context[start:stop] for start, stop in spans(text, context)] == expected
