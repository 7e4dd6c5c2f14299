"""dalorra_core.training.loop: the endless sequence of batches, and the rows of an evaluation."""

from itertools import islice

import pytest

from dalorra_core.config import OptimConfig
from dalorra_core.data.collate import length_buckets
from dalorra_core.errors import ConfigError
from dalorra_core.training.loop import _spread, last_step, micro_batches
from tests.support.tiny_models import random_rows

LENGTHS = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5]


def first(count: int, *, start: int = 0) -> list[list[int]]:
    batches = micro_batches(LENGTHS, batch_size=4, seed=3, start=start)
    return list(islice(batches, count))


def test_epochs_follow_one_another_and_each_has_every_row_once() -> None:
    batches = first(9)
    for epoch in range(3):
        chunk = batches[3 * epoch : 3 * epoch + 3]
        assert chunk == length_buckets(LENGTHS, batch_size=4, seed=3, epoch=epoch)
        assert sorted(i for batch in chunk for i in batch) == list(range(10))
    assert batches[:3] != batches[3:6]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 11])
def test_a_resumed_run_finds_its_place(start: int) -> None:
    assert first(5, start=start) == first(start + 5)[start:]


def test_an_evaluation_takes_rows_from_all_over_a_sorted_file() -> None:
    rows = random_rows(range(1, 11))
    assert [len(r.token_ids) for r in _spread(rows, 5)] == [1, 3, 5, 7, 9]
    assert [len(r.token_ids) for r in _spread(rows, 3)] == [1, 4, 7]
    assert _spread(rows, None) == _spread(rows, 10) == _spread(rows, 99) == rows


def in_order(count: int, *, start: int = 0, size: int = 4) -> list[list[int]]:
    batches = micro_batches(LENGTHS, batch_size=size, seed=3, start=start, shuffle=False)
    return list(islice(batches, count))


def test_without_shuffling_every_epoch_is_the_file_without_its_rest() -> None:
    assert in_order(5) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2 + [[0, 1, 2, 3]]
    assert in_order(5, start=3) == in_order(8)[3:]
    assert in_order(2, size=5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_without_shuffling_there_must_be_a_whole_batch() -> None:
    assert in_order(2, size=10) == [list(range(10))] * 2
    with pytest.raises(ConfigError, match=r"at most the 10 training rows, got 11"):
        in_order(1, size=11)


@pytest.mark.parametrize(
    ("rows", "published"), [(640, 5120), (4957, 6195), (9427, 7068), (1119, 5022)]
)
def test_published_runs_end_with_an_epoch(rows: int, published: int) -> None:
    """methods.md 1.7; the last is ceil(5000 / 279) epochs of 279."""
    optim = OptimConfig(run_to_epoch_end=True)
    assert last_step(optim, rows, shuffle=False) == published
    assert last_step(OptimConfig(), rows, shuffle=False) == 5000


def test_the_end_of_the_epoch_counts_micro_batches() -> None:
    """10 rows are 3 batches of 4, the last one short; 7 steps of 2 are 14, hence 15 of 5 epochs."""
    optim = OptimConfig(run_to_epoch_end=True, steps=7, gradient_accumulation=2)
    assert last_step(optim, 10, shuffle=True) == 8  # 16 batches: the 15 and one more
    alone = OptimConfig(run_to_epoch_end=True, steps=7)
    assert last_step(alone, 10, shuffle=True) == 9
