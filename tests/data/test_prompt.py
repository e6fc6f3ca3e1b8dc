"""The prompt is one text, whatever its parts hold; labels and windows fall where they should."""

import copy
import random

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_or_full.data import prompt
from lora_or_full.data.prompt import IGNORED, PromptTokens

END = "<|endoftext|>"
ODD = (
    "plain words",
    "(a) [b] {c}",
    "...and so on...",
    "'s 're 'll",
    "3.14 and 1,204",
    "7",
    "two\nlines",
    "three\n\n\nlines\n \n with gaps",
    "tab\tand\r\nreturn",
    " outer space \n",
    "\n\u00a0\u2003 wide space \u3000\n",
    "\x1cseparators\x1f",
    "double  space",
    "👩‍👩‍👧 family 🇨🇭",
    "🎉",
    "e\u0301 combining n\u0303",
    "\u0301 begins with an accent",
    "zero\u200bwidth\u200b",
    "\ufeffmark",
    "שלום עולם",
    "\u202eمرحبا\u202c ١٢٣",
    "東京駅は",
    f"before {END} after",
    END,
    f"{END}{END}\n",
    "Context: x\nQuestion: y\nAnswer: z",
    "Answer:",
    ":",
    "ı İ ß",
    "\x00 null",
)


def test_parts_joined_are_the_whole_text_tokenized(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    triples = [(odd, odd, odd) for odd in ODD]
    for _ in range(600):
        context, question, answer = (
            "".join(rng.choices([*ODD, " ", "\n"], k=rng.randrange(1, 4))) for _ in range(3)
        )
        triples.append((context, question, answer))
    for context, question, answer in triples:
        texts = [
            prompt.context_text(context),
            prompt.question_text(question),
            prompt.answer_text(answer),
        ]
        parts = prompt.encode(tokenizer, ["Context:", *texts])
        whole = prompt.encode(tokenizer, ["Context:" + "".join(texts)])[0]
        assert [i for part in parts for i in part] == whole, (context, question, answer)
        assert tokenizer.decode(whole) == "Context:" + "".join(texts)


def test_the_text_is_the_documented_one() -> None:
    text = prompt.context_text(" C\n") + prompt.question_text("\tQ ") + prompt.answer_text(" A ")
    assert f"Context:{text}" == "Context: C\nQuestion: Q\nAnswer: A"


def test_end_of_text_written_in_a_text_stays_letters(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in (END, f" {END}", f"a{END}b", f"{END}{END}"):
        ids = prompt.encode(tokenizer, [text])[0]
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]  # else this would prove nothing


def test_encoding_no_text_gives_no_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert prompt.encode(tokenizer, []) == []
    assert prompt.encode(tokenizer, [""]) == [[]]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_text_is_encoded_alone_as_among_others(
    chunk: int, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "CHUNK", chunk)  # so many at once
    assert prompt.encode(tokenizer, ODD) == [prompt.encode(tokenizer, [odd])[0] for odd in ODD]


def with_template(
    tokenizer: PreTrainedTokenizerBase, template: str, bos: str
) -> PreTrainedTokenizerBase:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    tokens = [(name, backend.token_to_id(name)) for name in ("<s>", END)]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=END)


def test_head_begins_with_the_start_token_where_the_tokenizer_adds_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = prompt.encode(tokenizer, ["Context:"])[0]
    assert prompt.prefix_ids(tokenizer) == plain
    starting = with_template(tokenizer, "<s> $A", bos="<s>")
    assert starting("x")["input_ids"][0] == starting.bos_token_id
    assert prompt.prefix_ids(starting) == [starting.bos_token_id, *plain]
    both = with_template(tokenizer, f"<s> $A {END}", bos="<s>")
    assert prompt.prefix_ids(both) == [both.bos_token_id, *plain]
    ending = with_template(tokenizer, f"$A {END}", bos="<s>")
    assert prompt.prefix_ids(ending) == plain
    for special in (starting, both, ending):
        assert prompt.encode(special, [" x", ""]) == prompt.encode(tokenizer, [" x", ""])


def test_head_has_no_start_token_where_the_tokenizer_has_none(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    assert prompt.prefix_ids(without) == prompt.encode(tokenizer, ["Context:"])[0]


def test_prompt_is_head_then_context_then_question() -> None:
    assert PromptTokens([1], [2, 3], [4]).prompt == [1, 2, 3, 4]


def test_masked_labels_are_the_answer_alone() -> None:
    assert prompt.labels([5, 6, 7], [8, 0], mask_prompt=True) == [IGNORED] * 3 + [8, 0]


def test_end_of_text_within_the_prompt_is_masked_and_at_the_end_is_not() -> None:
    # Masking by token id would lose the last label, or keep the one in the prompt.
    assert prompt.labels([0, 6, 0], [8, 0], mask_prompt=True) == [IGNORED] * 3 + [8, 0]


def test_unmasked_labels_are_every_token_but_the_first() -> None:
    assert prompt.labels([5, 6, 7], [8, 0], mask_prompt=False) == [IGNORED, 6, 7, 8, 0]


def test_labels_are_as_many_as_tokens_and_leave_the_prompt_as_it_is() -> None:
    for mask in (True, False):
        before, answer = [5, 6, 7], [8, 0]
        assert len(prompt.labels(before, answer, mask)) == 5
        assert (before, answer) == ([5, 6, 7], [8, 0])


def test_window_keeps_the_whole_context_that_fits() -> None:
    assert prompt.window(5, 5) == slice(0, 5)
    assert prompt.window(5, 9, gold=(3, 5)) == slice(0, 5)


def test_window_takes_the_first_tokens_where_no_gold_is_known() -> None:
    for room in range(8):
        assert prompt.window(8, room) == slice(0, room)


def test_window_fills_the_room_and_keeps_the_gold_that_fits() -> None:
    for length in range(1, 25):
        for room in range(1, length):
            for first in range(length):
                for last in range(first + 1, length + 1):
                    kept = prompt.window(length, room, (first, last))
                    assert kept.start >= 0
                    assert kept.stop <= length
                    assert kept.stop - kept.start == room
                    if last - first <= room:
                        assert kept.start <= first
                        assert last <= kept.stop
                    else:  # the gold itself is cut: nothing but gold is left
                        assert first <= kept.start
                        assert kept.stop <= last
                    if last <= room:
                        assert kept.start == 0


@pytest.mark.parametrize("gold", [None, (0, 1), (9, 10)])
def test_window_without_room_is_empty(gold: tuple[int, int] | None) -> None:
    kept = prompt.window(10, 0, gold)
    assert kept.stop - kept.start == 0
