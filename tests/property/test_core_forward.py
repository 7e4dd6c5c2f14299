"""The fused forward on generated batches: chunks and batch-mates never change an answer."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.scoring import (
    RowsToScore,
    plan_chunks,
    plan_runs,
    score_rows,
    score_together,
)
from dalorra_core.sampling.streams import permutation, uniforms
from tests.support.tiny_models import random_rows, tiny_adapter

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)
TINY = {late: tiny_adapter(layers=(1, 1) if late else None) for late in (False, True)}


def pack_of(late: bool, seed: int, samples: int) -> SamplePack:
    draw = Draw(("property", seed), samples)
    return METHODS["dalorra"].predict_pack(TINY[late].state, DalorraConfig(), draw)


def score(late: bool, pack: SamplePack, lengths: list[int], limit: int) -> torch.Tensor:
    rows = random_rows(lengths)
    return score_rows(TINY[late].model, pack, rows, num_labels=5, max_padded_tokens=limit).log_probs


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    samples=st.integers(1, 12),
    limit=st.integers(1, 300),
)
def test_every_row_is_in_one_chunk_and_no_chunk_is_too_large(
    lengths: list[int], samples: int, limit: int
) -> None:
    chunks = list(plan_chunks(lengths, samples, limit))
    assert sorted(i for rows, _ in chunks for i in rows) == list(range(len(lengths)))
    for rows, step in chunks:
        longest = max(lengths[i] for i in rows)
        assert 1 <= step <= samples
        assert len(rows) * longest * step <= limit or (len(rows) == 1 and step == 1)
        if len(rows) > 1:
            assert step == samples  # samples are split only for a row that does not fit whole
    in_order = [lengths[i] for rows, _ in chunks for i in rows]
    assert in_order == sorted(in_order)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20), samples=st.integers(1, 5))
def test_chunks_are_as_large_as_the_limit_allows(lengths: list[int], samples: int) -> None:
    limit = 100
    chunks = [rows for rows, _ in plan_chunks(lengths, samples, limit)]
    for rows, following in pairwise(chunks):
        one_more = (len(rows) + 1) * lengths[following[0]] * samples
        assert one_more > limit


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    samples=st.integers(1, 12),
    limit=st.integers(1, 300),
)
def test_runs_hold_the_chunks_in_order_and_as_many_as_fit(
    lengths: list[int], samples: int, limit: int
) -> None:
    runs = list(plan_runs(lengths, samples, limit))
    assert [chunk for run in runs for chunk in run] == list(plan_chunks(lengths, samples, limit))

    def tokens(chunks: list[tuple[list[int], int]]) -> int:
        rows = [i for chunk, _ in chunks for i in chunk]
        return len(rows) * max(lengths[i] for i in rows)

    assert all(tokens(run) <= limit or len(run) == 1 for run in runs)
    assert all(tokens([*run, after[0]]) > limit for run, after in pairwise(runs))


@settings(max_examples=25)
@given(
    lengths=LENGTHS,
    samples=st.integers(1, 5),
    limit=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    late=st.booleans(),
)
def test_chunked_equals_whole_equals_one_sample_at_a_time(
    lengths: list[int], samples: int, limit: int, seed: int, late: bool
) -> None:
    pack = pack_of(late, seed, samples)
    whole = score(late, pack, lengths, 10**6)
    torch.testing.assert_close(score(late, pack, lengths, limit), whole, rtol=1e-5, atol=1e-5)
    for m in range(samples):
        one = score(late, pack.narrow(m, m + 1), lengths, 10**6)
        torch.testing.assert_close(one[0], whole[m], rtol=1e-5, atol=1e-5)
    fewer = score(late, pack_of(late, seed, max(1, samples - 1)), lengths, 10**6)
    torch.testing.assert_close(fewer, whole[: len(fewer)], rtol=1e-5, atol=1e-5)


FAMILY = [TINY[True]]
FAMILY += [
    tiny_adapter(r=r, targets=targets, layers=layers, num_labels=labels, seed=r, beside=FAMILY[0])
    for r, targets, layers, labels in (
        (1, ("lm_head",), None, 2),
        (2, ("o_proj", "lm_head"), None, 6),
        (5, ("q_proj", "down_proj"), (1, 1), 3),
    )
]
"""Four adapters on one model, of other ranks, modules, layers and label counts."""


@settings(max_examples=25)
@given(
    mates=st.lists(
        st.tuples(st.integers(0, 3), LENGTHS, st.integers(0, 2**32)), min_size=1, max_size=4
    ),
    samples=st.integers(1, 4),
    limit=st.integers(1, 200),
)
def test_an_answer_never_depends_on_who_shares_its_batch(
    mates: list[tuple[int, list[int], int]], samples: int, limit: int
) -> None:
    groups = []
    for member, lengths, seed in mates:
        tiny = FAMILY[member]
        draw = Draw(("mates", seed), samples)
        pack = METHODS["dalorra"].predict_pack(tiny.state, DalorraConfig(), draw)
        rows = random_rows(lengths, num_labels=tiny.model.num_labels, seed=seed % 1000)
        groups.append(RowsToScore(tiny.model, pack, rows))
    found = score_together(groups, max_padded_tokens=limit, label_mass=True)
    for group, prediction in zip(groups, found, strict=True):
        (alone,) = score_together([group], max_padded_tokens=10**6, label_mass=True)
        torch.testing.assert_close(prediction.log_probs, alone.log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prediction.label_mass, alone.label_mass, rtol=1e-4, atol=1e-6)


@given(
    name=st.lists(st.text("abc", min_size=1, max_size=3) | st.integers(0, 99), max_size=4),
    size=st.integers(1, 40),
)
def test_streams_are_prefixes_inside_the_open_interval(name: list[str | int], size: int) -> None:
    long = uniforms(tuple(name), size + 10)
    assert (uniforms(tuple(name), size) == long[:size]).all()
    assert ((long > 0) & (long < 1)).all()
    assert sorted(permutation(tuple(name), size)) == list(range(size))
