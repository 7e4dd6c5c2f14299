"""dalorra_core.training.loop: the endless sequence of batches, and the rows of an evaluation."""

from itertools import islice

import pytest

from dalorra_core.data.collate import length_buckets
from dalorra_core.training.loop import _spread, micro_batches
from tests.support.tiny_models import random_rows

LENGTHS = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5]


def first(count: int, *, start: int = 0, stride: int = 1) -> list[list[int]]:
    batches = micro_batches(LENGTHS, batch_size=4, seed=3, start=start, stride=stride)
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


def test_processes_share_the_sequence() -> None:
    whole = first(12)
    assert first(4, start=0, stride=3) == whole[0::3]
    assert first(4, start=1, stride=3) == whole[1::3]
    assert first(4, start=2, stride=3) == whole[2::3]


def test_an_evaluation_takes_rows_from_all_over_a_sorted_file() -> None:
    rows = random_rows(range(1, 11))
    assert [len(r.token_ids) for r in _spread(rows, 5)] == [1, 3, 5, 7, 9]
    assert [len(r.token_ids) for r in _spread(rows, 3)] == [1, 4, 7]
    assert _spread(rows, None) == _spread(rows, 10) == _spread(rows, 99) == rows
