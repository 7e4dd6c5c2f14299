"""dalorra_core.data.collate: padded batches and the order of an epoch."""

import pytest
import torch

from dalorra_core.data.collate import EncodedExample, TokenBatch, collate, length_buckets
from dalorra_core.errors import ConfigError, DataError


def row(*token_ids: int, label: int = -1, allowed: tuple[int, ...] | None = None) -> EncodedExample:
    return EncodedExample("row", token_ids, label, allowed, truncated=False)


def test_rows_are_padded_on_the_right() -> None:
    batch = collate([row(5, 6, 7, label=1), row(8)], num_labels=2, pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch.last_index.tolist() == [2, 0]
    assert batch.labels.tolist() == [1, -1]
    assert batch.allowed is None
    assert (batch.num_tokens, batch.padded_tokens) == (4, 6)
    assert {t.dtype for t in (batch.input_ids, batch.last_index, batch.labels)} == {torch.int64}


def test_a_row_without_choices_of_its_own_may_be_given_any_label() -> None:
    batch = collate([row(1, allowed=(0, 2)), row(1)], num_labels=3)
    assert batch.allowed is not None
    assert batch.allowed.tolist() == [[True, False, True], [True, True, True]]


def test_a_batch_moves_whole() -> None:
    batch = collate([row(1, 2, allowed=(0,)), row(3)], num_labels=2).to("meta")
    assert isinstance(batch, TokenBatch)
    assert batch.allowed is not None
    tensors = (batch.input_ids, batch.last_index, batch.labels, batch.allowed)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert collate([row(1)], num_labels=1).to("meta").allowed is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "at least one row"),
        ([row()], "at least one token"),
        ([row(1, label=2)], r"must lie in 0\.\.1"),
        ([row(1, label=-2)], r"must lie in 0\.\.1"),
        ([row(1, allowed=(0, 2))], r"must lie in 0\.\.1"),
        ([row(1, allowed=(-1,))], r"must lie in 0\.\.1"),
    ],
)
def test_rows_that_fit_no_batch_are_refused(rows: list[EncodedExample], said: str) -> None:
    with pytest.raises(DataError, match=said):
        collate(rows, num_labels=2)


def test_the_order_of_an_epoch_is_the_same_on_every_machine() -> None:
    """Recorded once; a change here changes every training run."""
    lengths = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5]
    assert length_buckets(lengths, batch_size=3, seed=1, epoch=0, window=2) == RECORDED


RECORDED = [[3, 7, 5], [6], [1, 4, 8], [9, 0, 2]]


def test_each_epoch_and_seed_has_its_own_order() -> None:
    orders = {
        str(length_buckets(range(64), batch_size=4, seed=seed, epoch=epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_buckets_nearly_halve_the_padding() -> None:
    lengths = [3 + (i * 7919) % 23 for i in range(3200)]

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    bucketed = padded(length_buckets(lengths, batch_size=32, seed=0, epoch=0))
    shuffled = padded(length_buckets(lengths, batch_size=32, seed=0, epoch=0, window=1))
    assert bucketed < 0.65 * shuffled
    assert bucketed < 1.05 * sum(lengths)


def test_no_rows_give_no_batches() -> None:
    assert length_buckets([], batch_size=2, seed=0, epoch=0) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"seed": -1}, r"seed must lie in 0\.\.2\*\*64-1, got -1"),
        ({"epoch": 2**64}, r"epoch must lie in 0\.\.2\*\*64-1"),
    ],
)
def test_a_setting_outside_its_domain_is_named(changes: dict[str, int], said: str) -> None:
    settings = {"batch_size": 1, "seed": 0, "epoch": 0, "window": 1, **changes}
    with pytest.raises(ConfigError, match=said):
        length_buckets([1, 2], **settings)
