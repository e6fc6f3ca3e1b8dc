"""Whatever stands on the command line is taken as it is meant or refused in words."""

import copy
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from strategies import HALVES, any_json, examples, met, texts

from lora_or_full.config import command_line, compose
from lora_or_full.config.schema import FIELDS, GROUPS, Config, validate

PLACES = ("output_dir", "cache_dir", "hydra.run.dir", "hydra.sweep.dir")
KEYS = [key for key in FIELDS if key not in PLACES]
OPTIONS = [option for group in GROUPS for option in compose.presets(group)]
DEFAULTS = compose.compose()
OTHER_KEYS = (
    "adapter", "model", "data", "optimizer", "trainer", "hydra", "lrr", "adapter.use_dora", "lr.x",
    "", "model.config.attn_pdrop", "model.config.nothing", "trainer.max_steps", "trainer.nothing",
    "trainer.limit_test_batches", "lr_by_mode", "mode@x", "hydra/launcher", "hydra.sweeper.params",
    "hydra.job.chdir", "--mode", "data.path.x", "a.b.c", "_target_", "defaults",
)  # fmt: skip
VALUES = (
    "", "null", "true", "false", "0", "1", "-1", "2", "3.5", "1e-4", "1e400", "nan", "inf", "-inf",
    "1_000", "9" * 30, "9" * 5000, "0x10", "???", "[]", "{}", "[1,2]", "{a:1}", "[[[]]]", "[a,b]",
    "1,2", "a,b,c", "range(3)", "range(0,1e12)", "range(1,0,0)", "range(0,inf)", "shuffle(1,2)",
    "shuffle(range(10000000000))", "choice(1,2)", "choice()", "glob(*)", "interval(0,1)", "sort(1)",
    "extend_list(1)", "int(x)", "str(1)", "${seed}", "${nowhere}", "${oc.env:NOWHERE}", "${",
    "${lr}/x", "${now:%Y}", "${oc.decode:[}", "'", '"', "'a", "a'b", "\\", "a\\,b", "a b", "@", "=",
    "==", "é", "a" * 300, "../x", "/x", "x/y", "..", ".", "~", "{a:{b:{c:d}}}", "full", "lora",
    "article", "question", "paragraph", "drop", "repair", "float32", "auto", "c_attn", "x.json",
    "[x.json,y.parquet]", "32-true",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a command line may make, it makes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("configuration"))
        yield


def words() -> st.SearchStrategy[str]:
    """A word of a command line, right or wrong."""
    keys = st.sampled_from((*KEYS, *KEYS, *GROUPS, *OTHER_KEYS)) | texts(2)
    values = st.sampled_from((*VALUES, *OPTIONS)) | texts(4) | st.sampled_from(HALVES)
    mark = st.sampled_from(("", "", "", "", "+", "++", "~"))
    key_and_value = st.tuples(mark, keys, st.sampled_from(("=", "=", "=", "=", "")), values)
    # Of a path the user is trusted: it is taken, wherever it leads; here it stays here.
    inside = values.map(lambda text: text.replace("/", "").replace(".", ""))
    place = st.tuples(st.just(""), st.sampled_from(PLACES), st.just("="), inside)
    return (key_and_value | key_and_value | key_and_value | place).map("".join) | texts(5)


def prepared(asked: list[str], multirun: bool) -> list[str] | None:
    """What Hydra is asked beside; None if it is refused."""
    taken, _ = met(
        lambda: command_line.prepare(Namespace(overrides=asked, multirun=multirun, config_dir=None))
    )
    return None if taken is None else taken.words


@examples(0.75)
@given(st.lists(words(), max_size=4), st.booleans())
@example(["~mode"], False)
@example(["+="], False)
@example(["hydra.sweep.dir=${nowhere}"], True)
@example(["hydra.run.dir=${nowhere}"], False)
@example(["study=2024"], True)
@example(["seed=range(0,1000000000)"], True)
@example(["mode=lora", "adapter=null"], False)
@example(["mode=full", "+adapter.r=8"], False)
@example(["mode=full", "~adapter"], False)
@example(["experiment=grid", "mode=nope"], True)
@example(["adapter.rr=8", "mode=nope"], False)
def test_any_command_line_is_taken_or_refused_in_words(asked: list[str], multirun: bool) -> None:
    taken = prepared(asked, multirun)
    event("refused" if taken is None else "taken")
    if taken is None or multirun:
        return
    settings = compose.compose([*asked, *taken])
    config = validate(settings)
    assert config.rank == (None if config.adapter is None else config.adapter.r)
    name = Path(str(settings["run_name"]))
    assert name.name == str(settings["run_name"])
    assert name.name not in (".", "..")


@given(st.sampled_from(KEYS), any_json() | st.lists(st.floats(-1, 2), max_size=3))
def test_any_value_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    settings = copy.deepcopy(DEFAULTS)
    holder, name = settings, key
    while "." in name:
        first, _, name = name.partition(".")
        holder = holder[first]
    holder[name] = value
    taken, problem = met(lambda: validate(settings))
    event("refused" if problem else "taken")
    assert key in problem or isinstance(taken, Config)


@examples(0.25)
@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.integers() | texts(3), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from((*FIELDS, "adapter", "model", "data", "trainer")) | texts(1), inner
    ), max_leaves=20,
))  # fmt: skip
def test_any_saved_configuration_is_gone_on_with_or_refused_in_words(content: Any) -> None:
    folder = Path("resumed")
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, bytes) else repr(content).encode()
    (folder / "config.yaml").write_bytes(text)
    assert prepared(["resume=resumed"], False) is None
