"""Train, validation and test: apart from each other, and the same whenever they should be."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from configs import changed, make_splits
from datasets import Dataset

from lora_or_full.data.splits import NAMES, Splits
from lora_or_full.data.squad import Question
from lora_or_full.errors import UserError

SquadWriter = Callable[..., Path]
Read = dict[str, list[Question]]


@pytest.fixture
def one_file(squad_file: SquadWriter, tmp_path: Path) -> Splits:
    """Twenty articles of four questions in one file, split in three by article."""
    return splits_of(squad_file(tmp_path / "all.json", 20, 2, 2, seed=0), tmp_path)


@pytest.fixture
def two_files(squad_file: SquadWriter, tmp_path: Path) -> Splits:
    """Twenty articles of four questions, and six of four as the test set."""
    test = squad_file(tmp_path / "test.json", 6, 2, 2, seed=1)
    return splits_of(squad_file(tmp_path / "pool.json", 20, 2, 2, seed=0), tmp_path, test)


def splits_of(path: Path, folder: Path, test_path: Path | None = None, **changes: Any) -> Splits:
    test = None if test_path is None else str(test_path)
    return make_splits(path, folder / "cache", test_path=test, **changes)


def ids(questions: list[Question]) -> list[str]:
    return [question.id for question in questions]


def titles(questions: list[Question]) -> set[str]:
    return {question.title for question in questions}


def test_no_article_is_in_two_splits(one_file: Splits) -> None:
    for split_seed in range(40):
        read, counts, *_ = changed(one_file, split_seed=split_seed).read()
        articles = [titles(read[name]) for name in NAMES]
        assert [len(names) for names in articles] == [14, 2, 4]  # a tenth of the 16 that are left
        assert len(set.union(*articles)) == 20
        assert sorted(i for name in NAMES for i in ids(read[name])) == sorted(all_ids(one_file))
        assert counts["articles_shared_with_test"] == 0


def all_ids(splits: Splits) -> list[str]:
    articles = json.loads(Path(str(splits.data.path)).read_text("utf-8"))["data"]
    return [qa["id"] for a in articles for p in a["paragraphs"] for qa in p["qas"]]


def test_a_test_file_is_the_test_set_whole(two_files: Splits) -> None:
    read, counts, *_ = two_files.read()
    assert len(read["test"]) == 24
    assert all(question.id.startswith("1-") for question in read["test"])
    assert {len(titles(read["train"])), len(titles(read["validation"]))} == {18, 2}
    assert not titles(read["train"]) & titles(read["validation"])
    assert counts["articles_shared_with_test"] == 0


@pytest.mark.parametrize("split_by", ["article", "question"])
@pytest.mark.parametrize("files", ["one_file", "two_files"])
def test_the_seed_draws_the_training_questions_and_nothing_else(
    split_by: str, files: str, request: pytest.FixtureRequest
) -> None:
    sizes = {"train_size": 10, "validation_size": 5, "test_size": 7}
    splits = changed(request.getfixturevalue(files), split_by=split_by, **sizes)
    reads = [changed(splits, seed=seed).read()[0] for seed in range(5)]
    for read in reads:
        assert [len(read[name]) for name in NAMES] == [10, 5, 7]
        assert read["validation"] == reads[0]["validation"]
        assert read["test"] == reads[0]["test"]
    assert len({tuple(ids(read["train"])) for read in reads}) == 5
    pool = set(ids(changed(splits, train_size=None).read()[0]["train"]))
    assert all(set(ids(read["train"])) <= pool for read in reads)


@pytest.mark.parametrize("split_by", ["article", "question"])
def test_the_same_seeds_give_the_same_splits_and_another_split_seed_others(
    split_by: str, one_file: Splits
) -> None:
    splits = changed(one_file, split_by=split_by, train_size=10, validation_size=5, test_size=7)
    assert splits.read() == splits.read()
    other = changed(splits, split_seed=1).read()[0]
    for name in NAMES:
        assert set(ids(splits.read()[0][name])) != set(ids(other[name]))


def test_splitting_by_question_leaves_no_question_in_two_splits(two_files: Splits) -> None:
    for split_seed in range(40):
        splits = changed(two_files, split_by="question", split_seed=split_seed)
        read = splits.read()[0]
        train, validation = set(ids(read["train"])), set(ids(read["validation"]))
        assert [len(train), len(validation)] == [72, 8]
        assert not train & validation
        assert train | validation == set(all_ids(splits))
        sized = changed(splits, validation_size=11).read()[0]
        assert [len(sized["train"]), len(sized["validation"])] == [69, 11]


def test_splitting_by_question_still_holds_out_whole_articles_for_the_test(
    one_file: Splits,
) -> None:
    for split_seed in range(10):
        splits = changed(one_file, split_by="question", split_seed=split_seed)
        read, counts, *_ = splits.read()
        assert len(titles(read["test"])) == 4
        assert not titles(read["test"]) & titles(read["train"] + read["validation"])
        assert counts["articles_shared_with_test"] == 0
        assert titles(read["train"]) & titles(read["validation"])


def test_a_size_takes_all_where_there_are_not_more(two_files: Splits) -> None:
    everything = two_files.read()
    assert changed(two_files, train_size=72, test_size=10**9).read() == everything
    fewer = changed(two_files, train_size=71, validation_size=7, test_size=23).read()[0]
    assert [len(fewer[name]) for name in NAMES] == [71, 7, 23]


def test_drawn_questions_keep_the_order_of_the_file(two_files: Splits) -> None:
    order = all_ids(two_files)
    drawn = ids(changed(two_files, train_size=20, seed=3).read()[0]["train"])
    assert drawn == sorted(drawn, key=order.index)
    assert len(set(drawn)) == 20


def test_a_draw_by_question_is_the_same_in_every_version(two_files: Splits) -> None:
    assert ids(changed(two_files, train_size=5, seed=3).read()[0]["train"]) == [
        "0-6-0-0",
        "0-9-1-0",
        "0-13-1-1",
        "0-17-0-0",
        "0-19-0-1",
    ]


@pytest.mark.parametrize("size", [1, 9, 10, 31])
def test_a_draw_by_paragraph_takes_whole_paragraphs_but_for_one(
    size: int, squad_file: SquadWriter, tmp_path: Path
) -> None:
    path = squad_file(tmp_path / "all.json", 12, 2, 4)
    splits = splits_of(path, tmp_path, draw_by="paragraph")
    everything = splits.read()[0]
    whole = Counter(question.context for question in everything["train"])
    assert set(whole.values()) == {4}
    for seed in range(5):
        drawn = changed(splits, train_size=size, seed=seed).read()[0]
        assert len(drawn["train"]) == len(set(ids(drawn["train"]))) == size
        shares = Counter(question.context for question in drawn["train"])
        assert sum(shares[context] < whole[context] for context in shares) == (size % 4 > 0)
        assert drawn["train"] == [q for q in everything["train"] if q in drawn["train"]]
        assert [drawn[name] for name in NAMES[1:]] == [everything[name] for name in NAMES[1:]]


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("size", [1, 4, 9, 30])
def test_what_is_held_out_is_drawn_by_paragraph_whatever_training_is(
    name: str, size: int, squad_file: SquadWriter, tmp_path: Path
) -> None:
    path = squad_file(tmp_path / "all.json", 40, 3, 4)
    splits = splits_of(path, tmp_path, validation_articles=0.3)
    whole = Counter(question.context for question in splits.read()[0][name])
    for draw_by in ("question", "paragraph"):
        sized = changed(splits, draw_by=draw_by, **{f"{name}_size": size})
        drawn = Counter(question.context for question in sized.read()[0][name])
        assert drawn.total() == size
        assert sum(drawn[context] < whole[context] for context in drawn) == (size % 4 > 0)
        others = [changed(sized, seed=1), changed(sized, **{f"{name}_size": size + 4})]
        same, larger = (set(ids(other.read()[0][name])) for other in others)
        assert set(ids(sized.read()[0][name])) == same < larger


def test_a_draw_by_paragraph_depends_on_the_seed_alone(one_file: Splits) -> None:
    splits = changed(one_file, draw_by="paragraph", train_size=10)
    draws = [ids(changed(splits, seed=seed).read()[0]["train"]) for seed in (0, 1, 2, 0)]
    assert draws[0] == draws[3]
    assert len({tuple(drawn) for drawn in draws}) == 3
    assert draws[0] != ids(changed(splits, draw_by="question").read()[0]["train"])
    larger = ids(changed(splits, train_size=13).read()[0]["train"])
    assert set(draws[0]) < set(larger)  # the same paragraphs, and more


def test_a_larger_validation_draw_does_not_change_the_training_questions(
    two_files: Splits,
) -> None:
    trains = [
        changed(two_files, train_size=10, validation_size=size).read()[0]["train"]
        for size in (1, 5, None)
    ]
    assert trains[0] == trains[1] == trains[2]


def test_an_empty_split_is_refused_with_what_there_is(
    two_files: Splits, squad_file: SquadWriter, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="The train split is empty: there are 80 questions"):
        changed(two_files, split_by="question", validation_size=80).read()
    empty = tmp_path / "empty.json"
    empty.write_text('{"data": []}')
    with pytest.raises(UserError, match="The test split is empty.* and 0 to test on"):
        changed(two_files, test_path=str(empty)).read()
    with pytest.raises(UserError, match="there is no question with an answer"):
        changed(two_files, path=str(empty), split_by="question").read()


@pytest.mark.parametrize(("articles", "test"), [(1, None), (2, None), (1, "test.json")])
def test_with_too_few_articles_paragraphs_are_held_out_and_it_is_said(
    articles: int, test: str | None, squad_file: SquadWriter, tmp_path: Path
) -> None:
    pool = squad_file(tmp_path / "pool.json", articles, 6)
    test_path = squad_file(tmp_path / test, 1, seed=1) if test else None
    for split_seed in range(5):
        given = splits_of(pool, tmp_path, test_path, split_seed=split_seed)
        read = given.read()
        assert read.split_by == "paragraph"
        assert read.notes == [
            f"by paragraph, since articles are too few to hold some out: {articles}"
        ]
        contexts = [{q.context for q in read.splits[name]} for name in NAMES]
        assert sum(map(len, contexts)) == len(set.union(*contexts))
        asked_for = changed(given, split_by="paragraph").read()
        assert asked_for.splits == read.splits
        assert asked_for.notes == []


@pytest.mark.parametrize(
    ("test", "way"),
    [(None, r"a test set of its own by data\.test_path"), ("t", "split_by=question")],
)
def test_a_single_paragraph_is_refused_with_a_way_that_works(
    test: str | None, way: str, squad_file: SquadWriter, tmp_path: Path
) -> None:
    pool = squad_file(tmp_path / "pool.json", 1, 1, 4)
    own = squad_file(tmp_path / "test.json", 1, seed=1)
    with pytest.raises(UserError, match=f"There are 1 paragraphs.*{way}"):
        splits_of(pool, tmp_path, own if test else None).read()
    read = splits_of(pool, tmp_path, own, split_by="question").read()
    assert [len(read.splits[name]) for name in NAMES[:2]] == [3, 1]


def test_the_order_of_a_file_does_not_change_which_articles_are_held_out(
    one_file: Splits, tmp_path: Path
) -> None:
    content = json.loads(Path(str(one_file.data.path)).read_text("utf-8"))
    content["data"].reverse()
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps(content))
    for split_seed in range(5):
        splits = changed(one_file, split_seed=split_seed)
        read, other = splits.read()[0], changed(splits, path=str(turned)).read()[0]
        for name in NAMES:
            assert titles(read[name]) == titles(other[name])


def test_at_least_one_article_is_held_out_of_few(squad_file: SquadWriter, tmp_path: Path) -> None:
    read = splits_of(squad_file(tmp_path / "f.json", 3), tmp_path).read()[0]
    assert [len(titles(read[name])) for name in NAMES] == [1, 1, 1]


@pytest.mark.parametrize("shared", [(), (0, 4), range(5)])  # all: one of them validates
def test_articles_shared_with_the_test_set_are_counted(
    shared: Sequence[int], squad_file: SquadWriter, tmp_path: Path
) -> None:
    pool = squad_file(tmp_path / "pool.json", 5, seed=0)
    content = json.loads(squad_file(tmp_path / "test.json", 6, seed=1).read_text("utf-8"))
    for number in shared:
        content["data"][number]["title"] = f"Article 0-{number}"
    test = tmp_path / "test.json"
    test.write_text(json.dumps(content))
    for changes in ({}, {"train_size": 1, "validation_size": 1, "test_size": 1}):
        assert splits_of(pool, tmp_path, test, **changes).read()[1] == {
            "unanswerable_dropped": 0,
            "answers_repaired": 0,
            "answers_not_in_context": 0,
            "articles_shared_with_test": len(shared),
        }


def test_a_question_that_is_trained_on_is_not_tested_on(two_files: Splits) -> None:
    with pytest.raises(UserError, match="80 questions of the test set are in data.path too"):
        changed(two_files, test_path=two_files.data.path).read()


def test_counts_add_up_over_pool_and_test_set(squad_file: SquadWriter, tmp_path: Path) -> None:
    files = []
    for seed in range(2):
        path = squad_file(tmp_path / f"{seed}.json", 4, 1, 3, seed=seed)
        content = json.loads(path.read_text("utf-8"))
        content["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
        for qa in content["data"][1]["paragraphs"][0]["qas"][: seed + 1]:
            qa["answers"][0]["answer_start"] += 1
        path.write_text(json.dumps(content))
        files.append(path)
    splits = splits_of(files[0], tmp_path, files[1], unanswerable="drop", misaligned="repair")
    counts = splits.read()[1]
    assert [counts["unanswerable_dropped"], counts["answers_repaired"]] == [2, 3]


# Data sets in the hub's layout


def hub_folder(folder: Path, squad_file: SquadWriter, **seeds: int) -> Path:
    """A folder with a parquet file for each of `seeds`' splits."""
    folder.mkdir()
    for name, seed in seeds.items():
        content = json.loads(squad_file(folder / "made", 6, 1, 2, seed=seed).read_text("utf-8"))
        (folder / "made").unlink()
        rows = [
            {
                "id": qa["id"],
                "title": article["title"],
                "context": paragraph["context"],
                "question": qa["question"],
                "answers": {
                    "text": [answer["text"] for answer in qa["answers"]],
                    "answer_start": [answer["answer_start"] for answer in qa["answers"]],
                },
            }
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def test_a_hub_folder_tests_on_its_validation_split(
    squad_file: SquadWriter, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "hub", squad_file, train=0, validation=1)
    read = splits_of(folder, tmp_path).read()[0]
    assert {question.id[0] for question in read["test"]} == {"1"}
    assert len(read["test"]) == 12
    assert {question.id[0] for question in read["train"] + read["validation"]} == {"0"}


def test_a_hub_folder_as_test_path_does_not_test_on_its_training_split(
    squad_file: SquadWriter, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "hub", squad_file, train=0, validation=1)
    pool = squad_file(tmp_path / "pool.json", 6, seed=2)
    read = splits_of(pool, tmp_path, folder).read()[0]
    assert {question.id[0] for question in read["test"]} == {"1"}


def test_a_hub_folder_without_validation_split_is_split_in_three(
    squad_file: SquadWriter, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "hub", squad_file, train=0)
    read = splits_of(folder, tmp_path).read()[0]
    assert [len(titles(read[name])) for name in NAMES] == [4, 1, 1]


def test_a_hub_folder_without_train_split_is_refused(
    squad_file: SquadWriter, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "hub", squad_file, test=0)
    with pytest.raises(UserError, match=r"has no split 'train' \(it has test\)"):
        splits_of(folder, tmp_path).read()


def test_a_folder_among_files_is_refused(squad_file: SquadWriter, tmp_path: Path) -> None:
    paths = [str(squad_file(tmp_path / "f.json")), str(tmp_path)]
    with pytest.raises(UserError, match="give one hub id or folder, or"):
        changed(splits_of(tmp_path, tmp_path), path=paths).read()


# What the cache goes by


def test_the_fingerprint_is_that_of_the_content(two_files: Splits, tmp_path: Path) -> None:
    before = two_files.fingerprint()
    elsewhere = tmp_path / "elsewhere.json"
    shutil.copy(str(two_files.data.path), elsewhere)
    assert changed(two_files, path=str(elsewhere)).fingerprint() == before
    elsewhere.write_text(elsewhere.read_text("utf-8").replace("Ada", "Adi", 1), "utf-8")
    assert changed(two_files, path=str(elsewhere)).fingerprint() != before
    assert changed(two_files, path=[two_files.data.path]).fingerprint() == before


def test_the_fingerprint_changes_with_the_roles_of_the_same_files(two_files: Splits) -> None:
    a, b = str(two_files.data.path), str(two_files.data.test_path)
    paths = [(a, b), (b, a), ([a, b], None), ([b, a], None), ([a, b], a), (a, [b, a]), (a, None)]
    prints = {changed(two_files, path=p, test_path=t).fingerprint() for p, t in paths}
    assert len(prints) == len(paths)


def test_the_fingerprint_changes_with_what_names_a_folders_splits(
    squad_file: SquadWriter, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "hub", squad_file, train=0, test=1)
    splits = splits_of(folder, tmp_path)
    prints = [splits.fingerprint()]
    (folder / "test.parquet").rename(folder / "validation.parquet")  # now a test set
    prints.append(splits.fingerprint())
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: train*\n---")
    prints.append(splits.fingerprint())
    (folder / "train.parquet").rename(folder / "train.jsonl")  # any format is loaded
    prints.append(splits.fingerprint())
    (folder / "train.jsonl").write_text("{}")
    prints.append(splits.fingerprint())
    assert len(set(prints)) == 5
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note.json").write_text("{}")
    assert splits.fingerprint() == prints[-1]


def test_a_folder_that_is_no_data_set_is_refused_before_it_is_read(
    squad_file: SquadWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub_folder(tmp_path / "home", squad_file, train=0, test=1)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "sparse").touch()
    os.truncate(folder / ".cache" / "sparse", 3 * 10**10)
    splits = splits_of(folder, tmp_path)
    before = splits.fingerprint()
    (folder / "more").mkdir()
    for number in range(1001):
        (folder / "more" / str(number)).touch()
    with pytest.raises(UserError, match="home holds more than 1,000 files or 20 GB"):
        splits.fingerprint()
    shutil.rmtree(folder / "more")
    assert splits.fingerprint() == before
    (folder / "film").touch()
    os.truncate(folder / "film", 3 * 10**10)
    with pytest.raises(UserError, match="home holds more than 1,000 files or 20 GB"):
        splits.fingerprint()


def test_a_missing_file_is_named_before_anything_is_read(two_files: Splits, tmp_path: Path) -> None:
    for missing in ("missing.json", "missing.parquet"):
        for key in ("path", "test_path"):
            with pytest.raises(UserError, match=f"There is no file .*{missing}"):
                changed(two_files, **{key: str(tmp_path / missing)}).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"split_by": "question"},
        {"split_seed": 1},
        {"validation_articles": 0.3},
        {"test_articles": 0.3},
        {"unanswerable": "drop"},
        {"misaligned": "repair"},
    ],
)
def test_the_key_of_every_split_changes_with(change: dict[str, Any], one_file: Splits) -> None:
    for name in NAMES:
        assert changed(one_file, **change).key(name) != one_file.key(name)


def test_equal_keys_mean_equal_questions(one_file: Splits) -> None:
    """Whatever changes the questions of a split changes its key."""
    variants = [
        changed(one_file, split_by=split_by, draw_by=draw_by, **{key: value})
        for split_by in ("article", "question")
        for draw_by in ("question", "paragraph")
        for key, values in {
            "seed": (0, 1),
            "split_seed": (0, 1),
            "train_size": (5, 6),
            "validation_size": (3, 4),
            "test_size": (3, 4),
            "validation_articles": (0.2, 0.3),
            "test_articles": (0.3, 0.4),
        }.items()
        for value in values
    ]
    seen: dict[str, list[Question]] = {}
    for splits in variants:
        read = splits.read()[0]
        for name in NAMES:
            key = json.dumps(splits.key(name), sort_keys=True)
            assert seen.setdefault(key, read[name]) == read[name]
    assert len(seen) < len(variants) * len(NAMES)  # some keys are equal: the claim was tried


@pytest.mark.parametrize("change", [{"seed": 1}, {"draw_by": "paragraph"}])
def test_the_draw_is_in_the_key_of_the_training_split_alone(
    change: dict[str, Any], one_file: Splits
) -> None:
    other = changed(one_file, **change)
    differ = [name for name in NAMES if other.key(name) != one_file.key(name)]
    assert differ == ["train"]
