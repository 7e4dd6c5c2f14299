"""dalorra_core.calibration.decisions and stored_rows: the rule by hand, rows that come back."""

import pytest
import torch
from safetensors.torch import load

from dalorra_core.artifact.calibration_record import Limit, Policy
from dalorra_core.calibration.decisions import decide, scores_needed
from dalorra_core.calibration.scores import ScoreTable
from dalorra_core.calibration.stored_rows import StoredRows
from dalorra_core.errors import ConfigError
from tests.support.tiny_manifest import tiny_manifest

CHOSEN = tiny_manifest().policies[0].chosen_on
LABELS = ("a", "b")


def table() -> ScoreTable:
    return ScoreTable(
        labels=torch.tensor([0, 1, 0, -1]),
        predicted=torch.tensor([0, 0, 1, 1]),
        scores={
            "confidence": torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64),
            "predictive_entropy": torch.tensor([0.1, 0.6, 0.3, 0.4], dtype=torch.float64),
        },
    )


def decided(**limits: object) -> tuple[list[bool], list[bool]]:
    policy = Policy.model_validate({"name": "p", "chosen_on": CHOSEN, **limits})
    found = decide(policy, table(), LABELS)
    assert torch.equal(found.review, ~found.accept & ~found.abstain)
    assert sum(found.shares().values()) == pytest.approx(1)
    assert not bool((found.accept & found.abstain).any())
    return found.accept.tolist(), found.abstain.tolist()


def test_abstaining_comes_first_and_equality_passes() -> None:
    accept, abstain = decided(
        accept=Limit(score="confidence", threshold=0.7),
        abstain=Limit(score="predictive_entropy", threshold=0.4),
    )
    assert abstain == [False, True, False, False]
    assert accept == [True, False, True, False]


def test_no_accept_limit_accepts_nothing_and_no_abstain_limit_refuses_nothing() -> None:
    assert decided(accept=None) == ([False] * 4, [False] * 4)


def test_a_label_may_have_a_threshold_of_its_own() -> None:
    limit = Limit(score="predictive_entropy", threshold=0.2)
    assert decided(accept=limit)[0] == [True, False, False, False]
    assert decided(accept=limit, accept_by_label={"b": 0.3})[0] == [True, False, True, False]
    assert decided(accept=limit, accept_by_label={"a": None, "b": 0.4})[0] == [
        *(False, False),
        *(True, True),
    ]


def test_a_score_that_was_not_measured_is_named() -> None:
    limit = Limit(score="mutual_information", threshold=0.2)
    policy = Policy(name="p", accept=None, abstain=limit, chosen_on=CHOSEN)
    assert scores_needed(policy) == {"mutual_information"}
    with pytest.raises(ConfigError, match="mutual_information was not measured"):
        decide(policy, table(), LABELS)


def test_stored_rows_come_back() -> None:
    digest = torch.arange(64, dtype=torch.uint8).view(4, 16)
    part = torch.tensor([0, 1, 2, 2], dtype=torch.uint8)
    found = StoredRows.from_tensors(load(StoredRows(digest, part, table()).to_bytes()))
    assert torch.equal(found.digest, digest)
    assert torch.equal(found.part, part)
    for name in ("labels", "predicted"):
        assert torch.equal(getattr(found.table, name), getattr(table(), name))
    assert set(found.table.scores) == set(table().scores)
    for name, values in table().scores.items():
        assert torch.equal(found.table.scores[name], values)
    certify = found.of_part("certify")
    assert certify.labels.tolist() == [0, -1]
    assert found.of_part("fit").score("confidence").tolist() == [0.9]
