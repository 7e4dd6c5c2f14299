"""The label head's gates summed out, against the sum over every mask in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import mean_probs, mutual_information
from dalorra_core.predictive import exact_head
from dalorra_core.predictive.exact_head import HeadAnswers, score_exact_head
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.predictive.stem import stem_states
from tests.support.reference import every_mask, mask_probability
from tests.support.tiny_models import (
    TinyAdapter,
    assert_near,
    gated_pack,
    merged_label_logits,
    random_rows,
    tiny_adapter,
)

Q_PROJ = "model.layers.1.self_attn.q_proj"
LENGTHS = (5, 2, 7)
ALLOWED = (None, (0, 3), (1, 2, 4))
ROWS = random_rows(LENGTHS, allowed=ALLOWED)
KEEP = (0.91, 0.3)


def of_two_modules(family: str = "llama") -> TinyAdapter:
    """Return an adapter with four gates: two of q_proj and two of lm_head."""
    return tiny_adapter(family, r=2, targets=("q_proj", "lm_head"), layers=(1, 1))


def answers(
    tiny: TinyAdapter, z: Tensor, keep: Sequence[float] = KEEP, limit: int = 1000
) -> HeadAnswers:
    return score_exact_head(
        tiny.model,
        gated_pack(tiny.state, z),
        ROWS,
        keep=torch.tensor(keep),
        max_padded_tokens=limit,
    )


def enumerated(
    tiny: TinyAdapter, trunk: Sequence[int], keep: Sequence[float]
) -> tuple[Tensor, ...]:
    """Return mean probabilities (B, C) and mean entropy (B,) over the head's four masks."""
    probs = torch.zeros(len(ROWS), 5, dtype=torch.float64)
    entropy = torch.zeros(len(ROWS), dtype=torch.float64)
    for mask in every_mask(2):
        weight = mask_probability(mask, keep)
        gates = {Q_PROJ: torch.tensor(trunk), LM_HEAD: torch.tensor(mask)}
        for b, row in enumerate(ROWS):
            logits = merged_label_logits(tiny, row.token_ids, gates)
            allowed = list(row.allowed or range(5))
            p = logits[allowed].softmax(-1)
            probs[b, allowed] += weight * p
            entropy[b] -= weight * (p * p.log()).sum()
    return probs, entropy


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_they_are_the_sum_over_all_masks_of_the_head(family: str) -> None:
    """Also with soft-capped logits (gemma2), which are not linear in the gates."""
    tiny = of_two_modules(family)
    trunks = [(1, 0), (0, 1), (1, 1)]
    z = torch.stack([torch.tensor([trunk, (1, 0)]).float() for trunk in trunks])
    found = answers(tiny, z)
    for m, trunk in enumerate(trunks):
        probs, entropy = enumerated(tiny, trunk, KEEP)
        assert_near(found.probs[m], probs)
        assert_near(found.entropy[m], entropy)
        assert not found.probs[m][probs == 0].any()


def test_over_all_masks_of_the_trunk_they_are_the_exact_posterior_predictive() -> None:
    """Mean and mutual information; samples of the trunk stand for their probabilities."""
    tiny, trunk_keep = of_two_modules(), (0.5, 0.75)
    masks = every_mask(2)
    copies = [round(8 * mask_probability(mask, trunk_keep)) for mask in masks]
    assert sum(copies) == 8
    z = [
        torch.tensor([mask, (0, 0)]).float()
        for mask, n in zip(masks, copies, strict=True)
        for _ in range(n)
    ]
    found = answers(tiny, torch.stack(z))
    parts = [enumerated(tiny, mask, KEEP) for mask in masks]
    weights = [mask_probability(mask, trunk_keep) for mask in masks]
    mean = sum(w * probs for w, (probs, _) in zip(weights, parts, strict=True))
    within = sum(w * entropy for w, (_, entropy) in zip(weights, parts, strict=True))
    assert isinstance(mean, Tensor)
    assert_near(found.mean_probs, mean)
    assert_near(found.mutual_information, torch.special.entr(mean).sum(-1) - within)
    # Without the head's entropies its share of the disagreement would be missing.
    trunk_only = torch.special.entr(mean).sum(-1) - torch.special.entr(found.probs).sum(-1).mean(0)
    assert (found.mutual_information > trunk_only + 1e-3).any()


@pytest.mark.parametrize("keep", [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_gates_that_are_not_random_give_the_answers_of_samples(keep: tuple[float, ...]) -> None:
    tiny = of_two_modules()
    z = torch.tensor([[[1, 0], keep], [[0, 1], keep], [[1, 1], keep]])
    found = answers(tiny, z, keep)
    plain = score_rows(
        tiny.model, gated_pack(tiny.state, z), ROWS, num_labels=5, max_padded_tokens=1000
    ).log_probs
    assert torch.equal(found.log_probs, plain)
    assert_near(found.probs, plain.double().exp())
    assert_near(found.mean_probs, mean_probs(plain))
    assert_near(found.mutual_information, mutual_information(plain))


@pytest.mark.parametrize("limit", [1, 12, 40])
def test_neither_passes_nor_pieces_change_an_answer(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = of_two_modules()
    z = (torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    whole = answers(tiny, z)
    monkeypatch.setattr(exact_head, "_NUMBERS_AT_ONCE", 50)
    cut = answers(tiny, z, limit=limit)
    for ours, theirs in ((cut.probs, whole.probs), (cut.entropy, whole.entropy)):
        assert_near(ours, theirs)
    assert_near(cut.first(2).probs, whole.probs[:2])
    assert len(cut.first(2).entropy) == len(cut.first(2).log_probs) == 2


def test_states_below_the_adapted_layers_may_be_given() -> None:
    tiny = of_two_modules()
    pack = gated_pack(tiny.state, torch.ones(2, 2, 2))
    stems = stem_states(tiny.model, ROWS)
    assert stems is not None
    begun = score_exact_head(
        tiny.model, pack, ROWS, keep=torch.tensor(KEEP), max_padded_tokens=1000, stems=stems
    )
    assert_near(begun.probs, answers(tiny, torch.ones(2, 2, 2)).probs)


def test_a_head_without_gates_or_with_too_many_is_refused() -> None:
    plain = tiny_adapter(r=2, targets=("q_proj",))
    with pytest.raises(ConfigError, match="lm_head among its modules"):
        answers(plain, torch.ones(1, 2, 2))
    wide = tiny_adapter(r=9, targets=("lm_head",))
    with pytest.raises(ConfigError, match="at most 8, got 9"):
        answers(wide, torch.ones(1, 1, 9), (0.5,) * 9)
