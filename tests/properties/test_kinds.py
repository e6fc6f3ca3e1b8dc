"""Files as people have them: read whole, with every repair counted, or refused in words."""

from collections import Counter
from pathlib import Path

import pytest
from configs import make_splits
from hypothesis import event, given
from hypothesis import strategies as st
from strategies import Variant, met, variants

from lora_or_full.data.splits import NAMES

DROPPED = ("unanswerable_dropped", "impossible_dropped", "blank_dropped", "overlap_dropped")
REPAIRED = ("answers_repaired", "answers_not_in_context", "answers_looked_up", "offsets_in")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@given(
    variants(),
    st.sampled_from(("article", "paragraph", "question")),
    st.sampled_from(("drop", "drop", "drop", "refuse")),
    st.sampled_from(("repair", "repair", "refuse")),
)
def test_no_question_is_lost_and_no_answer_moved_without_a_count(
    place: Path, file: Variant, split_by: str, unanswerable: str, misaligned: str
) -> None:
    path = place / file.name
    path.write_bytes(file.content)
    splits = make_splits(
        path, place, split_by=split_by, unanswerable=unanswerable, misaligned=misaligned
    )
    read, problem = met(splits.read)
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
    assert (moved - exact).total() <= repaired
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
