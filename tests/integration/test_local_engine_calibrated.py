"""The real engine with a calibrated adapter: what calibration adds, voids, and what-if answers."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.artifact.calibration_record import (
    AbstainGuarantee,
    CombinedScore,
    Guarantee,
    MeasuredWith,
    PredictionSets,
    Uncertified,
)
from dalorra_core.artifact.calibration_record import Limit as StoredLimit
from dalorra_core.artifact.manifest import Manifest
from dalorra_core.artifact.store import calibration_file_name, update_artifact
from dalorra_core.calibration.combined import combined_score
from dalorra_core.calibration.prediction_sets import members
from dalorra_core.calibration.scores import ScoreTable, score_table
from dalorra_core.calibration.split import DIGEST_BYTES
from dalorra_core.calibration.stored_rows import StoredRows
from dalorra_core.calibration.validity import measured_with, void_reason
from dalorra_core.data.examples import TextExample
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.tempering import tempered
from server.decision import decide
from server.engines.local import LocalEngine
from server.ports import (
    AdapterCard,
    BatchKey,
    BatchRow,
    Limit,
    NotCalibratedError,
    Policy,
    RowScores,
    Sampling,
    ScoreName,
    TextQuestion,
)
from tests.integration.test_local_engine import LABELS, TEXTS, base_of, train
from tests.support.tiny_manifest import tiny_calibration

TEMPERATURE = 1.4
COMBINED = CombinedScore(
    bias=0.5,
    weights={
        "logit_confidence": 1.0,
        "predictive_entropy": -0.5,
        "log_mutual_information": -0.1,
        "log_label_mass": 0.05,
    },
    n=20,
)
SETS = (
    PredictionSets(
        kind="aps", alpha=0.1, quantile=0.6, n=20, empirical_coverage=0.95, mean_size=2.5
    ),
    PredictionSets(
        kind="lac", alpha=0.1, quantile=0.9, n=20, empirical_coverage=0.9, mean_size=1.5
    ),
)
QUESTIONS = [f"{TEXTS[n % 4]} {'please ' * (n % 7)}{n}" for n in range(40)]


def guarantee(here: MeasuredWith, target: float = 0.05) -> Guarantee:
    return Guarantee(
        procedure="fixed_sequence",
        target_risk=target,
        delta=0.1,
        out_of_scope_share=0.2,
        n=20,
        n_out_of_scope=4,
        n_accepted=10,
        n_out_of_scope_accepted=0,
        risk_upper_bound=0.049,
        in_scope_coverage=0.7,
        calibrated_at="2026-02-01T00:00:00+00:00",
        measured_with=here,
    )


def table_of(predictor: Predictor) -> ScoreTable:
    """Return the scores of the 40 questions; every fifth is out of scope, every third is wrong."""
    rows = [predictor.encode(TextExample("row", text)) for text in QUESTIONS]
    prediction = tempered(predictor.predict(rows, calibrated=False), TEMPERATURE)
    numbers = torch.arange(len(rows))
    predicted = summarise(prediction.log_probs).predicted.long()
    labels = torch.where(numbers % 3 == 0, (predicted + 1) % len(LABELS), predicted)
    labels = torch.where(numbers % 5 == 0, torch.full_like(labels, -1), labels)
    return score_table(prediction, labels, COMBINED)


def calibrate_by_hand(adapter: Path) -> ScoreTable:
    """Write a calibration into an artifact; return the scores of its rows."""
    predictor = Predictor.load(adapter, base=base_of(adapter), device="cpu")
    table = table_of(predictor)
    n = len(table)
    digests = torch.zeros(n, DIGEST_BYTES, dtype=torch.uint8)
    stored = StoredRows(digests, (torch.arange(n) % 4).clamp(max=2).to(torch.uint8), table)
    content = stored.to_bytes()
    here = measured_with(predictor, predictor.default_plan).model_copy(
        update={"temperature": TEMPERATURE}
    )
    record = tiny_calibration(calibration_file_name(content), TEMPERATURE)
    uncertified = Uncertified(target_risk=0.01, reason="too few rows", more_labels=900)
    record = record.model_copy(
        update={
            "measured_with": here,
            "combined": COMBINED,
            "prediction_sets": SETS,
            "uncertified": (uncertified,),
        }
    )
    manifest = predictor.manifest.model_copy(update={"calibration": record})
    update_artifact(adapter, with_policies(manifest, here), content)
    return table


def with_policies(manifest: Manifest, here: MeasuredWith) -> Manifest:
    (empirical,) = manifest.policies
    certified = empirical.model_copy(
        update={
            "name": "risk-0.05",
            "accept": StoredLimit(score="combined", threshold=0.3),
            "abstain": StoredLimit(score="predictive_entropy", threshold=1.38),
            "accept_by_label": {LABELS[0]: 0.2, LABELS[1]: None},
            "guarantee": guarantee(here),
            "abstain_guarantee": AbstainGuarantee(max_in_scope_share=0.02, delta=0.1, n=20),
        }
    )
    nothing = empirical.model_copy(update={"name": "nothing", "accept": None, "abstain": None})
    return manifest.model_copy(update={"policies": (certified, empirical, nothing)})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("calibrated"), "text", "dalorra")


@pytest.fixture(scope="module")
def table(adapter: Path) -> ScoreTable:
    return calibrate_by_hand(adapter)


def load(adapter: Path, **settings: Any) -> tuple[LocalEngine, AdapterCard]:
    engine = LocalEngine([adapter], base=base_of(adapter), device="cpu", **settings)
    (card,) = engine.load()
    return engine, card


def answer(engine: LocalEngine, card: AdapterCard, sampling: Sampling) -> list[RowScores]:
    key = BatchKey(card.key, sampling)
    rows = [
        BatchRow(key, engine.encode(card.key, TextQuestion(text), "none")) for text in QUESTIONS
    ]
    found = engine.run_batch(rows, lambda _place: True).rows
    return [scores for scores in found if scores is not None]


def test_the_card_has_what_calibration_stored(adapter: Path, table: ScoreTable) -> None:
    _, card = load(adapter)
    assert len(table) == 40
    certified, empirical, nothing = card.policies
    assert (certified.accept, certified.abstain) == (
        (Limit("combined", 0.3),),
        (Limit("predictive_entropy", 1.38),),
    )
    assert certified.accept_by_label == {LABELS[0]: 0.2, LABELS[1]: None}
    assert certified.void is None
    assert certified.guarantee is not None
    assert (certified.guarantee.target_risk, certified.guarantee.n_out_of_scope) == (0.05, 4)
    assert certified.guarantee.kind == "ltt"
    assert certified.abstain_guarantee is not None
    assert certified.abstain_guarantee.max_in_scope_share == 0.02
    assert (empirical.guarantee, empirical.void) == (None, None)
    assert (nothing.accept, nothing.abstain) == (None, ())
    assert card.dtype == "float32"
    assert card.calibration is not None
    assert card.calibration.temperature == TEMPERATURE
    assert card.calibration.has_combined
    assert card.calibration.void is None
    assert [rule.kind for rule in card.calibration.prediction_sets] == ["aps", "lac"]
    assert card.calibration.uncertified[0].more_labels == 900
    assert card.calibration.reference.labels == {"ham": 0.5, "spam": 0.5}


def test_answers_have_the_calibrated_scores(adapter: Path, table: ScoreTable) -> None:
    engine, card = load(adapter)
    found = answer(engine, card, card.defaults)
    for name in table.scores:
        values = [getattr(scores, name) for scores in found]
        assert values == pytest.approx(table.scores[name].tolist(), abs=1e-5), name
    predictor = Predictor.load(adapter, base=base_of(adapter), device="cpu")
    rows = [predictor.encode(TextExample("row", text)) for text in QUESTIONS]
    probs = summarise(predictor.predict(rows).log_probs).mean_probs
    inside = members(SETS[0], probs)
    for b, scores in enumerate(found):
        assert scores.prediction_set is not None
        expected = {card.labels[k] for k in inside[b].nonzero().flatten().tolist()}
        assert set(scores.prediction_set) == expected
        assert scores.prediction_set[0] == scores.label
        order = [scores.probs[card.labels.index(label)] for label in scores.prediction_set]
        assert order == sorted(order, reverse=True)


def test_answers_without_disagreement_have_no_combined_score(
    adapter: Path, table: ScoreTable
) -> None:
    engine, card = load(adapter)
    assert "combined" in table.scores
    for sampling in (Sampling(estimator="mean_mask"), Sampling(num_samples=1)):
        assert {scores.combined for scores in answer(engine, card, sampling)} == {None}
    (other, *_) = answer(engine, card, Sampling(num_samples=5, seed=3))
    features: dict[ScoreName, torch.Tensor] = {
        name: torch.tensor([getattr(other, name)], dtype=torch.float64)
        for name in ("confidence", "predictive_entropy", "mutual_information", "label_mass")
    }
    assert other.combined == pytest.approx(combined_score(COMBINED, features).item())


def test_another_precision_voids_every_promise(adapter: Path, table: ScoreTable) -> None:
    assert len(table) == 40
    engine, card = load(adapter, dtype="bfloat16")
    certified, empirical, _ = card.policies
    expected = "measured with dtype float32 (here: bfloat16)"
    assert certified.void == expected
    assert (certified.guarantee, certified.abstain_guarantee) == (None, None)
    assert certified.accept == (Limit("combined", 0.3),)  # it still decides
    assert empirical.void is None
    assert card.calibration is not None
    assert card.calibration.void == expected
    (first, *_) = answer(engine, card, card.defaults)
    assert first.prediction_set is None
    assert first.combined is not None


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("adapter_sha256", "f" * 64, "adapter_sha256 ffffffffffff (here: "),
        ("num_samples", 9, "num_samples 9 (here: 3)"),
        ("design", "stratified", "design stratified (here: iid)"),
        ("seed", 1, "seed 1 (here: 0)"),
        ("estimator", "mean_mask", "estimator mean_mask (here: monte_carlo)"),
        ("temperature", 1.5, "temperature 1.5 (here: 1.4)"),
        ("dtype", "bfloat16", "dtype bfloat16 (here: float32)"),
        ("engine", "remote", "engine remote (here: local)"),
    ],
)
def test_everything_a_certificate_depends_on_voids_it(
    adapter: Path, table: ScoreTable, field: str, value: Any, shown: str
) -> None:
    assert len(table) == 40
    predictor = Predictor.load(adapter, base=base_of(adapter), device="cpu")
    here = measured_with(predictor, predictor.default_plan)
    assert void_reason(here, here, point_method=False) is None
    changed = here.model_copy(update={field: value})
    assert shown in (void_reason(changed, here, point_method=False) or "")
    sampled = field in {"num_samples", "design", "seed", "estimator"}
    assert (void_reason(changed, here, point_method=True) is None) == sampled


def certify_rows(table: ScoreTable, labels: tuple[str, ...]) -> list[tuple[RowScores, bool, bool]]:
    """Return the scores of the certify rows, whether each is right, and whether out of scope."""
    rows: list[tuple[RowScores, bool, bool]] = []
    for n in range(len(table)):
        if n % 4 < 2:
            continue
        label = int(table.predicted[n])
        values = {name: float(table.scores[name][n]) for name in table.scores}
        scores = RowScores(
            labels=labels,
            probs=tuple(float(k == label) for k in range(len(LABELS))),
            normalized_entropy=0.0,
            variation_ratio=0.0,
            expected_entropy=None,
            confidence_std=None,
            samples=(),
            **values,  # type: ignore[arg-type]
        )
        rows.append((scores, bool(table.correct[n]), bool(table.outside[n])))
    return rows


def median(table: ScoreTable, name: ScoreName) -> float:
    return float(table.scores[name].median())


POLICIES: dict[str, Callable[[ScoreTable, AdapterCard], Policy]] = {
    "stored": lambda _, card: replace(card.policies[0], abstain=()),
    "several limits": lambda table, _: Policy(
        "p",
        accept=(
            Limit("confidence", median(table, "confidence")),
            Limit("mutual_information", median(table, "mutual_information")),
        ),
        abstain=(
            Limit("label_mass", float(table.scores["label_mass"].quantile(0.1))),
            Limit("predictive_entropy", float(table.scores["predictive_entropy"].quantile(0.8))),
        ),
    ),
    "by label, lower is surer": lambda table, card: Policy(
        "p",
        accept=(Limit("predictive_entropy", median(table, "predictive_entropy")),),
        accept_by_label={card.labels[0]: 9.0, card.labels[1]: None},
    ),
    "by label and another limit": lambda table, card: Policy(
        "p",
        accept=(Limit("combined", 2.0), Limit("label_mass", median(table, "label_mass"))),
        accept_by_label=dict.fromkeys(card.labels, 0.0),
    ),
    "nothing": lambda *_: Policy("p", accept=None),
}


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES.keys())
def test_what_a_policy_would_do_is_what_the_server_decides(
    adapter: Path, table: ScoreTable, make: Callable[[ScoreTable, AdapterCard], Policy]
) -> None:
    engine, card = load(adapter)
    policy = make(table, card)
    rows = certify_rows(table, card.labels)
    decisions = [decide(policy, scores, truncated=False).decision for scores, _, _ in rows]
    n_outside = sum(outside for _, _, outside in rows)
    share = n_outside / len(rows)  # at the share of the rows themselves, counting is enough
    found = engine.evaluate_policy(card.key, policy, out_of_scope_share=share, delta=0.1)
    assert (found.n, found.n_out_of_scope) == (len(rows), n_outside)
    for name in ("accept", "review", "abstain"):
        expected = decisions.count(name) / len(rows)
        assert getattr(found, name) == pytest.approx(expected), name
    taken = [right for (_, right, _), got in zip(rows, decisions, strict=True) if got == "accept"]
    risk = taken.count(False) / len(taken) if taken else None
    assert found.selective_risk == (None if risk is None else pytest.approx(risk))
    assert found.risk_upper_bound >= (risk or 0.0)


@pytest.mark.parametrize("name", ["confidence", "mutual_information", "combined"])
def test_the_curve_is_a_policy_at_each_threshold(
    adapter: Path, table: ScoreTable, name: ScoreName
) -> None:
    engine, card = load(adapter)
    assert len(table) == 40
    points = engine.risk_coverage(card.key, name, out_of_scope_share=0.2, delta=0.1)
    assert len(points) > 5
    for point in points[:: len(points) // 5]:
        policy = Policy("p", accept=(Limit(name, point.threshold),))
        found = engine.evaluate_policy(card.key, policy, out_of_scope_share=0.2, delta=0.1)
        assert point.coverage == pytest.approx(found.accept)
        assert point.in_scope_coverage == pytest.approx(found.in_scope_coverage)
        assert point.risk_upper_bound == pytest.approx(found.risk_upper_bound)
        assert point.selective_risk == pytest.approx(found.selective_risk)
    assert not math.isnan(points[0].risk_upper_bound)


def test_questions_that_the_stored_rows_cannot_answer(
    adapter: Path, table: ScoreTable, tmp_path: Path
) -> None:
    bare = tmp_path / "adapter"
    shutil.copytree(adapter, bare)
    shutil.copytree(adapter.parent / "base", tmp_path / "base")
    stored = Predictor.load(adapter, base=base_of(adapter), device="cpu").manifest
    plain = {"calibration": None, "policies": stored.policies[1:2]}
    update_artifact(bare, stored.model_copy(update=plain))
    engine, card = load(bare)
    policy = Policy("p", accept=(Limit("confidence", 0.5),))
    with pytest.raises(NotCalibratedError, match=f"{card.name} stores no calibration rows"):
        engine.risk_coverage(card.key, "confidence", out_of_scope_share=0.0, delta=0.1)
    with pytest.raises(NotCalibratedError, match="dalorra calibrate"):
        engine.evaluate_policy(card.key, policy, out_of_scope_share=0.0, delta=0.1)
    scores: dict[ScoreName, torch.Tensor] = {"confidence": table.scores["confidence"]}
    inside = ScoreTable(table.labels.clamp(min=0), table.predicted, scores)
    n = len(table)
    rows = StoredRows(
        torch.zeros(n, DIGEST_BYTES, dtype=torch.uint8), torch.full((n,), 2).byte(), inside
    )
    content = rows.to_bytes()
    assert stored.calibration is not None
    record = stored.calibration.model_copy(update={"scores_file": calibration_file_name(content)})
    update_artifact(bare, stored.model_copy(update={**plain, "calibration": record}), content)
    engine, card = load(bare)
    with pytest.raises(NotCalibratedError, match="no combined; they have: confidence"):
        engine.risk_coverage(card.key, "combined", out_of_scope_share=0.0, delta=0.1)
    limited = Policy("p", accept=None, abstain=(Limit("label_mass", 0.5),))
    with pytest.raises(NotCalibratedError, match="no label_mass"):
        engine.evaluate_policy(card.key, limited, out_of_scope_share=0.0, delta=0.1)
    with pytest.raises(ValueError, match="out-of-scope"):
        engine.risk_coverage(card.key, "confidence", out_of_scope_share=0.2, delta=0.1)
    with pytest.raises(ValueError, match="out-of-scope"):
        engine.evaluate_policy(card.key, policy, out_of_scope_share=0.2, delta=0.1)
    assert engine.evaluate_policy(card.key, policy, out_of_scope_share=0.0, delta=0.1).n == n
