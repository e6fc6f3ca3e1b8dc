"""The prompt is one text, whatever its parts hold; labels and windows fall where they should."""

import copy
import random

import pytest
from tokenizer_types import TYPES
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_or_full.config.template import CHAT_TURN
from lora_or_full.data import prompt
from lora_or_full.data.prompt import IGNORED, Prompt, PromptTokens
from lora_or_full.errors import UserError

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


@pytest.fixture(scope="module", params=TYPES)
def typed(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """A tokenizer of each type."""
    return TYPES[request.param]()


def triples(count: int) -> list[tuple[str, str, str]]:
    """Contexts, questions and answers of odd texts, white space stripped."""
    rng = random.Random(0)
    mixed = (
        tuple("".join(rng.choices([*ODD, " ", "\n"], k=rng.randrange(1, 4))) for _ in range(3))
        for _ in range(count)
    )
    plain = ("In 1200, Ada built the mill of Oslo.", "Who built it?", "Ada")
    same = ((odd, odd, odd) for odd in ODD)
    return [plain, *((c.strip(), q.strip(), " ".join(a.split())) for c, q, a in (*same, *mixed))]


def test_a_prompt_has_the_tokens_of_its_whole_text_and_its_answer_continues_them(
    typed: PreTrainedTokenizerBase,
) -> None:
    made, given = Prompt(typed), triples(200)
    found = made.tokens([(context, question) for context, question, _ in given])
    answers = made.answers([answer for *_, answer in given])
    for (context, question, answer), parts, said in zip(given, found, answers, strict=True):
        text = f"Context: {context}\nQuestion: {question}\nAnswer:"
        assert made.text(context, question) == text
        assert parts.prompt == typed(text, split_special_tokens=True)["input_ids"]
        whole = typed(f"{text} {answer}", split_special_tokens=True)["input_ids"]
        assert parts.prompt + said == [*whole, typed.eos_token_id]


def test_white_space_within_an_answer_becomes_one_space(typed: PreTrainedTokenizerBase) -> None:
    broken, plain = Prompt(typed).answers(["Ada\n  Byron", "Ada Byron"])
    assert broken == plain


def test_questions_share_the_tokens_of_their_context(typed: PreTrainedTokenizerBase) -> None:
    made = Prompt(typed)
    for context, question, other in triples(100):
        one, two = made.tokens([(context, question), (context, other)])
        assert (one.prefix, one.context) == (two.prefix, two.context)
        for (start, stop), token in zip(
            made.context_offsets(context, question), one.context, strict=True
        ):
            piece = typed.decode([token]).strip()
            if "�" not in piece and piece in context:  # one character may be several tokens
                assert -1 <= start < stop <= len(context)


def test_a_sign_that_is_joined_to_the_line_end_behind_the_context_stays_with_it() -> None:
    llama3 = TYPES["llama3"]()
    [parts] = Prompt(llama3).tokens([("Ada built the mill.", "Who?")])
    texts = [llama3.decode(part) for part in parts]
    assert texts == ["<s>Context:", " Ada built the mill", ".\nQuestion: Who?\nAnswer:"]


def test_tokens_of_gpt2_are_those_of_its_parts(tokenizer: PreTrainedTokenizerBase) -> None:
    for context, question, answer in triples(300):
        texts = ["Context:", f" {context}", f"\nQuestion: {question}\nAnswer:", f" {answer}"]
        *parts, said = prompt.encode(tokenizer, texts)
        made = Prompt(tokenizer)
        assert list(made.tokens([(context, question)])) == [PromptTokens(*parts)]
        assert made.answers([answer]) == [[*said, tokenizer.eos_token_id]]


def test_the_text_is_the_documented_one(tokenizer: PreTrainedTokenizerBase) -> None:
    made = Prompt(tokenizer)
    assert made.text(" C\n", "\tQ ") == "Context: C\nQuestion: Q\nAnswer:"
    assert tokenizer.decode(made.answers([" A "])[0]) == f" A{END}"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}{}{% endif %}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def of_chats(kind: str, template: str) -> PreTrainedTokenizerBase:
    made = TYPES[kind]()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("kind", "template", "end", "lead"),
    [("qwen2", CHATML, "<|im_end|>", ""), ("llama2", INST, END, " ")],
)
def test_a_chat_has_the_tokens_of_the_tokenizers_own_template(
    kind: str, template: str, end: str, lead: str
) -> None:
    chats = of_chats(kind, template)
    made = Prompt(chats, "chat")
    context, question = "In 1200, Ada built the mill.", "Who built it?"
    turn = {"role": "user", "content": CHAT_TURN.format(context=context, question=question)}
    [parts] = made.tokens([(context, question)])
    assert parts.prompt == chats.apply_chat_template(
        [turn], add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert parts.context
    assert made.template.context_first
    assert made.template.lead == lead
    [answer] = made.answers(["Ada"])
    assert chats.decode(answer).strip() == f"Ada{end}"
    assert answer[-1] == made.end == chats.convert_tokens_to_ids(end)
    # The template as it is recorded gives the same.
    again = Prompt(chats, made.template.shown())
    assert list(again.tokens([(context, question)])) == [parts]


@pytest.mark.parametrize("template", [None, "{{ raise_exception('alternate roles') }}", "nothing"])
def test_a_tokenizer_without_a_chat_template_that_fits_is_refused(template: str | None) -> None:
    chats = TYPES["qwen2"]()
    chats.chat_template = template
    with pytest.raises(UserError, match=r"^prompt=chat: .*chat template[^\n]*$"):
        Prompt(chats, "chat")


def test_a_context_behind_the_question_is_found_too(typed: PreTrainedTokenizerBase) -> None:
    made = Prompt(typed, "Q: {question}\nText: {context}\nA:\n{answer}")
    [parts] = made.tokens([("In 1200, Ada built the mill.", "Who built it?")])
    text = "Q: Who built it?\nText: In 1200, Ada built the mill.\nA:\n"
    assert parts.prompt == typed(text)["input_ids"]
    assert "Ada built the" in typed.decode(parts.context)
    assert "it" not in typed.decode(parts.context)
    assert typed.decode(made.answers(["Ada"])[0]).strip() == f"Ada{END}"


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


def test_a_prompt_begins_as_the_tokenizer_begins_every_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    [plain] = Prompt(tokenizer).tokens([("x", "y")])
    starting = with_template(tokenizer, "<s> $A", bos="<s>")
    assert starting("x")["input_ids"][0] == starting.bos_token_id
    both = with_template(tokenizer, f"<s> $A {END}", bos="<s>")
    ending = with_template(tokenizer, f"$A {END}", bos="<s>")
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    for special, start in (
        (starting, [starting.bos_token_id]),
        (both, [both.bos_token_id]),
        (ending, []),
        (without, []),
    ):
        [parts] = Prompt(special).tokens([("x", "y")])
        assert parts == plain._replace(prefix=start + plain.prefix)
        assert prompt.encode(special, [" x", ""]) == prompt.encode(tokenizer, [" x", ""])


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
