"""A prompt's template: its fields in their order, and what is no template."""

import pytest

from lora_or_full.config.template import DEFAULT, Template, parse


def test_the_default_is_the_documented_text() -> None:
    assert parse(DEFAULT) == Template("Context: ", "\nQuestion: ", "\nAnswer:", " ", True)
    assert parse(DEFAULT).text("C", "Q") == "Context: C\nQuestion: Q\nAnswer:"


def test_a_question_may_come_first_and_spaces_before_the_answer_go_with_it() -> None:
    made = parse("{question}: {context}\n  {answer}")
    assert made == Template("", ": ", "\n", "  ", False)
    assert made.text("C", "Q") == "Q: C\n"
    assert made.before_context("Q") == "Q: "


@pytest.mark.parametrize(
    "text", [DEFAULT, "{{{question}}}\n{context}{{}} {answer}", "{context}{question}{answer}"]
)
def test_a_template_that_is_shown_is_the_same_again(text: str) -> None:
    assert parse(text).shown() == text
    assert parse(parse(text).shown()) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "chat ", "{context} {answer}", "{context} {question}", "{context} {question} {answer}.",
        "{context} {question} {answer} ", "{answer} {question} {context}", "{} {question} {answer}",
        "{context} {question} {context} {answer}", "{context} {question} {answer} {other}",
        "{context!r} {question} {answer}", "{context:9} {question} {answer}", "{context {question}",
        "{context} {question} } {answer}", "{0} {question} {answer}",
        "{context.x}{question}{answer}",
    ],
)  # fmt: skip
def test_other_texts_are_no_template(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # a format's own words are Python's
        parse(text)
