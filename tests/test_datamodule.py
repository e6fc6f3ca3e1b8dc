"""Rows keep what they must, labels are the answers' alone, and a second setup reads the cache."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from layouts import labels_of
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodule import SquadDataModule
from lora_or_full.config import compose
from lora_or_full.config.schema import validate
from lora_or_full.data import prompt, tokenized
from lora_or_full.data.prompt import IGNORED
from lora_or_full.data.splits import NAMES, Splits
from lora_or_full.errors import UserError
from lora_or_full.modeling.packed_rows import PackedRows, Sequences
from lora_or_full.modeling.prefix_packing import Packed, Padded

ENDING = "<|endoftext|>"
Make = Callable[..., SquadDataModule]


@pytest.fixture
def make(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, squad_file: Callable[..., Path]
) -> Make:
    """`make(**changes)`, over two files: 18 questions to train on, 6 to validate, 16 to test."""
    files = [
        squad_file(tmp_path / "train.json", articles=4, seed=1),
        squad_file(tmp_path / "test.json", articles=2, questions=4, seed=2),
    ]

    def made(
        tokenizer: PreTrainedTokenizerBase = tokenizer,
        positions: int = 512,
        packed_length: int | None = None,
        max_prompt_length: int = 400,
        micro_batches: int = 1,
        data: dict[str, Any] | None = None,
        **changes: Any,
    ) -> SquadDataModule:
        values = compose.compose()
        values["data"] |= {
            "path": str(files[0]), "test_path": str(files[1]), "train_size": None,
            "validation_size": None, "validation_articles": 0.25,
        } | (data or {})  # fmt: skip
        values["trainer"]["accumulate_grad_batches"] = micro_batches
        own = {"seed": 0, "eval_batch_size": 5, "max_length": 400, "cache_dir": str(tmp_path / "c")}
        made = SquadDataModule(validate(values | own | changes), tokenizer, positions)
        made.packed_length = packed_length
        made.max_prompt_length = max_prompt_length
        return made

    return made


def _ready(module: SquadDataModule) -> SquadDataModule:
    module.setup()
    return module


def _forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Splits) -> None:
        raise AssertionError("the files were read again")

    monkeypatch.setattr(Splits, "read", read)


def _answers(module: SquadDataModule, sequences: Sequences | None) -> list[str]:
    """The texts of the labels, a text for each row that has some."""
    assert sequences is not None
    assert not isinstance(sequences, PackedRows)
    labels = labels_of(sequences)
    if isinstance(sequences, Packed):
        labels, rows = labels[0], sequences.block_of * 1000 + sequences.segment_of
        labels = torch.stack(
            [labels.masked_fill(rows != row, IGNORED) for row in rows.unique_consecutive()]
        )
    texts = [[label for label in row if label != IGNORED] for row in labels.tolist()]
    return [module.tokenizer.decode(ids) for ids in texts if ids]


def _write(path: Path, paragraphs: list[tuple[str, str, str]]) -> str:
    """A file of one question for each (context, question, answer), each in an article of its own;
    the answer is taken where it stands last."""
    data = [
        {
            "title": f"Article {number}",
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {
                            "id": f"{path.stem}-{number}",
                            "question": question,
                            "answers": [{"text": answer, "answer_start": context.rindex(answer)}],
                        }
                    ],
                }
            ],
        }
        for number, (context, question, answer) in enumerate(paragraphs)
    ]
    path.write_text(json.dumps({"data": data}, ensure_ascii=False), "utf-8")
    return str(path)


def _by_id(module: SquadDataModule, name: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in getattr(module, name)}


def _ids(module: SquadDataModule, row: dict[str, Any]) -> list[int]:
    """The tokens of a row: prompt and answer."""
    return tokenized.prompt_of(row).prompt + row["answer_ids"]


# TokenizedQuestions and labels


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_training_labels_end_with_the_answer_and_end_of_text(make: Make, mask_prompt: bool) -> None:
    module = _ready(make(mask_prompt=mask_prompt))
    rows = list(module.train)
    sequences = module.collate_training(rows, 1)["sequences"]
    labels_of_rows = labels_of(sequences).tolist()
    for row, ids, labels, said in zip(
        rows, sequences.input_ids.tolist(), labels_of_rows, _answers(module, sequences), strict=True
    ):
        answer = f" {row['answers'][0]}{ENDING}"
        if mask_prompt:
            assert said == answer
        else:
            text = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer:{answer}"
            first = module.tokenizer.decode(ids[:1])
            assert labels[0] == IGNORED
            assert first + said == text
        assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
        assert [label for label in labels if label != IGNORED][-1] == module.tokenizer.eos_token_id


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_golds_of_evaluation_are_the_answers_alone_even_when_training_labels_are_not(
    mask_prompt: bool, make: Make
) -> None:
    module = _ready(make(mask_prompt=mask_prompt))
    for loader in (module.val_dataloader(), module.test_dataloader()):
        for batch in loader:
            expected = [f" {row['answers'][0]}{ENDING}" for row in batch.rows]
            assert [module.tokenizer.decode(gold) for gold in batch.references] == expected


@pytest.mark.parametrize("packed_length", [1, 200, 1000])
def test_training_shares_contexts_where_the_answers_alone_are_labelled(
    packed_length: int, make: Make
) -> None:
    plain = _ready(make())
    rows = list(plain.train)
    expected = plain.collate_training(rows, 9)
    assert isinstance(expected["sequences"], Padded)
    module = _ready(make(packed_length=packed_length))
    batch = module.collate_training(rows, 9)
    assert isinstance(batch["sequences"], Packed)
    answers = _answers(plain, expected["sequences"])
    assert sorted(_answers(module, batch["sequences"])) == sorted(answers)
    for name in ("step_labels", "samples", "tokens"):  # as if nothing were shared
        assert batch[name] == expected[name]
    # Where the prompt is labelled, a shared context would count once: it is not shared.
    unmasked = _ready(make(packed_length=packed_length, mask_prompt=False))
    assert isinstance(unmasked.collate_training(rows, 9)["sequences"], Padded)


def test_a_prompt_is_the_documented_text_and_stops_before_the_answer(make: Make) -> None:
    module = _ready(make())
    for batch in module.test_dataloader():
        for row, part in zip(batch.rows, batch.prompts, strict=True):
            text = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer:"
            assert module.tokenizer.decode(part.prompt) == text


@pytest.mark.parametrize("packed_length", [None, 1000])
def test_all_that_is_trained_on_goes_to_the_device(packed_length: int | None, make: Make) -> None:
    module = _ready(make(packed_length=packed_length))
    training = module.collate_training([module.train[0], module.train[1]], 1)
    meta = torch.device("meta")
    sequences = module.transfer_batch_to_device(training, meta, 0)["sequences"]
    tensors = [value for value in sequences if isinstance(value, torch.Tensor)]
    inputs = dict(sequences.model_inputs())
    tensors += [block.mask for block in inputs.pop("blocks", [])]
    assert {tensor.device for tensor in [*tensors, *inputs.values()]} == {meta}
    assert len(tensors) >= 2


def test_padding_is_on_the_right_and_carries_no_label(make: Make) -> None:
    module = _ready(make())
    rows = sorted(module.train, key=lambda row: len(row["context_ids"]))
    rows = [rows[0], rows[-1]]
    batch = module.collate_training(rows, 7)
    ids, labels = batch["sequences"].input_ids, labels_of(batch["sequences"])
    lengths = [
        sum(len(row[f"{part}_ids"]) for part in ("prefix", "context", "question", "answer"))
        for row in rows
    ]
    assert lengths[0] < lengths[1]
    assert ids.shape == labels.shape == (2, lengths[1])
    assert labels[0, lengths[0] - 1] == module.tokenizer.eos_token_id
    assert (labels[0, lengths[0] :] == IGNORED).all()
    assert batch["step_labels"] == 7
    assert batch["samples"] == 2
    assert batch["tokens"] == sum(lengths)


def test_rows_of_one_context_share_a_paragraph_number(make: Make) -> None:
    module = _ready(make())
    for name in NAMES:
        rows = list(getattr(module, name))
        pairs = {(row["paragraph"], row["context"]) for row in rows}
        assert len(pairs) == len({number for number, _ in pairs}) == len({c for _, c in pairs})
        assert module.facts[name]["paragraphs"] == len(pairs) < len(rows)
        assert module.facts[name]["questions"] == len(rows)
        assert module.facts[name]["articles"] == len({row["title"] for row in rows})


# Truncation


def test_truncation_touches_neither_question_nor_answer_nor_end_of_text(make: Make) -> None:
    whole = _by_id(_ready(make()), "train")
    module = _ready(make(max_length=110))
    cut = _by_id(module, "train")
    assert cut.keys() == whole.keys()
    lengths = []
    for name, row in cut.items():
        for part in ("question_ids", "answer_ids", "question", "answers", "context"):
            assert row[part] == whole[name][part]
        length = len(_ids(module, row))
        assert length <= 110
        if row["context_cut"]:
            lengths.append(length)
        else:
            assert row["context_ids"] == whole[name]["context_ids"]
    assert max(lengths) == 110  # all the room is used by one of those that share a window
    assert 0 < len(lengths) < len(cut)
    assert module.facts["train"]["truncated"] == len(lengths)
    assert module.facts["validation"]["truncated"] == 0  # max_prompt_length is another setting
    sequences = module.collate_training(list(cut.values()), 1)["sequences"]
    assert _answers(module, sequences) == [f" {row['answers'][0]}{ENDING}" for row in cut.values()]


FILLING = "Much was said of the sea, of ships and of sails, and 77 men sang. "
# Of two questions about one paragraph, one for training and one for validation.
HALVES = {"split_by": "question", "validation_articles": 0.5}


@pytest.mark.parametrize("before", [0, 1, 3, 12])
@pytest.mark.parametrize("answer", ["Quetzalcoatl", "\u202eשלום 🙂 e\u0301", "1 234 567 (or so)"])
def test_the_gold_of_a_long_context_survives_in_training_and_evaluation_does_not_look_for_it(
    before: int, answer: str, make: Make, tmp_path: Path
) -> None:
    context = f"  \n{FILLING * before}It was {answer} who came. {FILLING * (12 - before)}\n"
    path = _write(tmp_path / "long.json", [(context, "Who came?", answer)] * 2)
    test_path = _write(tmp_path / "other.json", [(context, "Who was it?", answer)])
    splits = {"path": path, "test_path": test_path, **HALVES}
    module = _ready(make(data=splits, max_length=130, max_prompt_length=130))
    [row] = module.train
    assert row["context_cut"]
    kept = module.tokenizer.decode(row["context_ids"])
    assert f" {answer}" in kept
    whole = prompt.encode(module.tokenizer, [f" {context.strip()}"])[0]
    for name in ("validation", "test"):
        [row] = getattr(module, name)
        assert row["context_cut"]
        assert len(tokenized.prompt_of(row).prompt) == 130
        assert row["context_ids"] == whole[: len(row["context_ids"])]
        if before == 12:
            assert answer not in module.tokenizer.decode(row["context_ids"])


def test_the_marked_gold_survives_not_another_place_of_its_text(make: Make, tmp_path: Path) -> None:
    context = f"Ada was not there. {FILLING * 12}But the mill was built by Ada herself."
    path = _write(tmp_path / "twice.json", [(context, "By whom?", "Ada")] * 2)
    module = _ready(make(data={"path": path, **HALVES}, max_length=130))
    [row] = module.train
    assert "built by Ada" in module.tokenizer.decode(row["context_ids"])


def test_a_gold_that_stands_nowhere_leaves_the_beginning_of_the_context(
    make: Make, tmp_path: Path
) -> None:
    path = Path(_write(tmp_path / "nowhere.json", [(FILLING * 12 + "Ada", "Who?", "Ada")] * 2))
    path.write_text(path.read_text("utf-8").replace('"text": "Ada"', '"text": "Bruno"'), "utf-8")
    splits = {"path": str(path), **HALVES, "misaligned": "repair"}
    module = _ready(make(data=splits, max_length=130))
    [row] = module.train
    whole = prompt.encode(module.tokenizer, [f" {FILLING * 12}Ada"])[0]
    assert row["context_ids"] == whole[: len(row["context_ids"])]
    assert module.facts["train"]["in_all_files"]["answers_not_in_context"] == 2


def test_a_training_row_without_room_for_context_is_dropped_and_counted(
    make: Make, tmp_path: Path
) -> None:
    long = "And who, of all that sang, was it that came to the mill? " * 10
    rows = [("It was Ada who came.", question, "Ada") for question in ("Who?", long)] * 4
    path = _write(tmp_path / "some.json", rows)
    module = _ready(
        make(data={"path": path, **HALVES, "validation_articles": 0.25}, max_length=100)
    )
    assert {row["question"] for row in module.train} == {"Who?"}
    facts = module.facts["train"]
    assert facts["dropped"] > 0
    assert facts["questions"] + facts["dropped"] == 6
    assert facts["questions"] == len(module.train) == len(module.train_dataloader().sampler.labels)
    assert module.facts["validation"]["dropped"] == 0


def test_a_row_is_dropped_only_where_not_one_token_of_its_context_fits(make: Make) -> None:
    whole = _ready(make())
    row = max(whole.train, key=lambda row: len(row["question_ids"]) + len(row["answer_ids"]))
    least = len(row["prefix_ids"]) + len(row["question_ids"]) + len(row["answer_ids"])
    assert len(_by_id(_ready(make(max_length=least + 1)), "train")[row["id"]]["context_ids"]) == 1
    tight = _ready(make(max_length=least))
    assert row["id"] not in _by_id(tight, "train")
    assert tight.facts["train"]["dropped"] == len(whole.train) - len(tight.train) > 0


def test_training_rows_that_all_are_too_long_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match="No question of the train split fits into max_length=10"):
        make(max_length=10).setup()


@pytest.mark.parametrize("packed_length", [None, 200])
@pytest.mark.parametrize("kind", ["some fit", "all fit"])
def test_evaluation_rows_are_never_dropped_and_too_long_prompts_are_none(
    kind: str, packed_length: int | None, make: Make
) -> None:
    roomy = _ready(make())
    whole = _by_id(roomy, "test")
    needed = sorted(len(row["prefix_ids"]) + len(row["question_ids"]) for row in whole.values())
    length = {"some fit": needed[8], "all fit": needed[-1]}[kind]
    module = _ready(make(max_prompt_length=length, packed_length=packed_length))
    assert _by_id(module, "test").keys() == whole.keys()
    assert module.facts["test"]["dropped"] == 0
    seen, too_long = [], 0
    for batch in module.test_dataloader():
        assert len(batch.prompts) == len(batch.rows)
        asked = []
        for row, part in zip(batch.rows, batch.prompts, strict=True):
            seen.append(row["id"])
            least = len(row["prefix_ids"]) + len(row["question_ids"])
            assert (part is None) == (least > length)
            if part is None:
                too_long += 1
                assert row["context_ids"] == []
            else:
                assert len(part.prompt) <= length
                assert part.question == whole[row["id"]]["question_ids"]
                asked.append(f" {row['answers'][0]}{ENDING}")
        assert [module.tokenizer.decode(gold) for gold in batch.references if gold] == asked
    assert sorted(seen) == sorted(whole)
    assert too_long == sum(least > length for least in needed)
    assert too_long in {"some fit": range(1, 8), "all fit": [0]}[kind]


def test_validation_rows_that_all_are_too_long_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match="No validation question fits into max_length"):
        make(max_prompt_length=1).setup()


# Loaders


def test_evaluation_keeps_paragraphs_together_the_longest_first_and_holds_each_row_once(
    make: Make,
) -> None:
    module = _ready(make())
    for loader, table in (
        (module.val_dataloader(), module.validation),
        (module.test_dataloader(), module.test),
    ):
        batches = list(loader)
        assert [len(batch.rows) for batch in batches[:-1]] == [5] * (len(batches) - 1)
        rows = [row for batch in batches for row in batch.rows]
        assert sorted(row["id"] for row in rows) == sorted(table.column("id"))
        paragraphs = [list(group) for _, group in groupby(rows, lambda row: row["paragraph"])]
        assert len(paragraphs) == len(set(table.column("paragraph"))) > 1
        longest = [max(row["prompt_tokens"] for row in group) for group in paragraphs]
        assert longest == sorted(longest, reverse=True)
        assert longest[0] > longest[-1]


def test_skipped_test_batches_are_the_first(make: Make) -> None:
    module = _ready(make())

    def ids(skip: int) -> list[list[str]]:
        return [[row["id"] for row in batch.rows] for batch in module.test_dataloader(skip)]

    assert len(ids(0)) == 4
    for skip in range(6):
        assert ids(skip) == ids(0)[skip:]


@pytest.mark.parametrize("skip", [0, 1, 4])
@pytest.mark.parametrize("devices", [2, 3, 5])
def test_devices_share_the_batches_that_one_has(devices: int, skip: int, make: Make) -> None:
    module = _ready(make())

    def ids(device: int, devices: int) -> list[list[str]]:
        module.deal(devices, device)
        return [[row["id"] for row in batch.rows] for batch in module.test_dataloader(skip)]

    whole = ids(0, 1)
    shares = [ids(device, devices) for device in range(devices)]
    assert {len(own) for own in shares} == {-(-len(whole) // devices)}  # they answer in step
    assert [batch for step in zip(*shares, strict=True) for batch in step if batch] == whole


@pytest.mark.parametrize(
    ("mask_prompt", "packed_length"), [(True, None), (True, 300), (False, None), (False, 300)]
)
@pytest.mark.parametrize("draw_by", ["question", "paragraph"])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_an_epoch_holds_each_row_once_and_each_step_counts_its_labels(
    parts: int, draw_by: str, mask_prompt: bool, packed_length: int | None, make: Make
) -> None:
    module = _ready(make(
        micro_batches=parts, mask_prompt=mask_prompt, packed_length=packed_length,
        data={"draw_by": draw_by},
    ))  # fmt: skip
    batches = list(module.train_dataloader())
    assert len(module.train) == 18
    assert module.steps == 5  # four of 4 rows, the last of 2
    assert len(batches) == module.steps * parts
    assert sum(batch["samples"] for batch in batches) == 18
    for step in range(module.steps):
        dealt = batches[step * parts : (step + 1) * parts]
        labels = sum(int((batch["sequences"].wanted[1] != IGNORED).sum()) for batch in dealt)
        assert {batch["step_labels"] for batch in dealt} == {labels}
    total = sum(len(_ids(module, row)) for row in module.train)
    assert sum(batch["tokens"] for batch in batches) == total


def test_rows_of_a_paragraph_are_trained_on_together_where_they_were_drawn_together(
    make: Make,
) -> None:
    """Three questions a paragraph, in steps of three."""
    for draw_by, paragraphs in (("paragraph", {1}), ("question", {1, 2, 3})):
        module = _ready(make(batch_size=3, data={"draw_by": draw_by}))
        steps = [rows for rows, _ in module.train_dataloader().sampler]
        held = [{module.train[row]["paragraph"] for row in rows} for rows in steps]
        assert {len(numbers) for numbers in held} <= paragraphs
        assert draw_by == "paragraph" or max(map(len, held)) > 1


@pytest.mark.parametrize("packed_length", [None, 1000])
def test_a_part_without_rows_has_tokens_but_no_label_that_counts(
    packed_length: int | None, make: Make
) -> None:
    module = _ready(make(micro_batches=4, packed_length=packed_length))
    batches = list(module.train_dataloader())
    empty = [batch for batch in batches if batch["samples"] == 0]
    assert len(empty) == 2  # the last step has 2 rows for 4 parts
    for batch in empty:
        assert batch["sequences"].input_ids.shape[1] > 0
        assert (batch["sequences"].wanted[1] == IGNORED).all()
        assert batch["tokens"] == 0
        assert batch["step_labels"] == batches[-4]["step_labels"] > 0
    first = module.train[0]
    again = module.collate_training([first], 1)["sequences"]  # the row itself keeps its labels
    assert _answers(module, again) == [f" {first['answers'][0]}{ENDING}"]
    assert again.input_ids[0, : len(_ids(module, first))].tolist() == _ids(module, first)


def test_training_batches_depend_on_the_seed_and_not_on_torch(make: Make) -> None:
    def tokens(seed: int, torch_seed: int) -> list[list[list[int]]]:
        with torch.random.fork_rng():
            torch.manual_seed(torch_seed)
            module = _ready(make(seed=seed))
            return [b["sequences"].input_ids.tolist() for b in module.train_dataloader()]

    assert tokens(0, 1) == tokens(0, 2)
    assert tokens(0, 1) != tokens(1, 1)


# The cache


def test_a_second_setup_comes_from_the_cache_and_is_equal(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _ready(make())
    _forbid_reading(monkeypatch)
    second = _ready(
        make(batch_size=2, eval_batch_size=3, micro_batches=2, mask_prompt=False, packed_length=9)
    )
    assert second.facts == first.facts
    for name in NAMES:
        assert list(getattr(second, name)) == list(getattr(first, name))
    second.setup("test")  # a stage more reads nothing more


def _other_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].pop()
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=ENDING, eos_token=ENDING)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 399},
        {"max_prompt_length": 399},
        {"tokenizer": "another"},
        {"seed": 1},
        {"data": {"split_seed": 1}},
        {"data": {"split_by": "question"}},
        {"data": {"draw_by": "paragraph"}},
        {"data": {"train_size": 5}},
        {"data": {"validation_size": 5}},
        {"data": {"test_size": 5}},
        {"data": {"validation_articles": 0.5}},
        {"data": {"unanswerable": "drop"}},
        {"data": {"misaligned": "repair"}},
    ],
    ids=str,
)
def test_a_change_of_what_rows_depend_on_misses_the_cache(
    changes: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _ready(make())
    if "tokenizer" in changes:
        changes = {"tokenizer": _other_tokenizer(first.tokenizer)}
    _forbid_reading(monkeypatch)
    with pytest.raises(AssertionError, match="the files were read again"):
        make(**changes).setup()


def test_a_change_of_the_files_misses_the_cache(
    make: Make, squad_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _ready(make())
    squad_file(Path(str(first.config.data.path)), articles=4, seed=3)
    second = _ready(make())
    assert not set(second.train.column("id")) & set(first.train.column("id"))
    assert second.facts["source"] != first.facts["source"]
    assert second.facts["test"] == first.facts["test"] | {
        "in_all_files": second.facts["test"]["in_all_files"]
    }


def test_a_build_that_fails_leaves_nothing_that_a_next_one_takes_for_whole(
    make: Make, tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        make(max_length=10).setup()
    module = make(data={"path": str(tmp_path / "none.json")})
    for _ in range(2):
        with pytest.raises(UserError, match=r"There is no file .*none\.json"):
            module.setup()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_save_that_breaks_off_leaves_nothing_that_a_next_one_takes_for_whole(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Dataset.save_to_disk

    def break_off(table: Dataset, folder: Path) -> None:
        save(table, folder)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "save_to_disk", break_off)
        with pytest.raises(OSError, match="no space left"):
            make().setup()
    assert len(_ready(make()).train) == 18
