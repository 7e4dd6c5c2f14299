"""Certified thresholds: against MAPIE, against a known population, and the answers "no"."""

import numpy as np
import pytest
import torch
from mapie.risk_control._base_controller import ltt_procedure
from torch import Tensor

from dalorra_core.artifact.calibration_record import HIGHER_IS_SURER, ScoreName
from dalorra_core.calibration.abstaining import certify_abstain
from dalorra_core.calibration.bounds import selective_risk_at
from dalorra_core.calibration.certificate import Certificate, NoCertificate, certify
from dalorra_core.calibration.scores import ScoreTable, passes, surer
from dalorra_core.calibration.threshold_plan import (
    CertifyRequest,
    Procedure,
    choose_score,
    counts_at,
    fewest_accepted,
    plan_thresholds,
)
from dalorra_core.errors import ConfigError, DataError


def population(
    n: int, n_outside: int, seed: int, *, hardest: float = 0.4, labels: int = 3
) -> ScoreTable:
    """Return rows that are right with the probability their confidence says."""
    generator = torch.Generator().manual_seed(seed)
    inside = 1 - hardest * torch.rand(n, generator=generator, dtype=torch.float64) ** 3
    outside = torch.rand(n_outside, generator=generator, dtype=torch.float64) * 0.9
    predicted = torch.randint(labels, (n + n_outside,), generator=generator)
    right = torch.rand(n, generator=generator, dtype=torch.float64) < inside
    truth = torch.where(right, predicted[:n], (predicted[:n] + 1) % labels)
    confidence = torch.cat([inside, outside])
    scores: dict[ScoreName, Tensor] = {
        "confidence": confidence,
        "predictive_entropy": -confidence.log(),
        "label_mass": torch.rand(n + n_outside, generator=generator, dtype=torch.float64),
    }
    return ScoreTable(torch.cat([truth, torch.full((n_outside,), -1)]), predicted, scores)


def parts(table: ScoreTable, seed: int = 0) -> tuple[ScoreTable, ScoreTable]:
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    third = len(table) // 3
    return table.rows(order[:third]), table.rows(order[third:])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [0.05, 0.1])
def test_fixed_sequence_equals_mapies(seed: int, target: float) -> None:
    select, held = parts(population(1500, 0, seed), seed)
    found = certify(select, held, "confidence", CertifyRequest(target))
    # the same thresholds in the same order: every one from the surest planned to the loosest
    values = select.scores["confidence"][~select.outside].numpy()
    grid = np.unique(np.quantile(values, np.linspace(0, 1, 100)))[::-1]
    counts = counts_at(held, "confidence", grid)
    risk = np.where(counts.accepted > 0, counts.wrong / np.maximum(counts.accepted, 1), 1.0)
    _, p_values = ltt_procedure(
        risk[None], np.array([[target]]), 0.1, counts.accepted[None], binary=True
    )
    certified = {float(t) for t, p in zip(grid, p_values[:, 0], strict=True) if p <= 0.1}
    if isinstance(found, NoCertificate):
        assert not certified or min(certified) > grid[10]  # only where hardly a row is accepted
        return
    assert found.limit.threshold in certified
    place = int(np.flatnonzero(grid == found.limit.threshold)[0])
    assert place == len(grid) - 1 or float(grid[place + 1]) not in certified
    assert found.risk_upper_bound <= target


def test_bonferroni_is_certified_by_mapie_too_and_no_looser() -> None:
    select, held = parts(population(3000, 0, 3))
    sequence = certify(select, held, "confidence", CertifyRequest(0.05))
    bonferroni = certify(select, held, "confidence", CertifyRequest(0.05, procedure="bonferroni"))
    assert isinstance(sequence, Certificate)
    assert isinstance(bonferroni, Certificate)
    counts = counts_at(held, "confidence", np.array([bonferroni.limit.threshold]))
    valid, _ = ltt_procedure(
        (counts.wrong / counts.accepted)[None],
        np.array([[0.05]]),
        0.1 / 10,
        counts.accepted[None],
        binary=True,
        fwer_method="bonferroni",
    )
    assert valid == [[0]]
    assert bonferroni.in_scope_coverage <= sequence.in_scope_coverage


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_certificates_hold_in_a_known_population(share: float) -> None:
    whole = population(40_000, 10_000 if share else 0, seed=11)
    generator = torch.Generator().manual_seed(5)
    request = CertifyRequest(0.05, 0.1, share)
    broken, certified, draws = 0, 0, 300
    for _ in range(draws):
        rows = torch.randint(len(whole), (1500,), generator=generator)
        found = certify(whole.rows(rows[:500]), whole.rows(rows[500:]), "confidence", request)
        if isinstance(found, Certificate):
            certified += 1
            counts = counts_at(whole, "confidence", np.array([found.limit.threshold]))
            broken += float(selective_risk_at(counts, share)[0]) > 0.05
    assert certified > draws / 2
    assert broken / draws <= 0.1 + 3 * (0.1 * 0.9 / draws) ** 0.5


@pytest.mark.parametrize("name", ["confidence", "predictive_entropy"])
def test_the_limit_accepts_what_the_certificate_counted(name: ScoreName) -> None:
    select, held = parts(population(3000, 300, 1))
    found = certify(select, held, name, CertifyRequest(0.1, 0.1, 0.1))
    assert isinstance(found, Certificate)
    accepted = passes(found.limit, held)
    assert int((accepted & ~held.outside).sum()) == found.n_accepted
    assert int((accepted & held.outside).sum()) == found.n_out_of_scope_accepted
    assert found.in_scope_coverage == found.n_accepted / int((~held.outside).sum())


def test_an_equivalent_score_gives_the_same_certificate() -> None:
    select, held = parts(population(3000, 300, 1))
    request = CertifyRequest(0.1, 0.1, 0.1)
    by_confidence = certify(select, held, "confidence", request)
    by_entropy = certify(select, held, "predictive_entropy", request)
    assert isinstance(by_confidence, Certificate)
    assert isinstance(by_entropy, Certificate)
    assert by_confidence.n_accepted == pytest.approx(by_entropy.n_accepted, abs=1)


def test_a_smaller_share_certifies_more() -> None:
    select, held = parts(population(3000, 600, 2))
    accepted = []
    for share in (0.02, 0.1, 0.25):
        found = certify(select, held, "confidence", CertifyRequest(0.1, 0.1, share))
        accepted.append(found.n_accepted if isinstance(found, Certificate) else 0)
    assert accepted == sorted(accepted, reverse=True)
    assert accepted[0] > accepted[-1]


def test_one_label_by_itself() -> None:
    select, held = parts(population(6000, 0, 4))
    found = certify(select, held, "confidence", CertifyRequest(0.1, label=1))
    assert isinstance(found, Certificate)
    eligible = passes(found.limit, held) & (held.predicted == 1)
    assert found.n_accepted == int(eligible.sum())


def test_too_few_rows_is_an_answer_with_an_estimate_that_suffices() -> None:
    select, held = parts(population(240, 0, 5))
    request = CertifyRequest(0.02)
    found = certify(select, held, "confidence", request)
    assert isinstance(found, NoCertificate)
    assert "no threshold on confidence meets selective risk 0.02" in found.reason
    assert found.more_labels is not None
    grown = 240 + 2 * found.more_labels  # twice, since the estimate is not a promise
    many = [certify(*parts(population(grown, 0, s)), "confidence", request) for s in range(8)]
    assert sum(isinstance(one, Certificate) for one in many) >= 4


def test_a_target_below_the_model_is_beyond_labels() -> None:
    table = population(900, 0, 6)
    wrong = ScoreTable(table.labels, (table.labels + 1) % 3, table.scores)  # never right
    found = certify(*parts(wrong), "confidence", CertifyRequest(0.05))
    assert isinstance(found, NoCertificate)
    assert found.more_labels is None
    assert "more labels alone would not help" in found.reason


def test_fewest_accepted_is_the_count_that_certifies_without_an_error() -> None:
    for target in (0.01, 0.02, 0.05, 0.1):
        n = fewest_accepted(target, 0.1)
        assert (1 - target) ** n <= 0.1 < (1 - target) ** (n - 1)


def test_choose_score_prefers_the_informative_one() -> None:
    select, held = parts(population(3000, 300, 7))
    assert choose_score(select, held, CertifyRequest(0.1, 0.1, 0.1)) != "label_mass"


def test_choosing_a_score_does_not_look_at_the_certify_part() -> None:
    select, held = parts(population(3000, 300, 7))
    request = CertifyRequest(0.1, 0.1, 0.1)
    blind = ScoreTable(
        held.labels, held.predicted, {k: torch.zeros_like(v) for k, v in held.scores.items()}
    )
    assert choose_score(select, held, request) == choose_score(select, blind, request)


@pytest.mark.parametrize("procedure", ["fixed_sequence", "bonferroni"])
def test_planning_the_test_does_not_look_at_the_certify_part(procedure: Procedure) -> None:
    select, held = parts(population(3000, 300, 7))
    request = CertifyRequest(0.1, 0.1, 0.1, procedure)
    blind = ScoreTable(
        torch.where(held.outside, held.labels, (held.labels + 1) % 3),
        held.predicted,
        {k: torch.zeros_like(v) for k, v in held.scores.items()},
    )
    plan = plan_thresholds(select, held, "confidence", request)
    other = plan_thresholds(select, blind, "confidence", request)
    assert len(plan.thresholds)
    assert (plan.thresholds.tolist(), plan.split) == (other.thresholds.tolist(), other.split)


@pytest.mark.parametrize("name", ["confidence", "predictive_entropy"])
def test_abstaining_keeps_to_its_share_in_a_known_population(name: ScoreName) -> None:
    whole = population(40_000, 0, seed=12)
    values = surer(name, whole.scores[name])
    generator = torch.Generator().manual_seed(1)
    broken, draws = 0, 300
    for _ in range(draws):
        rows = torch.randint(len(whole), (900,), generator=generator)
        limit = certify_abstain(whole.rows(rows[:300]), whole.rows(rows[300:]), name, 0.05, 0.1)
        assert limit is not None
        threshold = limit.threshold if HIGHER_IS_SURER[name] else -limit.threshold
        broken += float((values < threshold).double().mean()) > 0.05
    assert 0 < broken / draws <= 0.1 + 3 * (0.1 * 0.9 / draws) ** 0.5


def test_abstaining_needs_enough_rows() -> None:
    select, held = parts(population(30, 0, 1))
    assert certify_abstain(select, held, "confidence", 0.05, 0.1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_risk": 0.0}, "target_risk must lie strictly between 0 and 1, got 0.0"),
        ({"delta": 1.0}, "delta must lie strictly between 0 and 1, got 1.0"),
        ({"out_of_scope_share": 1.0}, r"out_of_scope_share must be in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_outside_their_domain_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CertifyRequest(**{"target_risk": 0.1, **changes})  # type: ignore[arg-type]


def test_rows_that_are_missing_are_named() -> None:
    select, held = parts(population(300, 0, 1))
    with pytest.raises(DataError, match=r"out_of_scope_share 0\.2 needs out-of-scope rows in the"):
        certify(select, held, "confidence", CertifyRequest(0.1, 0.1, 0.2))
    outside = population(0, 10, 1)
    with pytest.raises(DataError, match="the select part has no in-scope row"):
        certify(outside, held, "confidence", CertifyRequest(0.1))
    with pytest.raises(ConfigError, match="score mutual_information was not measured"):
        certify(select, held, "mutual_information", CertifyRequest(0.1))


def test_a_label_that_is_never_predicted_has_no_certificate() -> None:
    select, held = parts(population(300, 0, 1))
    found = certify(select, held, "confidence", CertifyRequest(0.1, label=9))
    assert isinstance(found, NoCertificate)
    assert found.more_labels is None
