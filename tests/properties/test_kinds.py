"""Files as people have them: read whole, with every repair counted, or refused in words."""

from collections import Counter

import pytest
from configs import changed, make_splits
from hypothesis import event, given
from hypothesis import strategies as st
from strategies import Variant, met, variants

from lora_or_full.data.splits import NAMES, Splits

DROPPED = ("unanswerable_dropped", "impossible_dropped", "blank_dropped", "overlap_dropped")
REPAIRED = ("answers_repaired", "answers_not_in_context", "answers_looked_up", "offsets_in")


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return make_splits("f.json", tmp_path_factory.mktemp("kinds"))


@given(
    variants(),
    st.sampled_from(("article", "paragraph", "question")),
    st.sampled_from(("drop", "drop", "drop", "refuse")),
    st.sampled_from(("repair", "repair", "refuse")),
)
def test_no_question_is_lost_and_no_answer_moved_without_a_count(
    splits: Splits, file: Variant, split_by: str, unanswerable: str, misaligned: str
) -> None:
    path = splits.cache_dir / file.name
    path.write_bytes(file.content)
    choices = {"split_by": split_by, "unanswerable": unanswerable, "misaligned": misaligned}
    read, problem = met(changed(splits, path=str(path), **choices).read)
    event("refused" if problem else "read")
    if not file.utf8:
        assert "Save it as UTF-8" in problem
    if read is None:
        return
    found = [question for name in NAMES for question in read.splits[name]]
    dropped = sum(read.counts.get(key, 0) for key in DROPPED)
    assert len(found) + dropped == len(file.questions)
    stated = Counter((context, asked, golds) for context, asked, golds, _ in file.questions)
    assert not Counter((q.context, q.question, tuple(q.answers)) for q in found) - stated
    assert not any(not golds for _, _, golds in ((q.context, q.question, q.answers) for q in found))
    exact = Counter(file.questions)
    moved = Counter((q.context, q.question, tuple(q.answers), tuple(q.starts)) for q in found)
    repaired = sum(n for key, n in read.counts.items() if key.startswith(REPAIRED))
    assert (moved - exact).total() <= repaired + file.chance
    assert repaired == 0 or not file.exact
    for q in found:
        for answer, start in zip(q.answers, q.starts, strict=True):
            assert start == -1 or q.context.startswith(answer, start)
    ids = [question.id for question in found]
    assert len(set(ids)) == len(ids)
    made = len(set(ids) - set(file.ids))
    assert made <= read.counts.get("ids_made", 0)
    contexts = [{q.context for q in read.splits[name]} for name in NAMES]
    assert not contexts[2] & (contexts[0] | contexts[1])
    assert read.split_by == "question" or not contexts[0] & contexts[1]
