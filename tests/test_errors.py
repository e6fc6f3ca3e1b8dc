"""What a person reads can't be steered by what data holds."""

import errors
from errors import UserError, first_line, listed


def test_a_message_keeps_its_lines_and_spells_out_what_is_not_printed() -> None:
    message = str(UserError("one\ntwo \x1b[31m\u202e\ud800\x00 é 東京"))
    assert message == "one\ntwo \\x1b[31m\\u202e\\ud800\\x00 é 東京"
    message.encode()


def test_the_first_line_is_one_that_says_something() -> None:
    assert first_line(ValueError("\n \n what\nmore")) == " what"
    assert first_line(ValueError()) == first_line(ValueError("\n")) == "ValueError"


def test_of_many_or_long_names_a_few_are_listed() -> None:
    assert listed(["a", 3, "b\n"]) == r"a, 3, 'b\n'"
    assert listed(map(str, range(30))).endswith(f"19 and {30 - errors.MOST} more")
    assert len(listed(["x" * 10**6])) == errors.LONGEST + len("...")
