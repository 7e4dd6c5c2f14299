"""The real engine with ensembles: a fixed number of functions, or one answer of mean logits."""

from pathlib import Path

import pytest
import torch

from dalorra_core.data.examples import TextExample
from dalorra_core.methods.ensemble import EnsembleConfig
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from server.engines.local import LocalEngine
from server.ports import AdapterCard, BatchKey, BatchRow, RowScores, Sampling, TextQuestion
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter
from tests.support.tiny_models import save_tiny_base

CASES: dict[str, EnsembleConfig | None] = {
    "mixture": EnsembleConfig(num_members=3),
    "logits": EnsembleConfig(num_members=3, average="logits"),
    "gates": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensembles")
    base = save_tiny_base(folder / "base")
    for name, config in CASES.items():
        save_tiny_adapter(folder / name, base, config=config)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> LocalEngine:
    engine = LocalEngine([folder / name for name in CASES], base=str(folder / "base"), device="cpu")
    engine.load()
    return engine


@pytest.fixture(scope="module")
def cards(engine: LocalEngine, folder: Path) -> dict[str, AdapterCard]:
    return {name: engine.load_adapter(folder / name) for name in CASES}


def batch_row(
    engine: LocalEngine, card: AdapterCard, text: str, num_samples: int | None = None
) -> BatchRow:
    sampling = Sampling(num_samples=num_samples or card.defaults.num_samples)
    encoded = engine.encode(card.key, TextQuestion(text), "none")
    return BatchRow(key=BatchKey(card.key, sampling), row=encoded)


def scores_of(engine: LocalEngine, *rows: BatchRow) -> list[RowScores]:
    scores = engine.run_batch(rows, lambda _: True).rows
    assert all(score is not None for score in scores)
    return [score for score in scores if score is not None]


def test_the_card_tells_how_many_functions_there_are(cards: dict[str, AdapterCard]) -> None:
    found = {
        name: (card.fixed_functions, card.point_method, card.defaults.num_samples)
        for name, card in cards.items()
    }
    assert found == {"mixture": (3, False, 3), "logits": (None, True, 1), "gates": (None, False, 3)}
    assert cards["mixture"].mask_set is not None
    assert cards["logits"].mask_set is None


def test_mixed_batches_give_what_each_adapter_gives_alone(
    engine: LocalEngine, cards: dict[str, AdapterCard]
) -> None:
    rows = [batch_row(engine, cards[name], text) for text in TEXTS[:2] for name in CASES]
    single = batch_row(engine, cards["gates"], TEXTS[0], num_samples=1)
    point = [row for row in rows if row.key.adapter == cards["logits"].key]
    for batch in (
        [row for row in rows if row not in point],  # with equal numbers of functions
        [*point, single],
    ):
        together = scores_of(engine, *batch)
        for row, score in zip(batch, together, strict=True):
            (alone,) = scores_of(engine, row)
            assert score.probs == pytest.approx(alone.probs, abs=1e-5)


def test_what_the_engine_answers_is_the_average_asked_for(
    engine: LocalEngine, cards: dict[str, AdapterCard]
) -> None:
    mixture, logits = (
        scores_of(engine, batch_row(engine, cards[name], TEXTS[0]))[0]
        for name in ("mixture", "logits")
    )
    assert len(mixture.samples) == 3
    assert mixture.mutual_information is not None
    assert mixture.mutual_information > 0
    each = torch.tensor(mixture.samples, dtype=torch.float64)
    assert mixture.probs == pytest.approx(each.mean(0).tolist(), abs=1e-6)
    assert (logits.mutual_information, logits.confidence_std) == (None, None)
    assert sum(logits.probs) == pytest.approx(1)


def test_mean_logits_are_tempered_after_the_average(folder: Path) -> None:
    mixture, logits = (
        Predictor.load(folder / name, base=str(folder / "base"), device="cpu")
        for name in ("mixture", "logits")
    )
    rows = [mixture.encode(TextExample("q", text)) for text in TEXTS]
    each = mixture.predict(rows).log_probs.double()
    found = logits.predict(rows, SamplingPlan(8, 1)).log_probs
    assert found.shape == (1, len(TEXTS), each.shape[-1])
    torch.testing.assert_close(
        found[0].double(), each.mean(0).log_softmax(-1), rtol=1e-5, atol=1e-5
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "temperature", property(lambda _: 2.0))
        tempered = logits.predict(rows).log_probs
    expected = (each.mean(0) / 2).log_softmax(-1)
    torch.testing.assert_close(tempered[0].double(), expected, rtol=1e-5, atol=1e-5)
