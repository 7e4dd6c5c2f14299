"""Coins that every device tosses alike."""

import math

import pytest
import torch

from dalorra_core.sampling.coins import coins, random_words
from dalorra_core.sampling.streams import stream_seed, uniforms
from tests.support.reference import splitmix64_words

CPU = torch.device("cpu")


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[word % 2**64 for word in row] for row in words.tolist()]


def test_the_words_are_splitmix64s() -> None:
    """The first five of seed 1234567, as several implementations print them."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64_words(1234567, 5) == known
    assert unsigned(random_words([1234567], 5, CPU)) == [known]


def test_every_seed_has_a_stream_of_its_own() -> None:
    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    found = unsigned(random_words(seeds, 40, CPU))
    assert found == [splitmix64_words(seed, 40) for seed in seeds]


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    long = coins([3, 4], 1001, 0.3, CPU)
    for size in (1, 2, 7, 1000):
        assert torch.equal(coins([3, 4], size, 0.3, CPU), long[:, :size])


@pytest.mark.parametrize("start", [0, 1, 2, 7, 500])
def test_coins_may_be_tossed_from_the_middle(start: int) -> None:
    long, words = coins([3, 4], 1001, 0.3, CPU), random_words([3, 4], 601, CPU)
    for size in (1, 2, 101):
        assert torch.equal(coins([3, 4], size, 0.3, CPU, start), long[:, start : start + size])
        found = random_words([3, 4], size, CPU, start)
        assert torch.equal(found, words[:, start : start + size])


@pytest.mark.parametrize("prob", [0.0, 0.01, 0.1, 0.5, 0.95])
def test_coins_fall_as_often_as_they_should(prob: float) -> None:
    n = 400_000
    found = coins([stream_seed(("coins", str(prob)))], n, prob, CPU)[0].double()
    assert abs(float(found.mean()) - prob) <= 5 * math.sqrt(prob * (1 - prob) / n)
    if prob:
        both = torch.stack([found, found.roll(1), found.roll(2)])
        shared = torch.corrcoef(both)[~torch.eye(3, dtype=torch.bool)]
        assert shared.abs().max() < 5 / math.sqrt(n)  # neighbours share words, not fates


def test_nearby_seeds_are_independent() -> None:
    n = 100_000
    found = torch.corrcoef(coins([5, 6, 7, 2**63 + 5], n, 0.5, CPU).double())
    assert found[~torch.eye(4, dtype=torch.bool)].abs().max() < 5 / math.sqrt(n)


def test_a_stream_is_seeded_by_its_name() -> None:
    seed = stream_seed(("a", 1))
    assert 0 <= seed < 2**64
    assert seed == stream_seed(("a", 1)) != stream_seed(("a", 2))
    assert uniforms(("a", 1), 1)[0] == pytest.approx(seed / 2**64, abs=1e-15)  # its first word


@pytest.mark.gpu
def test_a_gpu_tosses_the_same_coins() -> None:
    seeds = [stream_seed(("gpu", m)) for m in range(5)]
    found = random_words(seeds, 10_000, torch.device("cuda"))
    assert torch.equal(found.cpu(), random_words(seeds, 10_000, CPU))
    tossed = coins(seeds, 10_001, 0.1, torch.device("cuda"))
    assert torch.equal(tossed.cpu(), coins(seeds, 10_001, 0.1, CPU))
