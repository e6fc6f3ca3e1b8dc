"""Steps: every row once an epoch, in an order that depends on nothing but seed and epoch."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from lora_or_full.data.sampler import ResumableLoader, StepSampler

Part = tuple[list[int], int]
SHAPES = list(itertools.product([1, 2, 7, 12, 13], [1, 4, 5, 20], [1, 2, 3]))


def sampler(
    rows: int = 13,
    batch_size: int = 4,
    parts: int = 2,
    seed: int = 0,
    paragraphs: Sequence[int] | None = None,
    devices: int = 1,
    device: int = 0,
) -> StepSampler:
    rng = random.Random(rows)
    labels = [rng.randrange(2, 30) for _ in range(rows)]
    return StepSampler(labels, paragraphs, batch_size, parts, seed, devices, device)


def by_paragraph(sizes: Sequence[int], batch_size: int, **more: int) -> StepSampler:
    """Over paragraphs of these sizes, whose rows are mixed."""
    paragraphs = [number for number, size in enumerate(sizes) for _ in range(size)]
    random.Random(0).shuffle(paragraphs)
    return sampler(len(paragraphs), batch_size, paragraphs=paragraphs, **more)


def epoch(steps: StepSampler, number: int) -> list[Part]:
    steps.set_epoch(number)
    return list(steps)


def written(steps: StepSampler, number: int) -> list[str]:
    return [str(part) for part in epoch(steps, number)]


@pytest.fixture(params=["rows", "paragraphs"])
def shaped(request: pytest.FixtureRequest) -> Callable[[int, int, int], StepSampler]:
    """A sampler of rows, batch size and parts; of single rows, or with those of a paragraph."""

    def make(rows: int, batch_size: int, parts: int) -> StepSampler:
        draw = random.Random(rows)
        paragraphs = [draw.randrange(1 + rows // 3) for _ in range(rows)]
        grouped = paragraphs if request.param == "paragraphs" else None
        return sampler(rows, batch_size, parts, paragraphs=grouped)

    return make


@pytest.mark.parametrize(("rows", "batch_size", "parts"), SHAPES)
def test_each_row_comes_once_an_epoch(
    rows: int, batch_size: int, parts: int, shaped: Callable[[int, int, int], StepSampler]
) -> None:
    steps = shaped(rows, batch_size, parts)
    for number in range(3):
        dealt = epoch(steps, number)
        assert len(dealt) == len(steps) == -(-rows // batch_size) * parts
        assert sorted(row for part, _ in dealt for row in part) == list(range(rows))


@pytest.mark.parametrize(("rows", "batch_size", "parts"), SHAPES)
def test_steps_are_full_but_the_last_and_their_parts_differ_by_a_row_at_most(
    rows: int, batch_size: int, parts: int, shaped: Callable[[int, int, int], StepSampler]
) -> None:
    dealt = epoch(shaped(rows, batch_size, parts), 0)
    for start in range(0, len(dealt), parts):
        sizes = [len(part) for part, _ in dealt[start : start + parts]]
        last = start + parts == len(dealt)
        assert sum(sizes) == (rows - (len(dealt) // parts - 1) * batch_size if last else batch_size)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("rows", "batch_size", "parts"), SHAPES)
def test_each_part_tells_the_labels_of_its_whole_step(
    rows: int, batch_size: int, parts: int, shaped: Callable[[int, int, int], StepSampler]
) -> None:
    steps = shaped(rows, batch_size, parts)
    dealt = epoch(steps, 0)
    for start in range(0, len(dealt), parts):
        step = dealt[start : start + parts]
        labels = sum(steps.labels[row] for part, _ in step for row in part)
        assert [total for _, total in step] == [labels] * parts
        assert labels > 0


def test_parts_are_a_step_cut_where_it_stands_whatever_their_number() -> None:
    """So that the rows of a paragraph, which stand together, stay together."""

    def steps(parts: int) -> list[tuple[list[int], int]]:
        dealt = epoch(sampler(parts=parts), 1)
        return [
            ([row for part, _ in dealt[n : n + parts] for row in part], dealt[n][1])
            for n in range(0, len(dealt), parts)
        ]

    assert steps(1) == steps(2) == steps(3) == steps(4)


@pytest.mark.parametrize("paragraphs", [None, [n // 3 for n in range(13)]])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("devices", [2, 3, 5])
def test_devices_share_the_steps_that_one_has(
    devices: int, parts: int, paragraphs: list[int] | None
) -> None:
    def dealt(devices: int, device: int, parts: int) -> list[list[Part]]:
        """The parts of each step."""
        own = epoch(sampler(13, 4, parts, 7, paragraphs, devices, device), 2)
        return [own[n : n + parts] for n in range(0, len(own), parts)]

    shares = [dealt(devices, device, parts) for device in range(devices)]
    assert [len(own) for own in shares] == [4] * devices  # all step as often: they wait for others
    for [(rows, labels)], step in zip(dealt(1, 0, 1), zip(*shares, strict=True), strict=True):
        assert [row for own in step for part, _ in own for row in part] == rows
        assert {total for own in step for _, total in own} == {labels}
        sizes = [len(part) for own in step for part, _ in own]
        assert max(sizes) - min(sizes) <= 1


def test_a_ragged_last_step_leaves_parts_without_a_row() -> None:
    dealt = epoch(sampler(rows=13, batch_size=4, parts=3), 0)
    assert [len(part) for part, _ in dealt[-3:]] == [0, 0, 1]


# The rows of a paragraph together


def shares(steps: StepSampler, number: int = 0) -> list[list[int]]:
    """How many rows of each of its paragraphs a step holds, for each step of an epoch."""
    dealt, parts = epoch(steps, number), steps.micro_batches
    assert steps.paragraphs is not None
    return [
        sorted(
            Counter(
                steps.paragraphs[row] for part, _ in dealt[n : n + parts] for row in part
            ).values()
        )
        for n in range(0, len(dealt), parts)
    ]


def test_a_paragraph_of_a_steps_size_is_a_step() -> None:
    for number in range(3):
        assert shares(by_paragraph([5] * 30, batch_size=5), number) == [[5]] * 30


def test_a_larger_paragraph_fills_whole_steps_and_its_rest_is_joined() -> None:
    assert sorted(shares(by_paragraph([14, 2, 9, 3], batch_size=4))) == [
        [1, 3], [2, 2], [4], [4], [4], [4], [4],
    ]  # fmt: skip


def test_two_paragraphs_that_make_a_step_together_do() -> None:
    for number in range(4):  # whichever comes first
        assert shares(by_paragraph([3, 2], batch_size=5), number) == [[2, 3]]


def test_what_fits_nowhere_is_cut_and_stands_in_the_last_step() -> None:
    dealt = shares(by_paragraph([3] * 5, batch_size=4))
    assert [sum(step) for step in dealt] == [4, 4, 4, 3]


def test_steps_hold_nearly_as_few_paragraphs_as_can_be() -> None:
    rng = random.Random(0)
    mixed = [rng.randrange(1, 8) for _ in range(400)]
    for sizes, batch_size in ((mixed, 4), (mixed, 8), ([3, 2] * 200, 5)):
        given = sum(map(len, shares(by_paragraph(sizes, batch_size))))
        fewest = sum(-(-size // batch_size) for size in sizes)
        assert fewest <= given < 1.05 * fewest


def test_a_step_of_any_size_takes_no_more_memory_than_there_are_rows() -> None:
    [(rows, _)] = epoch(by_paragraph([3, 2], batch_size=10**12, parts=1), 0)
    assert sorted(rows) == [0, 1, 2, 3, 4]


def test_the_steps_of_paragraphs_come_in_another_order_each_epoch() -> None:
    orders = [epoch(by_paragraph([5] * 8, batch_size=5, parts=1), number) for number in range(4)]
    steps = [[tuple(part) for part, _ in dealt] for dealt in orders]
    assert len({tuple(frozenset(step) for step in dealt) for dealt in steps}) == 4
    assert len({step for dealt in steps for step in dealt}) > 8  # rows are shuffled within, too
    assert len({frozenset(frozenset(step) for step in dealt) for dealt in steps}) == 1


# Order


@pytest.mark.parametrize("paragraphs", [None, [n // 3 for n in range(40)]])
def test_order_is_fixed_by_seed_and_epoch(paragraphs: list[int] | None) -> None:
    def order(seed: int, number: int) -> list[Part]:
        return epoch(sampler(40, seed=seed, paragraphs=paragraphs), number)

    first = {(s, e): order(s, e) for s in range(4) for e in range(4)}
    again = {(s, e): order(s, e) for e in range(4) for s in range(4)}
    assert first == again
    assert len({str(dealt) for dealt in first.values()}) == 16


def test_order_is_the_same_in_every_process_and_version() -> None:
    # A hash of a text differs between processes; this order must not.
    assert [part for part, _ in epoch(sampler(6, 2, 1, seed=7), 3)] == [[4, 5], [3, 1], [0, 2]]
    grouped = sampler(6, 2, 1, seed=7, paragraphs=[0, 1, 2, 2, 0, 1])
    assert [part for part, _ in epoch(grouped, 3)] == [[5, 1], [3, 2], [4, 0]]


def test_order_does_not_depend_on_global_random_states() -> None:
    orders = []
    for state in range(3):
        torch.manual_seed(state)
        random.seed(state)
        torch.rand(state)
        orders.append(epoch(sampler(), 0))
    assert orders[0] == orders[1] == orders[2]


def test_dealing_steps_leaves_global_random_states_alone() -> None:
    before = torch.get_rng_state(), random.getstate()
    epoch(sampler(), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


class Echo(Dataset[str]):
    """A data set whose item is what was asked for, written out."""

    def __getitem__(self, part: Part) -> str:
        return str(part)


def loader(**shape: Any) -> ResumableLoader:
    return ResumableLoader(Echo(), sampler=sampler(**shape), batch_size=None)


def test_a_loader_gives_what_its_sampler_deals() -> None:
    given = loader()
    assert list(given) == written(sampler(), 0)
    assert len(given) == len(sampler())


@pytest.mark.parametrize("paragraphs", [None, [n // 3 for n in range(13)]])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_restored_loader_gives_the_rest_of_the_epoch_and_then_whole_ones(
    parts: int, paragraphs: list[int] | None
) -> None:
    shape: dict[str, Any] = {"parts": parts, "paragraphs": paragraphs}
    whole = [written(sampler(**shape), number) for number in range(3)]
    for stop in range(1, len(whole[1])):
        interrupted = loader(**shape)
        interrupted.sampler.set_epoch(1)
        begun = list(itertools.islice(interrupted, stop))
        state = interrupted.state_dict()
        torch.rand(stop)
        resumed = loader(**shape)
        resumed.load_state_dict(state)
        resumed.sampler.set_epoch(1)
        assert begun + list(resumed) == whole[1]
        resumed.sampler.set_epoch(2)
        assert list(resumed) == whole[2]


def test_a_loader_restored_at_the_end_of_an_epoch_starts_the_next_at_its_first_step() -> None:
    ended = loader()
    list(ended)
    assert ended.state_dict() == {"epoch": 0, "position": len(ended)}
    resumed = loader()
    resumed.load_state_dict(ended.state_dict())
    for given in (ended, resumed):
        given.sampler.set_epoch(1)
        assert list(given) == written(sampler(), 1)


def test_an_epoch_that_was_cut_short_leaves_the_next_one_whole() -> None:
    given = loader()
    next(iter(given))
    given.sampler.set_epoch(1)
    assert list(given) == written(sampler(), 1)


def test_a_state_is_plain_numbers() -> None:
    # A checkpoint is loaded with weights_only, which refuses objects.
    begun = loader()
    next(iter(begun))
    assert begun.state_dict() == {"epoch": 0, "position": 1}
    assert {type(value) for value in begun.state_dict().values()} == {int}
