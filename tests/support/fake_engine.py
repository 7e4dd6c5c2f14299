"""A deterministic engine without a model, which can be told to raise, block, die or count wrong.

Probabilities come from a hash of the text, the seed and the sample's number, so equal requests have
equal answers whatever shares their batch; a design only changes the name of the mask set. The words
``sure`` and ``lost`` give a confident answer and a flat one, so that tests can ask for each
decision.
"""

import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from server.ports import (
    AbstainGuarantee,
    AdapterCard,
    AdapterLoadError,
    BatchKey,
    BatchRow,
    BatchScores,
    CalibrationCard,
    ChoiceQuestion,
    EncodedRow,
    Guarantee,
    Limit,
    Policy,
    PolicyEvaluation,
    PredictionSetRule,
    Question,
    ReferenceProfile,
    RiskCoveragePoint,
    RowRejectedError,
    RowScores,
    RowTooLongError,
    Sampling,
    ScoreName,
    ScoreReference,
    SelfTest,
    StoredAdapter,
    Truncate,
    UncertifiedTarget,
    Wanted,
)
from server.telemetry import DRIFT_EDGES
from tests.support.fake_rows import StoredRow, curve_of, evaluate

__all__ = [
    "CALIBRATION",
    "GUARANTEE",
    "POLICY",
    "QUIZ",
    "TOPICS",
    "TOPICS_CERTIFIED",
    "TOPICS_ENSEMBLE",
    "TOPICS_POINT",
    "FakeEngine",
    "LostError",
    "score",
    "stored_rows",
]

POLICY = Policy(
    name="default",
    accept=(Limit("confidence", 0.8),),
    abstain=(Limit("predictive_entropy", 1.0),),
    target_selective_risk=0.05,
    chosen_on={"split": "validation", "n": 3000, "n_out_of_scope": 100, "num_samples": 4},
)
TOPICS = AdapterCard(
    name="topics",
    revision="3f9a00112233",
    kind="text",
    labels=("billing", "fraud", "other"),
    method="dalorra",
    point_method=False,
    base="tiny-base",
    base_fingerprint="sha256:" + "0" * 64,
    max_tokens=64,
    defaults=Sampling(num_samples=4),
    policies=(POLICY,),
    prompt="intent",
    prompt_sha256="1" * 64,
    mask_set="ms_4_0",
    selftest_max_abs_error=1e-7,
    designs=("iid", "stratified", "antithetic"),
)
QUIZ = AdapterCard(
    name="quiz",
    revision="77aa00112233",
    kind="choice",
    labels=("A", "B", "C", "D", "E"),
    method="dalorra",
    point_method=False,
    base="tiny-base",
    base_fingerprint="sha256:" + "0" * 64,
    max_tokens=64,
    defaults=Sampling(num_samples=4),
    mask_set="ms_4_0",
)
TOPICS_POINT = AdapterCard(
    name="topics-mle",
    revision="e3b000112233",
    kind="text",
    labels=("billing", "fraud", "other"),
    method="mle",
    point_method=True,
    base="tiny-base",
    base_fingerprint="sha256:" + "0" * 64,
    max_tokens=64,
    defaults=Sampling(num_samples=1),
    policies=(POLICY,),
)
TOPICS_ENSEMBLE = replace(
    TOPICS,
    name="topics-ensemble",
    revision="e45e00112233",
    method="ensemble",
    defaults=Sampling(num_samples=3),
    mask_set="ms_3_0",
    fixed_functions=3,
    designs=("iid",),
)
GUARANTEE = Guarantee(
    kind="ltt",
    procedure="fixed_sequence",
    target_risk=0.05,
    delta=0.1,
    out_of_scope_share=0.2,
    n=1500,
    n_out_of_scope=100,
    risk_upper_bound=0.0487,
    in_scope_coverage=0.81,
    per_label=False,
    calibrated_at="2026-11-01T00:00:00Z",
)
CALIBRATION = CalibrationCard(
    date="2026-11-01T00:00:00Z",
    n=3000,
    n_out_of_scope=200,
    temperature=1.3,
    prediction_sets=(
        PredictionSetRule("aps", 0.1, 1400, 0.912, 1.7),
        PredictionSetRule("lac", 0.1, 1400, 0.903, 1.2),
    ),
    uncertified=(
        UncertifiedTarget(
            0.01,
            None,
            "no threshold meets this target with n = 1500; about 900 more labels would",
            900,
        ),
        UncertifiedTarget(0.05, "fraud", "the label was predicted 3 times", None),
    ),
    reference=ReferenceProfile(
        n=3000,
        scores={
            name: ScoreReference(edges, tuple((k + 1) / len(edges) for k in range(len(edges))))
            for name, edges in DRIFT_EDGES.items()
        },
        confidence_bin_edges=(0.6, 0.8, 0.95),
        confidence_bin_shares=(0.1, 0.1, 0.2, 0.6),
        labels={"billing": 0.5, "fraud": 0.3, "other": 0.2},
        decisions={"accept": 0.7, "review": 0.2, "abstain": 0.1},
    ),
    has_combined=True,
)
TOPICS_CERTIFIED = replace(
    TOPICS,
    policies=(
        replace(
            POLICY,
            name="risk_0.05",
            guarantee=GUARANTEE,
            abstain_guarantee=AbstainGuarantee(0.02, 0.1, 1400),
        ),
        replace(
            POLICY,
            name="risk_0.1",
            accept=(Limit("combined", 0.3),),
            target_selective_risk=0.1,
            guarantee=replace(GUARANTEE, target_risk=0.1),
        ),
        replace(
            POLICY,
            name="risk_0.05_per_label",
            accept_by_label={"billing": 0.9, "fraud": None},
            guarantee=replace(GUARANTEE, per_label=True),
        ),
        replace(POLICY, name="nothing", accept=None, target_selective_risk=0.01),
    ),
    out_of_scope_label="oos",
    calibration=CALIBRATION,
)
"""As after ``dalorra calibrate``: two certified targets, one per label, one that failed."""


class LostError(BaseException):
    """What a thread cannot survive."""


@dataclass(frozen=True)
class _Words:
    text: str
    labels: tuple[str, ...]


class FakeEngine:
    """See ``server.ports.Engine``; the fields below steer it, ``batches`` tells what it ran.

    Attributes:
        gate: Cleared, it blocks the engine thread in ``run_batch`` until it is set again.
        entered: Set while a batch is inside ``run_batch``.
        fault: Called with the texts of each batch; may raise.
        load_gate: Cleared, it blocks ``load``.
        asked: Set once ``load`` is called.
        load_fault: Raised by ``load`` when set.
        encode_gate: Cleared, it blocks ``encode``.
        batches: The texts of every batch, in order, with failed ones.
        library: What lies in directories of these names, for ``load_adapter``.
        adapter_fault: Called with the directory's name by ``load_adapter``; may raise.
        selftest_error: What ``self_test`` finds; the limit is 1e-3.
        chunk_rows: Rows of one pretended forward pass; ``wanted`` is asked before each.
        mixes: What ``mixes_adapters`` says.
        problem: Why it says that it cannot answer now.
    """

    def __init__(self, *cards: AdapterCard) -> None:
        self.cards = {card.key: card for card in (cards or (TOPICS,))}
        self._first = tuple(self.cards.values())
        self._loads = itertools.count(1)
        self.library: dict[str, AdapterCard] = {}
        self.adapter_fault: Callable[[str], None] = lambda _name: None
        self.selftest_error = 1e-7
        self.chunk_rows = 8
        self.mixes = True
        self.problem: str | None = None
        self.gate, self.load_gate, self.encode_gate = (threading.Event() for _ in range(3))
        for gate in (self.gate, self.load_gate, self.encode_gate):
            gate.set()
        self.entered, self.asked = threading.Event(), threading.Event()
        self.fault: Callable[[list[str]], None] = lambda _texts: None
        self.load_fault: Exception | None = None
        self.batches: list[list[str]] = []
        self.closed = False

    @property
    def preferred_batch_tokens(self) -> int:
        return 4096

    def load(self) -> tuple[AdapterCard, ...]:
        self.asked.set()
        self.load_gate.wait(10)
        if self.load_fault is not None:
            raise self.load_fault
        return self._first

    @property
    def worthwhile_padding(self) -> float:
        return 0.5

    @property
    def mixes_adapters(self) -> bool:
        return self.mixes

    def load_adapter(self, directory: Path, name: str | None = None) -> AdapterCard:
        self.load_gate.wait(10)
        self.adapter_fault(directory.name)
        if directory.name not in self.library:
            raise AdapterLoadError(f"{directory.name} has no manifest.json")
        stored = self.library[directory.name]
        served = name or stored.name
        card = replace(
            stored, name=served, load_id=f"{served}:{stored.revision}#{next(self._loads)}"
        )
        self.cards[card.key] = card
        return card

    def unload_adapter(self, adapter: str) -> None:
        self.cards.pop(adapter, None)

    def stored_adapter(self, directory: Path) -> StoredAdapter:
        card = self.library.get(directory.name)
        if card is None:
            return StoredAdapter(directory.name, None, None, 0, 0, False, False, "no manifest.json")
        return StoredAdapter(
            name=card.name,
            revision=card.revision,
            method=card.method,
            num_labels=len(card.labels),
            num_bytes=1000,
            signed=card.signed_by is not None,
            calibrated=card.calibration is not None,
        )

    def self_test(self, adapter: str) -> SelfTest:
        return SelfTest(self.selftest_error if adapter in self.cards else math.nan, 1e-3)

    def encode(self, adapter: str, question: Question, truncate: Truncate) -> EncodedRow:
        self.encode_gate.wait(10)
        card = self.cards[adapter]
        text, labels = _read(question, card)
        words = text.split()
        limit = card.max_tokens - 2  # as if the prompt around the text had two tokens
        if len(words) > limit and truncate == "none":
            raise RowTooLongError(len(words) + 2, card.max_tokens)
        kept = words[-limit:] if truncate == "start" else words[:limit]
        return EncodedRow(len(kept) + 2, len(kept) < len(words), _Words(" ".join(kept), labels))

    def run_batch(self, rows: Sequence[BatchRow], wanted: Wanted) -> BatchScores:
        assert len({row.key.sampling.passes for row in rows}) == 1
        assert self.mixes or len({row.key for row in rows}) == 1
        words = [_words(row.row) for row in rows]
        texts = [word.text for word in words]
        self.batches.append(texts)
        self.entered.set()
        self.gate.wait(10)
        self.entered.clear()
        self.fault(texts)
        scores: list[RowScores | None] = []
        for start in range(0, len(rows), self.chunk_rows):
            places = range(start, min(start + self.chunk_rows, len(rows)))
            keep = any(wanted(place) for place in places)
            scores += [self._score(rows[place]) if keep else None for place in places]
        return BatchScores(tuple(scores), 0.002, 0.001)

    def _score(self, row: BatchRow) -> RowScores:
        word, card = _words(row.row), self.cards[row.key.adapter]
        return score(word.text, word.labels, row.key.sampling, card)

    def mask_set(self, key: BatchKey) -> str | None:
        if self.cards[key.adapter].point_method or key.sampling.estimator == "mean_mask":
            return None
        s = key.sampling
        design = "" if s.design == "iid" else f"_{s.design}"
        return f"ms_{s.num_samples}_{s.seed}{design}"

    def risk_coverage(
        self, adapter: str, score: ScoreName, *, out_of_scope_share: float, delta: float
    ) -> tuple[RiskCoveragePoint, ...]:
        rows = stored_rows(self.cards[adapter])
        return curve_of(rows, score, out_of_scope_share, delta)

    def evaluate_policy(
        self, adapter: str, policy: Policy, *, out_of_scope_share: float, delta: float
    ) -> PolicyEvaluation:
        return evaluate(stored_rows(self.cards[adapter]), policy, out_of_scope_share, delta)

    def close(self) -> None:
        self.closed = True


def stored_rows(card: AdapterCard) -> list[StoredRow]:
    """Return the calibration rows of an adapter: 60 easy, 60 hard, 30 out of scope if it has any.

    Every tenth easy row and every third hard one was answered wrongly.
    """
    if card.calibration is None:
        return []
    kinds = [("a sure thing", 60, 10), ("unclear", 60, 3)]
    rows: list[StoredRow] = []
    for text, count, wrong_every in kinds:
        for n in range(count):
            scores = score(f"{text} {n}", card.labels, card.defaults, card)
            right = n % wrong_every != 0
            rows.append(StoredRow(right=right, outside=False, scores=scores))
    if card.calibration.n_out_of_scope:
        for n in range(30):
            scores = score(f"lost words {n}", card.labels, card.defaults, card)
            rows.append(StoredRow(right=False, outside=True, scores=scores))
    return rows


def score(text: str, labels: tuple[str, ...], sampling: Sampling, card: AdapterCard) -> RowScores:
    """Return made-up scores whose numbers fit together."""
    samples = [_distribution(text, labels, sampling.seed, m) for m in range(sampling.passes)]
    probs = [sum(column) / len(samples) for column in zip(*samples, strict=True)]
    best = probs.index(max(probs))
    entropy = _entropy(probs)
    expected = sum(_entropy(sample) for sample in samples) / len(samples)
    mean = probs[best]
    variance = sum((sample[best] - mean) ** 2 for sample in samples) / len(samples)
    single = card.point_method or sampling.estimator == "mean_mask"
    return RowScores(
        labels=labels,
        probs=tuple(probs),
        confidence=mean,
        label_mass=0.9,
        predictive_entropy=entropy,
        normalized_entropy=entropy / math.log(len(labels)),
        variation_ratio=sum(s.index(max(s)) != best for s in samples) / len(samples),
        expected_entropy=None if single else expected,
        mutual_information=None if single else max(entropy - expected, 0.0),
        confidence_std=None if single else math.sqrt(variance),
        samples=tuple(tuple(sample) for sample in samples),
        combined=_combined(mean, entropy, card, single=single),
        prediction_set=_prediction_set(labels, probs, card),
    )


def _combined(
    confidence: float, entropy: float, card: AdapterCard, *, single: bool
) -> float | None:
    if card.calibration is None or not card.calibration.has_combined or single:
        return None
    return confidence / (1 + entropy)


def _prediction_set(
    labels: tuple[str, ...], probs: list[float], card: AdapterCard
) -> tuple[str, ...] | None:
    """Return the most probable labels up to 90 % in sum."""
    calibration = card.calibration
    if calibration is None or calibration.void or not calibration.prediction_sets:
        return None
    ranked = sorted(zip(probs, labels, strict=True), reverse=True)
    size = 1
    while size < len(ranked) and sum(prob for prob, _ in ranked[:size]) < 0.9:
        size += 1
    return tuple(label for _, label in ranked[:size])


def _read(question: Question, card: AdapterCard) -> tuple[str, tuple[str, ...]]:
    if not isinstance(question, ChoiceQuestion):
        return question.text, card.labels
    labels = tuple(option.label for option in question.choices)
    if unknown := sorted(set(labels) - set(card.labels)):
        raise RowRejectedError(f"the adapter has no label {unknown[0]!r}")
    text = " ".join([question.question, *(option.text for option in question.choices)])
    return f"{question.context or ''} {text}".strip(), labels


def _words(row: EncodedRow) -> _Words:
    assert isinstance(row.payload, _Words)
    return row.payload


def _distribution(text: str, labels: tuple[str, ...], seed: int, m: int) -> list[float]:
    sharpness = 9.0 if "sure" in text else 0.1 if "lost" in text else 1.5
    weights: list[float] = []
    for label in labels:
        own = _unit(f"{text}|{label}")
        noise = _unit(f"{text}|{label}|{seed}|{m}") - 0.5
        weights.append(math.exp(sharpness * own + 0.2 * noise * min(sharpness, 1.0)))
    if "sure" in text:
        weights[weights.index(max(weights))] *= 100.0
    return [weight / sum(weights) for weight in weights]


def _unit(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _entropy(probs: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)
