"""Rank dropout: exactly K zeros, every subset equally likely, modules apart."""

import math
from itertools import combinations

import pytest
import torch

from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from dalorra_core.methods.rank_dropout import RankDropoutConfig, gates_with_zeros
from dalorra_core.sampling.designs import iid_uniforms
from tests.support.tiny_models import batch_of, gated_pack, random_rows, tiny_adapter

METHOD = METHODS["rank_dropout"]
R = 5
TINY = tiny_adapter(r=R)
LAYERS = len(TINY.state.specs)


def gates_of(pack: SamplePack) -> torch.Tensor:
    gates = [pack.modules[spec.name].z for spec in TINY.state.specs]
    return torch.stack([z for z in gates if z is not None], dim=1)  # (M, L, r)


def drawn(num_dropped: int, samples: int) -> torch.Tensor:
    config = RankDropoutConfig(num_dropped=num_dropped)
    return gates_of(METHOD.predict_pack(TINY.state, config, Draw(("zeros",), samples)))


@pytest.mark.parametrize("num_dropped", range(R))
def test_each_module_of_each_sample_has_exactly_k_zeros(num_dropped: int) -> None:
    z = drawn(num_dropped, 40)
    assert set(z.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(z.sum(-1), torch.full((40, LAYERS), float(R - num_dropped)))


def test_even_equal_uniforms_leave_k_zeros() -> None:
    z = gates_with_zeros(torch.full((3, 2, R), 0.5), 2)
    assert torch.equal(z.sum(-1), torch.full((3, 2), 3.0))


def test_every_subset_is_equally_likely() -> None:
    samples, k = 3000, 2
    z = drawn(k, samples).flatten(0, 1)  # (M L, r)
    n, subsets = len(z), list(combinations(range(R), k))
    share = 1 / len(subsets)
    error = math.sqrt(n * share * (1 - share))
    for subset in subsets:
        count = int((z[:, list(subset)] == 0).all(1).sum())
        assert abs(count - n * share) < 5 * error, subset


def test_modules_and_samples_are_independent() -> None:
    n, z = 3000, drawn(2, 3000)
    columns = torch.cat([z.flatten(1), z.roll(1, 0)[:, 0]], dim=1)  # all gates, and the last sample
    found = torch.corrcoef(columns.T)
    for a in range(LAYERS + 1):
        for b in range(a):
            block = found[a * R : (a + 1) * R, b * R : (b + 1) * R]
            assert block.abs().max() < 5 / math.sqrt(n)
    own = found[:R, :R][~torch.eye(R, dtype=torch.bool)]
    expected = -1 / (R - 1)  # the gates of one module have a constant sum
    assert (own - expected).abs().max() < 5 * (1 - expected**2) / math.sqrt(n)


def test_training_and_prediction_draw_alike() -> None:
    config, draw = RankDropoutConfig(num_dropped=2), Draw(("same",), 6)
    train = gates_of(METHOD.train_pack(TINY.state, config, draw))
    assert torch.equal(train, gates_of(METHOD.predict_pack(TINY.state, config, draw)))
    v = iid_uniforms(("same", "z"), 6, LAYERS, R)
    kept = torch.ones(6, LAYERS, R)
    for m in range(6):
        for i in range(LAYERS):
            for j in sorted(range(R), key=lambda j: float(v[m, i, j]))[:2]:
                kept[m, i, j] = 0
    assert torch.equal(train, kept)


def test_dropping_none_is_plain_lora() -> None:
    batch = batch_of(random_rows((4, 6)))
    pack = METHOD.predict_pack(TINY.state, RankDropoutConfig(num_dropped=0), Draw(("any",), 2))
    plain = METHODS["mle"].mean_pack(TINY.state, MleConfig())
    with torch.no_grad():
        found, expected = TINY.model(batch, pack).logits, TINY.model(batch, plain).logits
    torch.testing.assert_close(found, expected.expand(2, -1, -1), rtol=1e-5, atol=1e-5)


def test_the_mean_pass_has_the_mean_of_all_subsets() -> None:
    """E over the C(r, K) gate vectors of one layer's output, enumerated."""
    k, config = 2, RankDropoutConfig(num_dropped=2)
    subsets = list(combinations(range(R), k))
    z = torch.ones(len(subsets), LAYERS, R)
    for row, subset in zip(z, subsets, strict=True):
        row[:, list(subset)] = 0
    spec = TINY.state.specs[0]
    h = torch.randn(1, 7, spec.d_in, generator=torch.Generator().manual_seed(1))
    each = gated_pack(TINY.state, z).modules[spec.name]
    mean = METHOD.mean_pack(TINY.state, config).modules[spec.name]
    folded = h.expand(len(subsets), -1, -1)
    expected = low_rank_delta(folded, each, len(subsets), 2.0).mean(0)
    torch.testing.assert_close(low_rank_delta(h, mean, 1, 2.0)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_dropped", [R, R + 1, 511])
def test_at_least_one_rank_stays_on(num_dropped: int) -> None:
    config = RankDropoutConfig(num_dropped=num_dropped)
    with pytest.raises(ConfigError, match=f"which is {R}, got {num_dropped}"):
        METHOD.init(TINY.state.specs, R, 0, config)
    with pytest.raises(ConfigError, match="num_dropped must be below"):
        METHOD.shapes(TINY.state.specs, R, config)


def test_the_summary_counts_ranks() -> None:
    summary = METHOD.summary(TINY.state, RankDropoutConfig(num_dropped=2))
    assert summary["num_gates"] == LAYERS * R
    assert set(summary["expected_rank"].values()) == {3.0}
