"""Steps: every row once an epoch, in an order that depends on nothing but seed and epoch."""

import itertools
import random

import pytest
import torch
from torch.utils.data import Dataset

from steps import ResumableLoader, StepSampler

Part = tuple[list[int], int]
SHAPES = list(itertools.product([1, 2, 7, 12, 13], [1, 4, 5, 20], [1, 2, 3]))


def sampler(rows: int = 13, batch_size: int = 4, parts: int = 2, seed: int = 0) -> StepSampler:
    rng = random.Random(rows)
    return StepSampler([rng.randrange(2, 30) for _ in range(rows)], batch_size, parts, seed)


def epoch(steps: StepSampler, number: int) -> list[Part]:
    steps.set_epoch(number)
    return list(steps)


def written(steps: StepSampler, number: int) -> list[str]:
    return [str(part) for part in epoch(steps, number)]


@pytest.mark.parametrize(("rows", "batch_size", "parts"), SHAPES)
def test_each_row_comes_once_an_epoch(rows: int, batch_size: int, parts: int) -> None:
    steps = sampler(rows, batch_size, parts)
    for number in range(3):
        dealt = epoch(steps, number)
        assert len(dealt) == len(steps) == -(-rows // batch_size) * parts
        assert sorted(row for part, _ in dealt for row in part) == list(range(rows))


@pytest.mark.parametrize(("rows", "batch_size", "parts"), SHAPES)
def test_steps_are_full_but_the_last_and_their_parts_differ_by_a_row_at_most(
    rows: int, batch_size: int, parts: int
) -> None:
    dealt = epoch(sampler(rows, batch_size, parts), 0)
    for start in range(0, len(dealt), parts):
        sizes = [len(part) for part, _ in dealt[start : start + parts]]
        last = start + parts == len(dealt)
        assert sum(sizes) == (rows - (len(dealt) // parts - 1) * batch_size if last else batch_size)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("rows", "batch_size", "parts"), SHAPES)
def test_each_part_tells_the_labels_of_its_whole_step(
    rows: int, batch_size: int, parts: int
) -> None:
    steps = sampler(rows, batch_size, parts)
    dealt = epoch(steps, 0)
    for start in range(0, len(dealt), parts):
        step = dealt[start : start + parts]
        labels = sum(steps.labels[row] for part, _ in step for row in part)
        assert [total for _, total in step] == [labels] * parts
        assert labels > 0


def test_the_steps_do_not_depend_on_the_number_of_parts() -> None:
    def steps(parts: int) -> list[tuple[set[int], int]]:
        dealt = epoch(sampler(parts=parts), 1)
        return [
            ({row for part, _ in dealt[n : n + parts] for row in part}, dealt[n][1])
            for n in range(0, len(dealt), parts)
        ]

    assert steps(1) == steps(2) == steps(3) == steps(4)


def test_a_ragged_last_step_leaves_parts_without_a_row() -> None:
    dealt = epoch(sampler(rows=13, batch_size=4, parts=3), 0)
    assert [len(part) for part, _ in dealt[-3:]] == [1, 0, 0]


def test_order_is_fixed_by_seed_and_epoch() -> None:
    first = {(s, e): epoch(sampler(40, seed=s), e) for s in range(4) for e in range(4)}
    again = {(s, e): epoch(sampler(40, seed=s), e) for e in range(4) for s in range(4)}
    assert first == again
    assert len({str(dealt) for dealt in first.values()}) == 16


def test_order_is_the_same_in_every_process_and_version() -> None:
    # A hash of a text differs between processes; this order must not.
    assert [part for part, _ in epoch(sampler(6, 2, 1, seed=7), 3)] == [[4, 5], [3, 1], [0, 2]]


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


def loader(**shape: int) -> ResumableLoader:
    return ResumableLoader(Echo(), sampler=sampler(**shape), batch_size=None)


def test_a_loader_gives_what_its_sampler_deals() -> None:
    given = loader()
    assert list(given) == written(sampler(), 0)
    assert len(given) == len(sampler())


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_restored_loader_gives_the_rest_of_the_epoch_and_then_whole_ones(parts: int) -> None:
    whole = [written(sampler(parts=parts), number) for number in range(3)]
    for stop in range(1, len(whole[1])):
        interrupted = loader(parts=parts)
        interrupted.sampler.set_epoch(1)
        begun = list(itertools.islice(interrupted, stop))
        state = interrupted.state_dict()
        torch.rand(stop)
        resumed = loader(parts=parts)
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
    """As +trainer.limit_train_batches does."""
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
