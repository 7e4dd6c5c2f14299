"""Numbers of every token: who shares them with whom."""

import torch

from dalorra_core.sampling.streams import normals
from dalorra_core.sampling.token_normals import PositionNormals, RowNormals

CPU = torch.device("cpu")


def test_a_number_belongs_to_its_sample_and_position() -> None:
    found = PositionNormals.named(("a",), 3, 2).of(4, 5, CPU)
    assert found.shape == (3, 1, 5, 2)
    for m in range(3):
        expected = torch.from_numpy(normals(("a", m), 10)).float().view(5, 2)
        assert torch.equal(found[m, 0], expected)


def test_longer_rows_and_more_samples_begin_with_the_same_numbers() -> None:
    grown = PositionNormals.named(("a",), 2, 3)
    short = grown.of(1, 4, CPU).clone()
    longer = grown.of(1, 100, CPU)
    assert torch.equal(longer[:, :, :4], short)
    more = PositionNormals.named(("a",), 5, 3).of(1, 100, CPU)
    assert torch.equal(more[:2], longer)
    assert not torch.equal(more[0], more[1])


def test_some_samples_are_those_of_the_whole() -> None:
    whole = PositionNormals.named(("a",), 6, 2)
    part = whole.narrow(2, 5).narrow(1, 3)
    assert torch.equal(part.of(1, 7, CPU), whole.of(1, 7, CPU)[3:5])
    assert part.tensors()[0] is whole.tensors()[0]
    rows = RowNormals(("a",), range(6), 2)
    narrowed = rows.narrow(2, 5).narrow(1, 3)
    assert torch.equal(narrowed.of(3, 2, CPU), rows.of(3, 2, CPU)[3:5])


def test_a_table_is_drawn_once() -> None:
    numbers = PositionNormals.named(("a",), 2, 2)
    assert list(numbers.tensors()) == []
    with torch.inference_mode():
        numbers.of(1, 3, CPU)
    (first,) = numbers.tensors()
    numbers.of(1, 30, CPU)
    assert numbers.tensors()[0] is first
    weight = torch.ones(2, requires_grad=True)
    (numbers.of(1, 3, CPU) * weight).square().sum().backward()  # it may be part of a graph
    assert weight.grad is not None


def test_one_position_is_drawn_where_one_is_asked_for_and_what_is_to_come_is_known() -> None:
    tied = PositionNormals.named(("a",), 2, 9)
    tied.of(4, 1, CPU)
    assert tied.tensors()[0].shape == (2, 1, 9)
    assert tied.bytes_to_come(1) == 0
    grown = PositionNormals.named(("a",), 3, 2)
    for length in (1, 5, 33):
        before = sum(t.nbytes for t in grown.tensors())
        expected = grown.bytes_to_come(length)
        grown.of(1, length, CPU)
        assert sum(t.nbytes for t in grown.tensors()) == before + expected
        assert grown.narrow(1, 2).bytes_to_come(length) == 0
    assert torch.equal(grown.of(1, 33, CPU), PositionNormals.named(("a",), 3, 2).of(1, 33, CPU))
    assert RowNormals(("a",), range(2), 3).bytes_to_come(5) == 0


def test_training_rows_have_numbers_of_their_own() -> None:
    numbers = RowNormals(("a",), range(2), 3)
    found = numbers.of(4, 5, CPU)
    assert found.shape == (2, 4, 5, 3)
    assert torch.equal(found, RowNormals(("a",), range(2), 3).of(4, 5, CPU))
    assert found.unique().numel() == found.numel()
    assert list(numbers.tensors()) == []
