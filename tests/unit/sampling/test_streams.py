"""dalorra_core.sampling: named random streams, against an independent Philox and pinned values."""

import hashlib
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dalorra_core.sampling import streams
from dalorra_core.sampling.designs import iid_uniforms
from dalorra_core.sampling.streams import normals, permutation, uniforms
from tests.support.reference import philox_words

KEY = ("train", 1, 0, "z", 0)
RECORDED = [0.12908010436856626, 0.47680089540616916, 0.3986491456137286, 0.9446990481973636]


class FixedWords:
    """A bit generator that returns given words."""

    def __init__(self, words: list[int]) -> None:
        self.words = np.array(words, dtype=np.uint64)

    def advance(self, _: int) -> "FixedWords":
        return self

    def random_raw(self, size: int) -> NDArray[np.uint64]:
        return self.words[:size]


def test_a_stream_gives_the_recorded_numbers() -> None:
    """Recorded once; a change here changes every mask set and every training run."""
    assert uniforms(KEY, 4).tolist() == RECORDED
    assert permutation(("order", 7), 8).tolist() == [2, 1, 0, 6, 7, 4, 5, 3]


def test_a_stream_is_philox_keyed_by_the_hash_of_its_name() -> None:
    digest = hashlib.sha256(b"train\x1f1\x1f0\x1fz\x1f0").digest()
    words = philox_words(int.from_bytes(digest[:16], "little"), 9)
    assert uniforms(KEY, 9).tolist() == [((word >> 11) + 0.5) / 2**53 for word in words]


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    long = uniforms(("prefix",), 1000)
    for size in (0, 1, 4, 5, 999):
        assert uniforms(("prefix",), size).tolist() == long[:size].tolist()


def test_uniforms_are_never_zero_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = FixedWords([0, 2**64 - 1, 2**64 - 2**11, 2**63])
    monkeypatch.setattr(streams, "_bit_generator", lambda _: extremes)
    low, high, also_high, middle = uniforms(("x",), 4)
    assert 0.0 < low < 1e-15
    assert 1.0 - 1e-15 < also_high == high < 1.0
    assert middle == pytest.approx(0.5)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9, 30])
def test_a_draw_may_begin_anywhere(start: int) -> None:
    whole = uniforms(KEY, 40)
    for size in (0, 1, 7):
        assert uniforms(KEY, size, start).tolist() == whole[start : start + size].tolist()
    assert normals(KEY, 5, start).tolist() == normals(KEY, 40)[start : start + 5].tolist()


def test_every_part_of_a_name_counts() -> None:
    names = [("a",), ("b",), ("a", 0), ("a", 1), ("a", 0, "z"), ("a", "z", 0), ("a0",), (0, "a")]
    first = {name: uniforms(name, 8).tobytes() for name in names}
    assert len(set(first.values())) == len(names)
    assert first == {name: uniforms(name, 8).tobytes() for name in reversed(names)}


def test_streams_are_uniform_and_independent() -> None:
    n = 20_000
    u, v = uniforms(("u", 0), n), uniforms(("u", 1), n)
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs((u**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    assert abs(np.corrcoef(u, v)[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(n)
    counts = np.bincount((u * 16).astype(int), minlength=16)
    # chi-square of 15 degrees of freedom: mean 15, sd sqrt(30)
    assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 15 + 5 * math.sqrt(30)


def test_a_permutation_holds_every_index_once_and_follows_its_name() -> None:
    assert sorted(permutation(("p",), 100)) == list(range(100))
    assert permutation(("p",), 100).tolist() != permutation(("q",), 100).tolist()
    assert permutation(("p",), 100).tolist() == permutation(("p",), 100).tolist()
    assert permutation(("p",), 1).tolist() == [0]
    assert permutation(("p",), 0).tolist() == []


def test_every_order_is_as_likely() -> None:
    draws = 2400
    orders = [tuple(permutation(("order", i), 3)) for i in range(draws)]
    expected, sd = draws / 6, math.sqrt(draws / 6 * 5 / 6)
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert all(abs(count - expected) < 5 * sd for count in counts)


def test_sample_m_of_the_iid_design_is_the_stream_named_m() -> None:
    u = iid_uniforms(("sha", 3), num_samples=4, num_modules=2, r=3)
    for m in range(4):
        assert u[m].flatten().tolist() == uniforms(("sha", 3, m), 6).tolist()
    assert u.dtype == torch.float64


def test_fewer_iid_samples_are_the_first_of_more() -> None:
    ten = iid_uniforms(("sha", 3), num_samples=10, num_modules=2, r=3)
    four = iid_uniforms(("sha", 3), num_samples=4, num_modules=2, r=3)
    assert torch.equal(ten[:4], four)
    assert not torch.equal(ten, iid_uniforms(("sha", 4), num_samples=10, num_modules=2, r=3))
