"""What is drawn for a sampling plan: which rows, which samples, and from whom nothing."""

from pathlib import Path

import pytest
import torch

from dalorra_core.calibration.plan_measurement import (
    check_plannable,
    measure_answers,
    passes_needed,
    plan_rows,
)
from dalorra_core.calibration.sampling_plan import SIZES, PlanRequest
from dalorra_core.calibration.split import part_of
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from tests.support.tiny_artifacts import save_tiny_adapter
from tests.support.tiny_models import random_rows, save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("plan") / "base")


def loaded(base: Path, folder: Path, method: str) -> Predictor:
    adapter = save_tiny_adapter(folder / method, base, method=method)
    return Predictor.load(adapter, base=str(base), device="cpu")


def test_rows_are_of_the_fit_part_and_their_order_does_not_matter() -> None:
    ids = [f"row-{i}" for i in range(200)]
    places = plan_rows(ids, 20)
    assert len(set(places)) == 20
    assert all(part_of(ids[i]) == 0 for i in places)
    turned = ids[::-1]
    assert {turned[i] for i in plan_rows(turned, 20)} == {ids[i] for i in places}
    assert {ids[i] for i in plan_rows(ids, 10)} < {ids[i] for i in places}
    fit = sum(part_of(name) == 0 for name in ids)
    with pytest.raises(
        DataError, match=rf"as many in the fit part, got {fit} of 200 rows; about 450 rows"
    ):
        plan_rows(ids, 75)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("mle", "it does not sample"),
        ("ensemble", "it has 3 functions, and all of them answer"),
        ("mc_dropout", "it draws iid samples only"),
    ],
)
def test_a_method_that_leaves_no_choice_is_refused(
    base: Path, tmp_path: Path, method: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"to choose for method {method}: {why}"):
        check_plannable(loaded(base, tmp_path, method))


def test_every_option_is_a_set_of_its_own_seed_or_the_beginning_of_one(
    base: Path, tmp_path: Path
) -> None:
    predictor = loaded(base, tmp_path, "dalorra")
    check_plannable(predictor)
    rows, request = random_rows((5, 3, 6), num_labels=4), PlanRequest(8, 70, 8)
    seen: list[int] = []
    found = measure_answers(predictor, rows, request, seen.append)
    assert sum(seen) == len(rows) * passes_needed(predictor, request)
    assert found.reference.shape == (70, 3, 4)
    assert len({sample.numpy().tobytes() for sample in found.reference}) == 70
    assert set(found.packs) == {(d, m) for d in ("stratified", "antithetic") for m in SIZES}
    again = measure_answers(predictor, rows, request)
    assert torch.equal(again.reference, found.reference)
    for (design, m), packs in found.packs.items():
        assert packs.shape == (8, m, 3, 4)
        assert torch.equal(packs, again.packs[design, m])
        assert not torch.equal(packs[0], packs[1])
    # an antithetic set of 4 is what is served as one of 4
    whole = found.packs["antithetic", 10]
    torch.testing.assert_close(whole[:, :4], found.packs["antithetic", 4])
    assert found.linearised is not None
    assert found.linearised.passes == 5
    assert found.linearised.log_probs.shape == (8, 256, 3, 4)
    assert not torch.equal(found.linearised.log_probs[0], found.linearised.log_probs[1])
    deterministic = predictor.predict(rows, SamplingPlan(estimator="mean_mask"))
    torch.testing.assert_close(found.mean_mask, deterministic.log_probs)
